"""The two index laws against brute force and numpy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t3compile.errors import GridError, PatternError
from t3compile.geometry import (
    Splits,
    TokenGrid,
    Window,
    dilated_part,
    local_part,
    part_runs,
    part_size,
    partitions_coincide,
    square_sum,
)

PartLaw = Callable[[int, int, int], int]


@st.composite
def cut_axes(draw: st.DrawFn) -> tuple[int, int]:
    length = draw(st.integers(1, 60))
    return length, draw(st.integers(1, length))


@st.composite
def cut_grids(draw: st.DrawFn) -> tuple[TokenGrid, Splits]:
    sizes = [draw(st.integers(1, 7)) for _ in range(3)]
    counts = [draw(st.integers(1, size)) for size in sizes]
    return TokenGrid(*sizes), Splits(*counts)


def windows_of(grid: TokenGrid, splits: Splits, part_of: PartLaw) -> list[frozenset[int]]:
    """The windows as sets of sequence indices."""
    windows: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, token in enumerate(grid.coordinates()):
        axes = zip(token, grid.sizes, splits.counts, strict=True)
        windows[tuple(part_of(i, length, n) for i, length, n in axes)].append(index)
    return [frozenset(members) for members in windows.values()]


@pytest.mark.parametrize("part_of", [local_part, dilated_part])
@given(cut=cut_grids())
def test_every_token_is_in_exactly_one_window(part_of: PartLaw, cut: tuple[TokenGrid, Splits]) -> None:
    grid, splits = cut
    windows = windows_of(grid, splits, part_of)
    assert len(windows) == splits.windows
    assert sum(len(window) for window in windows) == grid.tokens
    assert frozenset().union(*windows) == frozenset(range(grid.tokens))


@pytest.mark.parametrize("part_of", [local_part, dilated_part])
@given(cut=cut_grids())
def test_largest_window_is_the_largest_of_either_branch(part_of: PartLaw, cut: tuple[TokenGrid, Splits]) -> None:
    grid, splits = cut
    sizes = {len(window) for window in windows_of(grid, splits, part_of)}
    assert max(sizes) == splits.largest_window(grid).tokens
    assert (len(sizes) == 1) == splits.divide(grid)


@given(cut=cut_axes())
def test_local_parts_are_those_of_array_split(cut: tuple[int, int]) -> None:
    length, parts = cut
    expected = [chunk.tolist() for chunk in np.array_split(np.arange(length), parts)]
    got: list[list[int]] = [[] for _ in range(parts)]
    for i in range(length):
        got[local_part(i, length, parts)].append(i)
    assert got == expected


@given(cut=cut_axes())
def test_dilated_parts_are_strides(cut: tuple[int, int]) -> None:
    length, parts = cut
    for i in range(length):
        assert i in range(dilated_part(i, length, parts), length, parts)


@pytest.mark.parametrize("part_of", [local_part, dilated_part])
@given(cut=cut_axes())
def test_part_size_holds_for_both_branches(part_of: PartLaw, cut: tuple[int, int]) -> None:
    length, parts = cut
    members = [part_of(i, length, parts) for i in range(length)]
    assert [part_size(part, length, parts) for part in range(parts)] == [members.count(part) for part in range(parts)]


@given(cut=cut_axes())
def test_part_runs_list_all_parts_in_order(cut: tuple[int, int]) -> None:
    length, parts = cut
    runs = part_runs(length, parts)
    listed = [(run.first_part + k, run.size) for run in runs for k in range(run.parts)]
    assert listed == [(part, part_size(part, length, parts)) for part in range(parts)]
    assert len({run.size for run in runs}) == len(runs) == (1 if length % parts == 0 else 2)


@given(cut=cut_axes())
def test_square_sum_counts_pairs(cut: tuple[int, int]) -> None:
    length, parts = cut
    members = [local_part(i, length, parts) for i in range(length)]
    assert square_sum(length, parts) == sum(a == b for a in members for b in members)


@given(cut=cut_grids())
def test_partitions_coincide_exactly_when_the_windows_are_the_same(cut: tuple[TokenGrid, Splits]) -> None:
    grid, splits = cut
    same = set(windows_of(grid, splits, local_part)) == set(windows_of(grid, splits, dilated_part))
    assert partitions_coincide(grid, splits) == same


def test_dilated_windows_on_a_small_grid() -> None:
    windows = windows_of(TokenGrid(1, 2, 4), Splits(1, 1, 2), dilated_part)
    assert set(windows) == {frozenset({0, 2, 4, 6}), frozenset({1, 3, 5, 7})}


@given(st.tuples(*[st.integers(1, 9)] * 3))
def test_index_is_the_place_in_the_sequence(sizes: tuple[int, int, int]) -> None:
    grid = TokenGrid(*sizes)
    assert [grid.index(*token) for token in grid.coordinates()] == list(range(grid.tokens))


@given(st.tuples(*[st.integers(1, 10_000)] * 3), st.sampled_from(["x", "×", ",", " x "]))
def test_grid_text_round_trip(sizes: tuple[int, int, int], separator: str) -> None:
    assert TokenGrid.parse(separator.join(map(str, sizes))) == TokenGrid(*sizes)
    assert TokenGrid.parse(str(TokenGrid(*sizes))) == TokenGrid(*sizes)


@pytest.mark.parametrize("text", ["", "21x30", "21x30x52x1", "21x30x-52", "21x30x5.2", "axbxc", "21 30 52"])
def test_malformed_grid_text_is_named_with_the_form(text: str) -> None:
    with pytest.raises(GridError, match="TxHxW") as caught:
        TokenGrid.parse(text)
    assert f"'{text}'" in str(caught.value)


def test_zero_in_a_grid_names_the_axis() -> None:
    with pytest.raises(GridError, match="h is 0"):
        TokenGrid.parse("21x0x52")


@pytest.mark.parametrize("bad", [0, -1, 1.0, True, "2", None])
def test_sizes_and_counts_must_be_positive_whole_numbers(bad: object) -> None:
    with pytest.raises(GridError, match="w is"):
        TokenGrid(1, 1, bad)  # type: ignore[arg-type]
    with pytest.raises(PatternError, match="t is"):
        Splits(bad, 1, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(("counts", "axis"), [((3, 1, 1), "t"), ((1, 4, 1), "h"), ((1, 1, 5), "w")])
def test_more_windows_than_tokens_do_not_fit(counts: tuple[int, int, int], axis: str) -> None:
    grid = TokenGrid(2, 3, 4)
    with pytest.raises(PatternError, match=f"axis {axis} has"):
        Splits(*counts).check_fit(grid)
    Splits(*grid.sizes).check_fit(grid)


def test_largest_window_of_a_published_pattern() -> None:
    assert Splits(3, 17, 8).largest_window(TokenGrid(21, 136, 240)) == Window(7, 8, 30)
