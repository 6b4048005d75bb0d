"""The token grid that a table of positions spells out: coordinates, or rotary or sine tables made from them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Tables are made in float32, so that the same coordinate may differ by a rounding step of sine or cosine; columns are
# compared as shares of what they span, and those that hardly vary are left out.
_ROUNDING = 1e-7
_TOLERANCE = 1e-4
# Wide tables repeat each axis in many columns.
_MOST_COLUMNS = 64


# Places where a sequence may change from text to a grid.
_MOST_BREAKS = 12


@dataclass(frozen=True)
class Raster:
    """A row-major grid of one to three axes that starts at row ``start`` of a table."""

    start: int
    sizes: tuple[int, ...]


def find_raster(table: Tensor) -> Raster | None:
    """The longest stretch of a table's rows that is a grid; ``table`` is [S, C], see read_raster."""
    whole = read_raster(table)
    if whole is not None:
        return Raster(0, whole) if len(whole) <= 3 else None
    breaks = _breaks(table)
    stretches = sorted(itertools.combinations(breaks, 2), key=lambda ends: (ends[0] - ends[1], ends[0]))
    for start, stop in stretches:
        sizes = read_raster(table[start:stop]) if stop - start < table.shape[0] else None
        if sizes is not None and len(sizes) <= 3:
            return Raster(start, sizes)
    return None


def _breaks(table: Tensor) -> list[int]:
    """Rows that follow the one before by a step that is rare, the ends included; none where rare steps are many."""
    rows = _real(table)
    steps = (rows[1:] - rows[:-1]).mul(1e5).round()
    _, kind, counts = steps.unique(dim=0, return_inverse=True, return_counts=True)
    rare = (counts[kind] <= 2).nonzero().flatten().add(1).tolist()
    return [] if len(rare) > _MOST_BREAKS else [0, *rare, table.shape[0]]


def read_raster(table: Tensor) -> tuple[int, ...] | None:
    """Axis sizes of a row-major grid, outermost first, or None where the rows are no grid.

    ``table``: [S, C], a row per token. Every column must be a function of at most one grid axis, and every axis
    longer than one must be told apart by some column; so the sizes are proved by the values, not fitted to them. A
    table in which only one axis varies is a plain sequence, no grid. Of wide tables 64 columns are read.
    """
    if table.dtype == torch.bool or table.shape[0] < 2 or table.shape[1] == 0:
        return None
    columns = _distinct_columns(_real(table))
    tokens = columns.shape[0]
    sizes: list[int] = []
    inner = 1  # tokens in one step of the axis that is looked for
    while inner < tokens:
        # Columns that vary within one step of this axis belong to inner axes.
        outer = columns[::inner, _is_constant_on_runs(columns, inner)]
        periods = [_period(column) for column in outer.T.contiguous()]
        if not periods or min(periods) == 1:
            return None
        period = min(periods)
        sizes.insert(0, period)
        inner *= period
    if len(sizes) < 2 or not _is_separable(columns, sizes):
        return None
    return tuple(sizes)


def _real(table: Tensor) -> Tensor:
    if table.is_complex():
        table = torch.view_as_real(table).flatten(1)
    if table.shape[1] > _MOST_COLUMNS:
        table = table[:, torch.linspace(0, table.shape[1] - 1, _MOST_COLUMNS).long()]
    return table.double()


def _distinct_columns(table: Tensor) -> Tensor:
    """Columns that vary by more than rounding, each brought to 0..1."""
    low, high = table.amin(0), table.amax(0)
    spread = high - low
    is_exact = bool((table == table.round()).all())
    varies = spread > (0 if is_exact else _ROUNDING / _TOLERANCE) * table.abs().amax(0)
    return (table[:, varies] - low[varies]) / spread[varies]


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs() <= _TOLERANCE


def _is_constant_on_runs(columns: Tensor, length: int) -> Tensor:
    """Which columns repeat one value over each run of ``length`` tokens; bool [C]."""
    runs = columns.unflatten(0, (-1, length))
    return _same(runs, runs[:, :1]).flatten(0, 1).all(0)


def _period(column: Tensor) -> int:
    """Shortest period that divides the length; 1 where the column is constant."""
    length = column.shape[0]
    for period in _divisors(length)[:-1]:
        some = torch.linspace(0, length - period - 1, 64).long()  # settles most cases
        if _same(column[some + period], column[some]).all() and _same(column[period:], column[:-period]).all():
            return period
    return length


def _divisors(length: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(length) + 1) if length % d == 0]
    return small + [length // d for d in reversed(small) if d * d != length]


def _is_separable(columns: Tensor, sizes: list[int]) -> bool:
    """Whether every column depends on one axis alone, and the positions of every axis are told apart."""
    rows = columns.unflatten(0, sizes)  # [*sizes, C]
    owned = torch.zeros(columns.shape[1], dtype=torch.bool)
    for axis in range(len(sizes)):
        along = rows
        for other in range(len(sizes)):
            if other != axis:
                along = along.narrow(other, 0, 1)
        depends_on_axis_only = _same(rows, along).flatten(0, -2).all(0)
        values = along.reshape(sizes[axis], -1)[:, depends_on_axis_only]
        if not _tells_apart(values):
            return False
        owned |= depends_on_axis_only
    return bool(owned.all())


def _tells_apart(values: Tensor) -> bool:
    """Whether no two rows [n, C] are the same."""
    distinct = (values / _TOLERANCE).round().unique(dim=0)
    return bool(values.shape[1]) and distinct.shape[0] == values.shape[0]
