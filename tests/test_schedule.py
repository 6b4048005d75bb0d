"""Generated schedules keep the rules, and mixing is what brute-force reachability says."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from t3compile.errors import PatternError
from t3compile.geometry import Splits, TokenGrid, dilated_part, local_part
from t3compile.pattern import Schedule, WindowPattern
from t3compile.presets import PRESETS, Preset
from t3compile.schedule import LAUNCH_LIMIT, cycle_mixes, generate_schedule, mixes_within

LISTED = [
    (21, 30, 52),
    (21, 45, 80),
    (21, 68, 120),
    (21, 136, 240),
    (31, 22, 40),
    (33, 45, 80),
    (13, 30, 45),
    (11, 48, 85),
    (16, 22, 38),
    (28, 30, 53),
    (16, 44, 80),
    (1, 64, 64),
    (1, 128, 128),
]
# Tiny time, primes and thin images: odd, but no rule has to give way except the order of the presets.
ODD = [
    (2, 60, 104),
    (3, 60, 104),
    (61, 1, 80),
    (61, 136, 240),
    (97, 101, 103),
    (1, 67, 61),
    (1, 1, 5000),
    (1, 5000, 1),
    (1, 4001, 1),
    (7, 11, 64),
    (1000, 2, 2),
]
# Whole time alone is too long for a window, or windows of 2,200 tokens cannot mix.
EXTREME = [(5000, 1, 1), (4001, 1, 1), (2000, 30, 30), (129, 272, 480)]
LAWS = {"local": local_part, "dilated": dilated_part}

grids = pytest.mark.parametrize("grid", [TokenGrid(*g) for g in LISTED + ODD], ids=str)
all_grids = pytest.mark.parametrize("grid", [TokenGrid(*g) for g in LISTED + ODD + EXTREME], ids=str)
generated = cache(generate_schedule)


@all_grids
def test_first_pattern_is_frame_wise_and_the_cycle_has_five(grid: TokenGrid) -> None:
    schedule = generated(grid)
    assert schedule.name == "auto"
    assert len(schedule.patterns) == 5
    assert schedule.patterns[0] == WindowPattern(Splits(grid.t, 1, 1))
    schedule.check_fit(grid)


@all_grids
def test_any_three_layers_mix(grid: TokenGrid) -> None:
    assert cycle_mixes(grid, generated(grid))


@all_grids
def test_no_pattern_comes_twice(grid: TokenGrid) -> None:
    assert len(set(generated(grid).patterns)) == 5


@grids
def test_windows_keep_the_bounds(grid: TokenGrid) -> None:
    sizes = [pattern.largest_window_tokens(grid) for pattern in generated(grid).patterns[1:]]
    assert min(sizes) >= 500
    assert max(sizes) <= 2200


@grids
def test_two_patterns_hold_whole_time_and_two_split_it(grid: TokenGrid) -> None:
    counts = sorted(pattern.splits.t for pattern in generated(grid).patterns[1:])
    if grid.t == 1:
        assert counts == [1, 1, 1, 1]
    else:
        assert counts[:2] == [1, 1]
        assert min(counts[2:]) > 1


@grids
def test_sizes_and_aspects_are_mixed(grid: TokenGrid) -> None:
    windows = [pattern.splits.largest_window(grid) for pattern in generated(grid).patterns[1:]]
    assert len({window.tokens for window in windows}) >= 3
    assert max(window.tokens for window in windows) >= 1.4 * min(window.tokens for window in windows)
    if min(grid.h, grid.w) > 2:
        same_aspect = [a.h * b.w == a.w * b.h for a, b in combinations(windows, 2)]
        assert sum(same_aspect) <= 1


@pytest.mark.parametrize("sizes", LISTED, ids=str)
def test_axes_with_good_divisors_are_cut_evenly(sizes: tuple[int, int, int]) -> None:
    """Axes with a divisor at hand near every ideal; 38 = 2*19, 53 and the prime T have none."""
    grid = TokenGrid(*sizes)
    for pattern in generated(grid).patterns:
        for length, count in zip(grid.sizes, pattern.splits.counts, strict=True):
            if length not in (11, 13, 31, 38, 53):
                assert length % count == 0


@pytest.mark.parametrize(("sizes", "multiples"), [((1, 128, 128), 4), ((16, 44, 80), 3)])
def test_multiples_of_64_are_preferred(sizes: tuple[int, int, int], multiples: int) -> None:
    """Without the preference 16x44x80 has two."""
    grid = TokenGrid(*sizes)
    windows = [pattern.largest_window_tokens(grid) for pattern in generated(grid).patterns[1:]]
    assert sum(tokens % 64 == 0 for tokens in windows) == multiples


@pytest.mark.parametrize("grid", [TokenGrid(*g) for g in EXTREME], ids=str)
def test_extreme_grids_still_gain(grid: TokenGrid) -> None:
    """Full attention is not the way out."""
    patterns = generated(grid).patterns
    assert not any(pattern.is_full() for pattern in patterns)
    assert sum(pattern.pairs(grid) for pattern in patterns) * 3 / 2 < 5 * grid.tokens**2


@pytest.mark.parametrize(
    ("sizes", "heads", "batch"),
    [
        ((21, 136, 240), 12, 2),
        ((61, 136, 240), 40, 1),
        ((129, 272, 480), 12, 1),
        ((129, 272, 480), 40, 2),
        ((5000, 1, 1), 40, 1),
    ],
)
def test_launch_limit_holds(sizes: tuple[int, int, int], heads: int, batch: int) -> None:
    grid = TokenGrid(*sizes)
    schedule = generated(grid, heads=heads, batch=batch)
    for pattern in schedule.patterns:
        assert pattern.launched_windows(grid) * heads * batch < LAUNCH_LIMIT
    assert cycle_mixes(grid, schedule)


def test_more_heads_than_can_be_launched_leave_every_layer_full() -> None:
    schedule = generate_schedule(TokenGrid(21, 30, 52), heads=LAUNCH_LIMIT)
    assert all(pattern.is_full() for pattern in schedule.patterns)


def test_time_of_two_needs_the_alternating_order() -> None:
    """(2,..) after (2,..) never mixes time with the frame-wise layer, so whole time stands between them."""
    counts = [pattern.splits.t for pattern in generated(TokenGrid(2, 60, 104)).patterns]
    assert counts == [2, 1, 2, 1, 2]


@given(st.tuples(st.integers(1, 24), st.integers(1, 40), st.integers(1, 40)))
@settings(max_examples=40, deadline=None)
def test_any_grid_gets_a_schedule_that_mixes(sizes: tuple[int, int, int]) -> None:
    grid = TokenGrid(*sizes)
    assume(grid.tokens >= 4000)
    schedule = generate_schedule(grid)
    assert schedule.patterns[0].splits.counts == (grid.t, 1, 1)
    assert cycle_mixes(grid, schedule)
    assert all(pattern.largest_window_tokens(grid) >= 500 for pattern in schedule.patterns[1:])


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 7, 9), (5, 10, 10)])
def test_grids_too_short_to_gain_do_not_crash(sizes: tuple[int, int, int]) -> None:
    grid = TokenGrid(*sizes)
    assert cycle_mixes(grid, generate_schedule(grid))


@pytest.mark.parametrize("sizes", [(13, 30, 45), (28, 30, 53), (1, 64, 64)])
def test_same_grid_same_schedule(sizes: tuple[int, int, int]) -> None:
    """Also when the caches hold the work of other grids."""
    once = generate_schedule(TokenGrid(*sizes))
    generate_schedule(TokenGrid(21, 30, 52))
    assert generate_schedule(TokenGrid(*sizes)) == once


def test_schedule_of_a_grid_is_pinned() -> None:
    """A plan made yesterday is made again today: a change here changes users' models."""
    counts = [pattern.splits.counts for pattern in generated(TokenGrid(21, 45, 80)).patterns]
    assert counts == [(21, 1, 1), (1, 9, 16), (1, 3, 16), (3, 5, 4), (7, 3, 4)]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_mix_within_three_layers_but_not_two(preset: Preset) -> None:
    assert cycle_mixes(preset.grid, preset.schedule, span=3)
    assert not cycle_mixes(preset.grid, preset.schedule, span=2)


