"""What a plan costs: multiply-accumulates (MACs) and bytes, dense and planned, as integers.

MACs of attention are those of QK^T and PV: pairs * (D + Dv) per head and batch element.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from t3compile.geometry import TokenGrid
from t3compile.pattern import WindowPattern
from t3compile.plan import Plan
from t3compile.sites import AttentionSite, Declined, SiteSurvey


def joint_pairs(
    grid: TokenGrid,
    extra: int,
    pattern: WindowPattern | None,
    *,
    extra_queries: int | None = None,
    merged: bool = True,
) -> int:
    """Query-key pairs of one head: windows among grid tokens, ``extra`` prefix/suffix tokens global.

    ``extra_queries`` are the queries outside the grid, as many as the keys where None.
    """
    tokens = grid.tokens + extra
    extra_queries = extra if extra_queries is None else extra_queries
    if pattern is None:
        return (grid.tokens + extra_queries) * tokens
    branches = pattern.computed_branches(grid) if merged else pattern.branches
    grid_to_extra = len(branches) * grid.tokens * extra
    return pattern.pairs(grid, merged=merged) + grid_to_extra + extra_queries * tokens


def _pairs(site: AttentionSite, pattern: WindowPattern | None, *, merged: bool = True) -> int:
    return joint_pairs(site.grid, site.extra_tokens, pattern, extra_queries=site.extra_queries, merged=merged)


def attention_macs(site: AttentionSite, pattern: WindowPattern | None, *, merged: bool = True) -> int:
    """MACs of one site (pattern None: dense); ``merged=False`` counts coinciding branches twice, as the paper."""
    per_head = _pairs(site, pattern, merged=merged) * (site.head_dim + site.value_dim)
    return site.batch * site.heads * per_head


def declined_macs(call: Declined) -> int:
    """MACs of an attention call that stays as it is."""
    pairs = call.query_tokens * call.key_tokens
    return call.batch * call.heads * pairs * (call.head_dim + call.value_dim)


@dataclass(frozen=True)
class SiteCost:
    """MACs and bytes of one site; `score_bytes` is what a runtime needs that writes all scores to memory."""

    node: str
    pattern: str
    dense_macs: int
    planned_macs: int
    paper_macs: int
    qkvo_bytes: int
    dense_score_bytes: int
    planned_score_bytes: int


@dataclass(frozen=True)
class Cost:
    """MACs and bytes of a model under a plan."""

    sites: tuple[SiteCost, ...]
    declined_macs: int
    other_macs: int
    weight_bytes: int
    parameters: int
    peak_activation_bytes: int

    @property
    def dense_attention_macs(self) -> int:
        return sum(site.dense_macs for site in self.sites)

    @property
    def planned_attention_macs(self) -> int:
        return sum(site.planned_macs for site in self.sites)

    @property
    def paper_attention_macs(self) -> int:
        return sum(site.paper_macs for site in self.sites)

    @property
    def dense_macs(self) -> int:
        return self.dense_attention_macs + self.declined_macs + self.other_macs

    @property
    def planned_macs(self) -> int:
        return self.planned_attention_macs + self.declined_macs + self.other_macs

    @property
    def attention_factor(self) -> float:
        """Dense over planned attention MACs of the found sites; 1.0 where there are none."""
        return _ratio(self.dense_attention_macs, self.planned_attention_macs)

    @property
    def paper_factor(self) -> float:
        """The same factor with coinciding branches counted twice, as the paper counts."""
        return _ratio(self.dense_attention_macs, self.paper_attention_macs)

    @property
    def model_factor(self) -> float:
        """Dense over planned MACs of the whole model."""
        return _ratio(self.dense_macs, self.planned_macs)

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "dense_attention_macs": self.dense_attention_macs,
            "planned_attention_macs": self.planned_attention_macs,
            "paper_attention_macs": self.paper_attention_macs,
            "dense_macs": self.dense_macs,
            "planned_macs": self.planned_macs,
            "attention_factor": self.attention_factor,
            "paper_factor": self.paper_factor,
            "model_factor": self.model_factor,
        }


def _ratio(before: int, after: int) -> float:
    return before / after if after else 1.0


def _site_cost(site: AttentionSite, pattern: WindowPattern | None) -> SiteCost:
    per_pair = site.batch * site.heads * site.item_bytes
    rows = site.query_tokens + site.tokens
    qkvo = site.batch * site.heads * rows * (site.head_dim + site.value_dim)
    return SiteCost(
        node=site.node,
        pattern="full" if pattern is None else str(pattern),
        dense_macs=attention_macs(site, None),
        planned_macs=attention_macs(site, pattern),
        paper_macs=attention_macs(site, pattern, merged=False),
        qkvo_bytes=qkvo * site.item_bytes,
        dense_score_bytes=_pairs(site, None) * per_pair,
        planned_score_bytes=_pairs(site, pattern) * per_pair,
    )


def plan_cost(survey: SiteSurvey, plan: Plan) -> Cost:
    """Cost of every found site and of the whole model, dense and under the plan."""
    plan.check_against(survey)
    patterns = {planned.node: planned.pattern for planned in plan.sites}
    return Cost(
        sites=tuple(_site_cost(site, patterns[site.node]) for site in survey.found),
        declined_macs=sum(declined_macs(call) for call in survey.declined),
        other_macs=survey.counts.other_macs,
        weight_bytes=survey.counts.weight_bytes,
        parameters=survey.counts.parameters,
        peak_activation_bytes=survey.counts.peak_activation_bytes,
    )
