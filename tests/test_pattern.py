"""Patterns and schedules: their JSON, their costs, and the published presets."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t3compile.errors import PatternError
from t3compile.geometry import Splits, TokenGrid, dilated_part, local_part
from t3compile.pattern import BRANCHES, Branch, Schedule, WindowPattern, pattern_from_json
from t3compile.presets import PRESETS, Preset, preset_for, preset_named

LAYERS = 30
LAWS = {"local": local_part, "dilated": dilated_part}
branch_tuples = st.sampled_from([("local",), ("dilated",), ("local", "dilated"), ("dilated", "local")])


@st.composite
def patterns_on_grids(draw: st.DrawFn) -> tuple[TokenGrid, WindowPattern]:
    sizes = [draw(st.integers(1, 4)) for _ in range(3)]
    counts = [draw(st.integers(1, size)) for size in sizes]
    return TokenGrid(*sizes), WindowPattern(Splits(*counts), draw(branch_tuples))


def pairs_of_branch(grid: TokenGrid, splits: Splits, branch: Branch) -> frozenset[tuple[int, int]]:
    windows = [
        tuple(LAWS[branch](i, length, n) for i, length, n in zip(token, grid.sizes, splits.counts, strict=True))
        for token in grid.coordinates()
    ]
    return frozenset((q, k) for q, a in enumerate(windows) for k, b in enumerate(windows) if a == b)


@given(st.tuples(*[st.integers(1, 500)] * 3), branch_tuples)
def test_json_round_trip(counts: tuple[int, int, int], branches: tuple[Branch, ...]) -> None:
    pattern = WindowPattern(Splits(*counts), branches)
    data = pattern.to_json()
    assert data["kind"] == "t3-window"
    assert pattern_from_json(json.loads(json.dumps(data))) == pattern


def test_branches_default_to_both() -> None:
    assert pattern_from_json({"kind": "t3-window", "splits": [1, 2, 3]}).branches == BRANCHES


def test_order_of_branches_does_not_make_another_pattern() -> None:
    splits = Splits(1, 2, 3)
    assert WindowPattern(splits, ("dilated", "local")) == WindowPattern(splits, ("local", "dilated"))
    assert WindowPattern(splits, ("dilated",)) != WindowPattern(splits, ("local",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "bands"}, "'bands' is unknown"),
        ({"kind": None}, "kind None"),
        ({"window": [1, 1, 1]}, r"unknown keys \['window'\]"),
        ({"splits": [1, 2]}, "three whole numbers"),
        ({"splits": "1,2,3"}, "three whole numbers"),
        ({"splits": [1, 2, 0]}, "w is 0"),
        ({"splits": [1, 2.0, 3]}, "h is 2.0"),
        ({"splits": [True, 2, 3]}, "t is True"),
        ({"branches": "local"}, "expected a list"),
        ({"branches": [["local"]]}, "expected a list of local, dilated"),
        ({"branches": []}, "one or two different names"),
        ({"branches": ["local", "local"]}, "one or two different names"),
        ({"branches": ["close"]}, "'close' is unknown"),
    ],
)
def test_bad_json_says_what_is_wrong(change: dict[str, object], message: str) -> None:
    data = {"kind": "t3-window", "splits": [1, 2, 3], "branches": ["local"], **change}
    with pytest.raises(PatternError, match=message):
        pattern_from_json(data)


@pytest.mark.parametrize("data", [None, [1, 2, 3], "t3-window", 7])
def test_json_that_is_no_object(data: object) -> None:
    with pytest.raises(PatternError, match="expected an object"):
        pattern_from_json(data)


@given(patterns_on_grids())
def test_pairs_and_computed_branches_match_brute_force(case: tuple[TokenGrid, WindowPattern]) -> None:
    grid, pattern = case
    per_branch = [pairs_of_branch(grid, pattern.splits, branch) for branch in pattern.branches]
    assert pattern.pairs(grid, merged=False) == sum(map(len, per_branch))
    different = list(dict.fromkeys(per_branch))
    assert pattern.pairs(grid) == sum(map(len, different))
    assert pattern.computed_branches(grid) == pattern.branches[: len(different)]
    assert pattern.launched_windows(grid) == len(different) * pattern.splits.windows


def test_is_full_only_for_one_window() -> None:
    assert WindowPattern(Splits(1, 1, 1)).is_full()
    assert not WindowPattern(Splits(1, 1, 2)).is_full()


def test_pattern_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PatternError, match="axis w"):
        Schedule.from_splits([(1, 1, 1), (1, 1, 9)]).check_fit(TokenGrid(2, 2, 8))


def attention_factor(preset: Preset, *, merged: bool) -> float:
    patterns = [preset.schedule.pattern_at(index) for index in range(LAYERS)]
    planned = sum(pattern.pairs(preset.grid, merged=merged) for pattern in patterns)
    return LAYERS * preset.grid.tokens**2 / planned


@pytest.mark.parametrize(
    ("name", "as_published", "merged"), [("t3-wan2.1-4k", 43.0, 72.8), ("t3-wan2.2-4k", 35.5, 53.7)]
)
def test_presets_save_what_the_paper_says(name: str, as_published: float, merged: float) -> None:
    preset = preset_named(name)
    assert round(attention_factor(preset, merged=False), 1) == as_published
    assert round(attention_factor(preset, merged=True), 1) == merged


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_divide_their_grid_and_are_found_by_it(preset: Preset) -> None:
    assert all(pattern.splits.divide(preset.grid) for pattern in preset.schedule.patterns)
    assert preset_for(preset.grid) is preset
    assert preset_for(TokenGrid(preset.grid.t, preset.grid.h, preset.grid.w + 1)) is None


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(PatternError, match=r"'t3-wan3'.*auto, t3-wan2\.1-4k, t3-wan2\.2-4k"):
        preset_named("t3-wan3")


def test_schedule_cycles_over_depth() -> None:
    schedule = Schedule.from_splits([(1, 1, 1), (1, 1, 2), (1, 2, 1)])
    assert [schedule.pattern_at(i).splits.windows for i in range(5)] == [1, 2, 2, 1, 2]
    assert schedule.pattern_at(4) == schedule.patterns[1]


def test_schedule_needs_a_pattern() -> None:
    with pytest.raises(PatternError, match="no patterns"):
        Schedule("empty", ())