def reaches_everything(grid: TokenGrid, patterns: list[WindowPattern]) -> bool:
    """Tokens as nodes: the union of the branches' masks of each layer, multiplied."""
    reached = np.eye(grid.tokens, dtype=np.int64)
    for pattern in patterns:
        layer = np.zeros_like(reached)
        for branch in pattern.branches:
            window = np.array(
                [
                    [LAWS[branch](i, n, k) for i, n, k in zip(token, grid.sizes, pattern.splits.counts, strict=True)]
                    for token in grid.coordinates()
                ]
            )
            layer |= (window[:, None] == window[None]).all(-1)
        reached = (reached @ layer > 0).astype(np.int64)
    return bool(reached.all())


@st.composite
def layers_on_grids(draw: st.DrawFn) -> tuple[TokenGrid, list[WindowPattern]]:
    sizes = [draw(st.integers(1, 6)) for _ in range(3)]
    branches = st.sampled_from([("local", "dilated"), ("local", "dilated"), ("local",), ("dilated",)])
    splits = st.builds(Splits, *[st.integers(1, size) for size in sizes])
    patterns = st.lists(st.builds(WindowPattern, splits, branches), min_size=1, max_size=4)
    return TokenGrid(*sizes), draw(patterns)


@given(layers_on_grids())
@settings(max_examples=400, deadline=None)
def test_mixing_is_reachability(case: tuple[TokenGrid, list[WindowPattern]]) -> None:
    grid, patterns = case
    assert mixes_within(grid, patterns) == reaches_everything(grid, patterns)


