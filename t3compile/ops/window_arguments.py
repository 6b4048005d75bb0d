"""The arguments of t3::window_attention that are no tensors, as checked types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from t3compile.geometry import Splits, TokenGrid
from t3compile.pattern import Branch, WindowPattern

OP_NAME = "t3::window_attention"


@dataclass(frozen=True)
class WindowAttentionArgs:
    """The op's arguments that are no tensors, as checked types; grid and pattern in sequence order."""

    grid: TokenGrid
    pattern: WindowPattern
    prefix: int = 0
    suffix: int = 0
    scale: float | None = None
    query_prefix: int = None  # type: ignore[assignment]  # not given: as many as the keys have
    query_suffix: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.query_prefix is None:
            object.__setattr__(self, "query_prefix", self.prefix)
        if self.query_suffix is None:
            object.__setattr__(self, "query_suffix", self.suffix)
        if self.prefix < 0 or self.suffix < 0:
            raise ValueError(f"{OP_NAME}: prefix {self.prefix} and suffix {self.suffix} must not be negative")
        if self.query_prefix < 0 or self.query_suffix < 0:
            raise ValueError(
                f"{OP_NAME}: query_prefix {self.query_prefix} and query_suffix {self.query_suffix} must not be negative"
            )

    @property
    def extra_tokens(self) -> int:
        """Keys outside the grid."""
        return self.prefix + self.suffix

    @property
    def extra_queries(self) -> int:
        """Queries outside the grid."""
        return self.query_prefix + self.query_suffix

    @property
    def tokens(self) -> int:
        """Keys."""
        return self.grid.tokens + self.extra_tokens

    @property
    def query_tokens(self) -> int:
        return self.grid.tokens + self.extra_queries

    def as_op_args(self) -> tuple[Any, ...]:
        """Positional arguments of the op after q, k, v; the queries' own extra tokens only where they differ."""
        shared = (
            list(self.grid.sizes),
            list(self.pattern.splits.counts),
            "+".join(self.pattern.branches),
            self.prefix,
            self.suffix,
            self.scale,
        )
        if (self.query_prefix, self.query_suffix) == (self.prefix, self.suffix):
            return shared
        return (*shared, self.query_prefix, self.query_suffix)

    def as_attributes(self) -> dict[str, Any]:
        """The same as ONNX attributes; what is default is absent."""
        names = ("grid", "splits", "branches", "prefix", "suffix", "scale", "query_prefix", "query_suffix")
        named = dict(zip(names, self.as_op_args(), strict=False))
        return {name: value for name, value in named.items() if value is not None}

    @classmethod
    def from_op_args(
        cls,
        grid: list[int],
        splits: list[int],
        branches: str,
        prefix: int = 0,
        suffix: int = 0,
        scale: float | None = None,
        query_prefix: int | None = None,
        query_suffix: int | None = None,
    ) -> WindowAttentionArgs:
        names = tuple(cast("list[Branch]", branches.split("+")))
        pattern = WindowPattern(Splits(*splits), names)
        token_grid = TokenGrid(*grid)
        pattern.check_fit(token_grid)
        query_prefix = prefix if query_prefix is None else query_prefix
        query_suffix = suffix if query_suffix is None else query_suffix
        return cls(token_grid, pattern, prefix, suffix, scale, query_prefix, query_suffix)
