"""Costs: MACs of the published presets, and brute force over the masks' pairs on small grids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t3compile.cost import attention_macs, declined_macs, joint_pairs, plan_cost
from t3compile.errors import PlanError
from t3compile.geometry import Splits, TokenGrid, dilated_part, local_part
from t3compile.pattern import WindowPattern
from t3compile.plan import make_plan
from t3compile.presets import preset_named
from t3compile.sites import AttentionSite, Declined, ModelCounts, SiteSurvey

LAWS = {"local": local_part, "dilated": dilated_part}
COUNTS = ModelCounts(parameters=10, weight_bytes=20, other_macs=1000, peak_activation_bytes=30, nodes=5)
CROSS = Declined("cross", "blocks.0", "cross-attention", "text", 2, 3, 60, 7, 4, 5)


def site(index: int, grid: TokenGrid, **fields: Any) -> AttentionSite:
    given = {"prefix": 0, "suffix": 0, "batch": 1, "heads": 1, "head_dim": 4, "value_dim": 4, "dtype": "float32"}
    return AttentionSite(f"sdpa_{index}", f"b.{index}", "b.*", index, grid, **(given | fields))


@pytest.mark.parametrize(
    ("name", "heads", "paper_factor", "factor", "tera_macs"),
    [
        ("t3-wan2.1-4k", 12, 43.0, 72.8, (43_299, 1006.8, 594.5)),
        ("t3-wan2.2-4k", 24, 35.5, 53.7, None),
    ],
)
def test_presets_cost_what_the_paper_says(
    name: str, heads: int, paper_factor: float, factor: float, tera_macs: tuple[float, float, float] | None
) -> None:
    preset = preset_named(name)
    sites = [site(i, preset.grid, heads=heads, head_dim=128, value_dim=128, dtype="bfloat16") for i in range(30)]
    survey = SiteSurvey("f", tuple(sites), (), COUNTS)
    cost = plan_cost(survey, make_plan(survey, name))
    assert round(cost.paper_factor, 1) == paper_factor
    assert round(cost.attention_factor, 1) == factor
    if tera_macs is not None:
        dense, paper, planned = tera_macs
        assert round(cost.dense_attention_macs / 1e12) == dense
        assert round(cost.paper_attention_macs / 1e12, 1) == paper
        assert round(cost.planned_attention_macs / 1e12, 1) == planned
        # The first of five patterns holds this share of the cost as the paper counts.
        assert round(sum(s.paper_macs for s in cost.sites[::5]) / cost.paper_attention_macs, 2) == 0.82


@st.composite
def joint_cases(draw: st.DrawFn) -> tuple[TokenGrid, WindowPattern, int, int]:
    sizes = [draw(st.integers(1, 4)) for _ in range(3)]
    counts = [draw(st.integers(1, size)) for size in sizes]
    branches = draw(st.sampled_from([("local",), ("dilated",), ("local", "dilated")]))
    return TokenGrid(*sizes), WindowPattern(Splits(*counts), branches), draw(st.integers(0, 4)), draw(st.integers(0, 3))


def visible_pairs(grid: TokenGrid, pattern: WindowPattern, branch: Any) -> set[tuple[int, int]]:
    """Pairs of grid tokens in one window."""
    law, counts = LAWS[branch], pattern.splits.counts
    windows = [
        tuple(law(i, n, parts) for i, n, parts in zip(t, grid.sizes, counts, strict=True)) for t in grid.coordinates()
    ]
    return {(q, k) for q, a in enumerate(windows) for k, b in enumerate(windows) if a == b}


@given(joint_cases())
@settings(deadline=None)
def test_macs_are_counted_pair_by_pair(case: tuple[TokenGrid, WindowPattern, int, int]) -> None:
    """Grid queries see window and extra keys in each different branch; extra queries see everything, once."""
    grid, pattern, prefix, suffix = case
    extra = prefix + suffix
    tokens = grid.tokens + extra
    every = [visible_pairs(grid, pattern, branch) for branch in pattern.branches]
    different = [pairs for i, pairs in enumerate(every) if pairs not in every[:i]]
    for merged, branches in ((True, different), (False, every)):
        grid_rows = sum(len(pairs) + grid.tokens * extra for pairs in branches)
        expected = grid_rows + extra * tokens
        assert joint_pairs(grid, extra, pattern, merged=merged) == expected
        at = site(0, grid, prefix=prefix, suffix=suffix, batch=2, heads=3, head_dim=4, value_dim=5)
        # q k^T takes D, and p v takes Dv multiplications a pair
        assert attention_macs(at, pattern, merged=merged) == 2 * 3 * expected * (4 + 5)
    assert joint_pairs(grid, extra, None) == tokens**2


@given(joint_cases(), st.integers(0, 5))
def test_queries_of_their_own_are_counted(case: tuple[TokenGrid, WindowPattern, int, int], queries: int) -> None:
    """Grid queries as before; every query outside the grid sees every key."""
    grid, pattern, prefix, suffix = case
    keys = grid.tokens + prefix + suffix
    grid_rows = joint_pairs(grid, prefix + suffix, pattern) - (prefix + suffix) * keys
    at = site(0, grid, prefix=prefix, suffix=suffix, query_prefix=queries, query_suffix=1, head_dim=4, value_dim=5)
    assert attention_macs(at, pattern) == (grid_rows + (queries + 1) * keys) * 9
    assert attention_macs(at, None) == (grid.tokens + queries + 1) * keys * 9


@given(st.tuples(*[st.integers(1, 9)] * 3), st.integers(0, 9))
def test_one_window_costs_what_full_attention_costs(sizes: tuple[int, int, int], prefix: int) -> None:
    at = site(0, TokenGrid(*sizes), prefix=prefix)
    assert attention_macs(at, WindowPattern(Splits(1, 1, 1))) == attention_macs(at, None)


def test_model_is_the_sum_of_its_parts() -> None:
    grid = TokenGrid(3, 4, 5)
    survey = SiteSurvey("f", (site(0, grid), site(1, grid, dtype="bfloat16", batch=2, heads=3)), (CROSS,), COUNTS)
    plan = make_plan(survey, [(3, 1, 1)])
    plan = replace(plan, sites=(plan.sites[0], replace(plan.sites[1], pattern=None)))
    cost = plan_cost(survey, plan)
    windowed, full = cost.sites
    assert (windowed.dense_macs, windowed.planned_macs) == (60 * 60 * 8, 3 * 20 * 20 * 8)
    assert windowed.paper_macs == 2 * windowed.planned_macs
    assert (windowed.pattern, full.pattern) == ("(3,1,1)", "full")
    assert full.dense_macs == full.planned_macs == full.paper_macs == 6 * 60 * 60 * 8
    # q, k, v and output; scores of every head
    assert (windowed.qkvo_bytes, full.qkvo_bytes) == (4 * 60 * 4 * 4, 4 * 6 * 60 * 4 * 2)
    assert (windowed.dense_score_bytes, windowed.planned_score_bytes) == (3600 * 4, 1200 * 4)
    assert full.planned_score_bytes == 3600 * 6 * 2
    cross = 2 * 3 * 60 * 7 * (4 + 5)
    assert cost.declined_macs == declined_macs(CROSS) == cross
    assert cost.dense_macs == windowed.dense_macs + full.dense_macs + cross + 1000
    assert cost.planned_macs == windowed.planned_macs + full.planned_macs + cross + 1000
    assert cost.model_factor == cost.dense_macs / cost.planned_macs
    assert (cost.parameters, cost.weight_bytes, cost.peak_activation_bytes) == (10, 20, 30)
    data = cost.to_json()
    assert data["attention_factor"] == cost.attention_factor
    assert [s["node"] for s in data["sites"]] == ["sdpa_0", "sdpa_1"]


def test_model_without_sites_gains_nothing() -> None:
    survey = SiteSurvey("f", (), (CROSS,), COUNTS)
    cost = plan_cost(survey, make_plan(survey))
    assert (cost.attention_factor, cost.paper_factor, cost.model_factor) == (1.0, 1.0, 1.0)


def test_cost_of_a_plan_for_another_graph_is_refused() -> None:
    survey = SiteSurvey("f", (site(0, TokenGrid(3, 4, 5)),), (), COUNTS)
    with pytest.raises(PlanError, match="another graph"):
        plan_cost(replace(survey, fingerprint="g"), make_plan(survey))