@st.composite
def branchings_on_planes(draw: st.DrawFn) -> tuple[TokenGrid, list[WindowPattern]]:
    """Two uneven axes and three layers of both branches: where no single sequence may be enough."""
    h, w = draw(st.integers(6, 14)), draw(st.integers(6, 14))
    splits = st.builds(Splits, st.just(1), st.integers(2, h - 1), st.integers(2, w - 1))
    return TokenGrid(1, h, w), [WindowPattern(draw(splits)) for _ in range(3)]


@given(branchings_on_planes())
@settings(max_examples=300, deadline=None)
def test_mixing_is_reachability_where_branches_must_combine(case: tuple[TokenGrid, list[WindowPattern]]) -> None:
    grid, patterns = case
    assert mixes_within(grid, patterns) == reaches_everything(grid, patterns)


def test_axes_share_the_sequence_of_branches() -> None:
    """Rows mix and columns mix, but some pairs of them by different sequences: then the plane does not."""
    assert mixes_within(TokenGrid(1, 3, 1), [WindowPattern(Splits(1, 2, 1))] * 2)
    assert mixes_within(TokenGrid(1, 1, 3), [WindowPattern(Splits(1, 1, 2))] * 2)
    assert not mixes_within(TokenGrid(1, 3, 3), [WindowPattern(Splits(1, 2, 2))] * 2)


def test_mixing_needs_the_dilated_branch() -> None:
    grid, splits = TokenGrid(4, 4, 4), Splits(2, 2, 2)
    assert not mixes_within(grid, [WindowPattern(splits, ("local",))] * 3)
    assert mixes_within(grid, [WindowPattern(splits)] * 3)


def test_no_layers_mix_one_token_only() -> None:
    assert mixes_within(TokenGrid(1, 1, 1), [])
    assert not mixes_within(TokenGrid(1, 1, 2), [])


def test_cycle_is_tested_from_every_offset() -> None:
    """The first three layers mix, the three that start at the second do not."""
    full, none = (1, 1, 1), (1, 4, 4)
    schedule = Schedule.from_splits([full, none, none, none])
    grid = TokenGrid(1, 4, 4)
    assert mixes_within(grid, schedule.patterns[:3])
    assert not cycle_mixes(grid, schedule)
    assert cycle_mixes(grid, schedule, span=4)


def test_pattern_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PatternError, match="axis h"):
        mixes_within(TokenGrid(1, 2, 8), [WindowPattern(Splits(1, 3, 1))])
