"""The token grid that a table of positions spells out: coordinates, or rotary or sine tables made from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Tables are made in float32: the same coordinate may differ by a rounding step of sine or cosine.
_TOLERANCE = 1e-5
# Wide tables repeat each axis in many columns.
_MOST_COLUMNS = 64


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
        periods = [_period(column) for column in outer.T]
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
    """Columns that vary by more than rounding."""
    spread = table.amax(0) - table.amin(0)
    scale = table.abs().amax(0).clamp(min=1e-30)
    return table[:, spread > 10 * _TOLERANCE * scale]


def _same(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return (a - b).abs() <= _TOLERANCE * scale


def _is_constant_on_runs(columns: Tensor, length: int) -> Tensor:
    """Which columns repeat one value over each run of ``length`` tokens; bool [C]."""
    runs = columns.unflatten(0, (-1, length))
    return _same(runs, runs[:, :1], columns.abs().amax(0)).flatten(0, 1).all(0)


def _period(column: Tensor) -> int:
    """Shortest period that divides the length; 1 where the column is constant."""
    length = column.shape[0]
    scale = column.abs().amax()
    for period in _divisors(length)[:-1]:
        first = column[period : period + 16]  # settles most cases
        if _same(first, column[: len(first)], scale).all() and _same(column[period:], column[:-period], scale).all():
            return period
    return length


def _divisors(length: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(length) + 1) if length % d == 0]
    return small + [length // d for d in reversed(small) if d * d != length]


def _is_separable(columns: Tensor, sizes: list[int]) -> bool:
    """Whether every column depends on one axis alone, and the positions of every axis are told apart."""
    rows = columns.unflatten(0, sizes)  # [*sizes, C]
    scale = columns.abs().amax(0)
    owned = torch.zeros(columns.shape[1], dtype=torch.bool)
    for axis in range(len(sizes)):
        along = rows
        for other in range(len(sizes)):
            if other != axis:
                along = along.narrow(other, 0, 1)
        depends_on_axis_only = _same(rows, along, scale).flatten(0, -2).all(0)
        values = along.reshape(sizes[axis], -1)[:, depends_on_axis_only]
        if not _tells_apart(values):
            return False
        owned |= depends_on_axis_only
    return bool(owned.all())


def _tells_apart(values: Tensor) -> bool:
    """Whether no two rows [n, C] are the same."""
    return bool(values.shape[1]) and values.unique(dim=0).shape[0] == values.shape[0]
