"""What detection found: attention sites, declined calls with reasons, and the model's plain counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from t3compile.geometry import TokenGrid

Reason = Literal[
    "cross-attention",
    "already-windowed",
    "causal",
    "masked",
    "dropout",
    "grouped-query",
    "no-grid",
    "unknown-layout",
    "grid-mismatch",
    "other-tokens",
    "text-queries",
    "two-grids",
]

# Reasons under which a call can never be full self-attention over the grid: leaving it dense loses nothing.
NOT_A_CANDIDATE: frozenset[Reason] = frozenset(
    {"cross-attention", "already-windowed", "other-tokens", "text-queries"}
)

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class GridAxis:
    """Where one axis of the token grid comes from: an axis of a model input, cut into patches."""

    input_name: str
    axis: int
    patch: int


@dataclass(frozen=True)
class AttentionSite:
    """One full self-attention call over the token grid; q, k, v are [B, N, S, D] with S = prefix + grid + suffix."""

    node: str
    module: str
    stack: str
    index: int
    grid: TokenGrid
    prefix: int
    suffix: int
    batch: int
    heads: int
    head_dim: int
    value_dim: int
    dtype: str
    scale: float | None = None
    query_prefix: int | None = None
    query_suffix: int | None = None
    order: str = "thw"
    masked: bool = False
    axes: tuple[GridAxis, ...] = ()

    @property
    def extra_tokens(self) -> int:
        """Prefix and suffix tokens: they stay global."""
        return self.prefix + self.suffix

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid.tokens + self.suffix

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "grid": list(self.grid.sizes)}


@dataclass(frozen=True)
class Declined:
    """One attention call that is left as it is, and why."""

    node: str
    module: str
    reason: Reason
    detail: str
    batch: int
    heads: int
    query_tokens: int
    key_tokens: int
    head_dim: int
    value_dim: int

    @property
    def is_candidate(self) -> bool:
        """Whether it might have been full self-attention over the grid, so that leaving it dense loses speed."""
        return self.reason not in NOT_A_CANDIDATE

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ModelCounts:
    """Counts of the whole graph outside attention calls: MACs, parameters, bytes."""

    parameters: int
    weight_bytes: int
    other_macs: int
    peak_activation_bytes: int
    nodes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SiteSurvey:
    """Every attention call of a graph, found or declined, with the counts that cost needs."""

    fingerprint: str
    found: tuple[AttentionSite, ...]
    declined: tuple[Declined, ...]
    counts: ModelCounts
    assumptions: tuple[str, ...] = ()

    @property
    def grid_axes(self) -> tuple[GridAxis, ...]:
        """The input axes that make the grids of all found sites."""
        return tuple(dict.fromkeys(axis for site in self.found for axis in site.axes))

    @property
    def grids(self) -> tuple[TokenGrid, ...]:
        """The different grids among the found sites, in order of appearance."""
        return tuple(dict.fromkeys(site.grid for site in self.found))

    def site(self, node: str) -> AttentionSite | None:
        return next((site for site in self.found if site.node == node), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "found": [site.to_json() for site in self.found],
            "declined": [call.to_json() for call in self.declined],
            "counts": self.counts.to_json(),
            "assumptions": list(self.assumptions),
        }


def reasons_count(declined: tuple[Declined, ...]) -> Mapping[Reason, int]:
    """How many calls were declined for each reason."""
    counts: dict[Reason, int] = {}
    for call in declined:
        counts[call.reason] = counts.get(call.reason, 0) + 1
    return counts
