"""Cut a token grid into equally sized windows and put it back, with views, slices and concatenations only.

No gather and no mask: where the splits do not divide an axis, its windows fall into two runs of equal size,
so a grid falls into at most eight boxes of equally sized windows, shared by both branches. Batch and heads are
folded into M, so that no tensor has more than eight axes (TensorRT's limit).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from t3compile.geometry import Run, Splits, TokenGrid, part_runs
from t3compile.pattern import Branch


@dataclass(frozen=True)
class Box:
    """One run per axis: windows of one size."""

    t: Run
    h: Run
    w: Run

    @property
    def runs(self) -> tuple[Run, Run, Run]:
        return (self.t, self.h, self.w)

    @property
    def parts(self) -> tuple[int, int, int]:
        return (self.t.parts, self.h.parts, self.w.parts)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return (self.t.size, self.h.size, self.w.size)

    @property
    def windows(self) -> int:
        return math.prod(self.parts)

    @property
    def window_tokens(self) -> int:
        return math.prod(self.sizes)


def boxes(grid: TokenGrid, splits: Splits) -> tuple[Box, ...]:
    """The boxes of a grid, runs of the last axis innermost."""
    runs = [part_runs(length, n) for length, n in zip(grid.sizes, splits.counts, strict=True)]
    return tuple(Box(*combination) for combination in itertools.product(*runs))


def _split_axis(x: Tensor, dim: int, length: int, parts: int, run: Run, branch: Branch) -> Tensor:
    """Replace axis ``dim`` by (parts, size) of the run for local windows, by (size, parts) for dilated ones."""
    shorter = length // parts
    if branch == "local":
        start = 0 if run.first_part == 0 else run.first_part * (shorter + 1)
        stretch: Tensor = x.narrow(dim, start, run.parts * run.size)
        return torch.unflatten(stretch, dim, (run.parts, run.size))
    rows: Tensor = x.narrow(dim, 0, shorter * parts).unflatten(dim, (shorter, parts))
    rows = rows.narrow(dim + 1, run.first_part, run.parts)
    if run.size > shorter:
        rest = x.narrow(dim, shorter * parts, run.parts).unsqueeze(dim)
        rows = torch.cat([rows, rest], dim)
    return rows


def _join_axis(pieces: Sequence[Tensor], dim: int, branch: Branch) -> Tensor:
    """Undo _split_axis for all runs of an axis: its two axes become one of the full length."""
    if len(pieces) == 1:
        return pieces[0].flatten(dim, dim + 1)
    longer, shorter = pieces
    if branch == "local":
        return torch.cat([piece.flatten(dim, dim + 1) for piece in pieces], dim)
    rows = shorter.shape[dim]
    full = torch.cat([longer.narrow(dim, 0, rows), shorter], dim + 1).flatten(dim, dim + 1)
    return torch.cat([full, longer.narrow(dim, rows, 1).squeeze(dim)], dim)


# Where group's axes (parts, size) stand after _split_axis, per axis of the grid.
_SPLIT_ORDER = {"local": ((1, 3, 5), (2, 4, 6)), "dilated": ((2, 4, 6), (1, 3, 5))}


def group(x: Tensor, grid: TokenGrid, splits: Splits, branch: Branch, box: Box) -> Tensor:
    """[M, T, H, W, D] -> [M, p_t, p_h, p_w, s_t, s_h, s_w, D]: windows (p) of tokens (s), a view where possible."""
    for axis in reversed(range(3)):
        x = _split_axis(x, 1 + axis, grid.sizes[axis], splits.counts[axis], box.runs[axis], branch)
    parts, sizes = _SPLIT_ORDER[branch]
    return x.permute(0, *parts, *sizes, 7)


def ungroup(windows: Sequence[Tensor], grid: TokenGrid, splits: Splits, branch: Branch) -> Tensor:
    """Inverse of group: one tensor per box in the order of ``boxes`` -> [T, H, W, M, D], contiguous."""
    order = (1, 4, 2, 5, 3, 6) if branch == "local" else (4, 1, 5, 2, 6, 3)
    pieces = [x.permute(*order, 0, 7) for x in windows]
    if len(pieces) == 1:
        (x,) = pieces
        return x.reshape(*grid.sizes, *x.shape[-2:]).contiguous()
    return _join(pieces, grid, splits, branch, first=0).contiguous()


def ungroup_tokens(windows: Sequence[Tensor], grid: TokenGrid, splits: Splits, branch: Branch) -> Tensor:
    """Inverse of group that leaves the first axis first: one tensor per box -> [M, T, H, W, D]."""
    order = (1, 4, 2, 5, 3, 6) if branch == "local" else (4, 1, 5, 2, 6, 3)
    pieces = [x.permute(0, *order, 7) for x in windows]
    if len(pieces) == 1:
        (x,) = pieces
        return x.reshape(x.shape[0], *grid.sizes, x.shape[-1])
    return _join(pieces, grid, splits, branch, first=1)


def _join(pieces: list[Tensor], grid: TokenGrid, splits: Splits, branch: Branch, first: int) -> Tensor:
    """Boxes whose axes (part, size), or the reverse, stand in pairs from ``first`` on -> one grid."""
    for axis in reversed(range(3)):
        runs = len(part_runs(grid.sizes[axis], splits.counts[axis]))
        dim = first + 2 * axis
        pieces = [_join_axis(pieces[start : start + runs], dim, branch) for start in range(0, len(pieces), runs)]
    (x,) = pieces
    return x
