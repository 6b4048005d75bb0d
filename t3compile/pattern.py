"""Attention patterns and schedules: what one layer does, and the cycle over depth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from t3compile.errors import PatternError
from t3compile.geometry import Splits, TokenGrid, partitions_coincide, square_sum

Branch = Literal["local", "dilated"]
BRANCHES: tuple[Branch, ...] = get_args(Branch)


@dataclass(frozen=True)
class WindowPattern:
    """Splits and branches of one layer; the output is the plain mean over the branches.

    Source: arXiv 2512.13492; "local" is the paper's close branch, "dilated" its remote branch.
    """

    splits: Splits
    branches: tuple[Branch, ...] = BRANCHES

    kind = "t3-window"

    def __post_init__(self) -> None:
        if not self.branches or len(set(self.branches)) != len(self.branches):
            raise PatternError(f"branches {list(self.branches)}: need one or two different names")
        for branch in self.branches:
            if branch not in BRANCHES:
                raise PatternError(f"branch {branch!r} is unknown; known: {', '.join(BRANCHES)}")
        # One spelling per pattern: the mean does not depend on the order.
        object.__setattr__(self, "branches", tuple(b for b in BRANCHES if b in self.branches))

    def check_fit(self, grid: TokenGrid) -> None:
        """Raise PatternError when an axis has fewer tokens than windows."""
        self.splits.check_fit(grid)

    def in_order(self, order: str) -> WindowPattern:
        """The same windows for the grid in this order of its axes."""
        return replace(self, splits=self.splits.in_order(order))

    def is_full(self) -> bool:
        """Whether this is the original attention: one window over everything."""
        return self.splits.windows == 1

    def computed_branches(self, grid: TokenGrid) -> tuple[Branch, ...]:
        """The branches that have to be computed: coinciding ones are merged into the first."""
        if partitions_coincide(grid, self.splits):
            return self.branches[:1]
        return self.branches

    def pairs(self, grid: TokenGrid, *, merged: bool = True) -> int:
        """Query-key pairs among grid tokens, summed over branches; `merged` counts coinciding branches once."""
        branches = self.computed_branches(grid) if merged else self.branches
        per_branch = 1
        for length, n in zip(grid.sizes, self.splits.counts, strict=True):
            per_branch *= square_sum(length, n)
        return len(branches) * per_branch

    def largest_window_tokens(self, grid: TokenGrid) -> int:
        return self.splits.largest_window(grid).tokens

    def launched_windows(self, grid: TokenGrid) -> int:
        """Independent attention problems per head and batch element."""
        return self.splits.windows * len(self.computed_branches(grid))

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "splits": list(self.splits.counts),
            "branches": list(self.branches),
        }

    def __str__(self) -> str:
        suffix = "" if self.branches == BRANCHES else " " + "+".join(self.branches)
        return f"{self.splits}{suffix}"


def pattern_from_json(data: object) -> WindowPattern:
    """Read a pattern, checking its kind, keys and types."""
    if not isinstance(data, Mapping):
        raise PatternError(f"pattern {data!r}: expected an object with kind, splits, branches")
    kind = data.get("kind")
    if kind != WindowPattern.kind:
        raise PatternError(f"pattern kind {kind!r} is unknown; known: '{WindowPattern.kind}'")
    unknown = set(data) - {"kind", "splits", "branches"}
    if unknown:
        raise PatternError(f"pattern has unknown keys {sorted(unknown)}; known: kind, splits, branches")
    splits = data.get("splits")
    if not isinstance(splits, list) or len(splits) != 3:
        raise PatternError(f"splits {splits!r}: expected three whole numbers [n_t, n_h, n_w]")
    branches = data.get("branches", list(BRANCHES))
    if not isinstance(branches, list) or not all(isinstance(branch, str) for branch in branches):
        raise PatternError(f"branches {branches!r}: expected a list of {', '.join(BRANCHES)}")
    return WindowPattern(Splits(*splits), tuple(branches))


@dataclass(frozen=True)
class Schedule:
    """The patterns over depth, cycled by the index of a layer within its stack of blocks."""

    name: str
    patterns: tuple[WindowPattern, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if not self.patterns:
            raise PatternError(f"schedule '{self.name}' has no patterns; it needs at least one")

    def pattern_at(self, index: int) -> WindowPattern:
        return self.patterns[index % len(self.patterns)]

    def check_fit(self, grid: TokenGrid) -> None:
        for pattern in self.patterns:
            pattern.check_fit(grid)

    @classmethod
    def from_splits(cls, splits: list[tuple[int, int, int]], name: str = "custom", source: str = "") -> Schedule:
        """A schedule with both branches from plain (n_t, n_h, n_w) triples."""
        return cls(name, tuple(WindowPattern(Splits(*triple)) for triple in splits), source)
