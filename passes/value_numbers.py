"""Tensors of value numbers: equal numbers stand for equal values, and repeated rows are kept once.

A mask of [B, N, S, S] with S = 130,000 has few different rows and columns. Its numbers are a small core and, for each
axis, the place of every position in that core, so that masks are compared and combined without ever being laid out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers laid out in full take 8 bytes each and several copies of them; what needs more is not computed.
LARGEST = 2**24
# Below this size laying out is cheaper than looking for equal rows; above the other, looking is too slow.
_WORTH_GROUPING = 2**12
_LARGEST_GROUPED = 2**22


@dataclass(frozen=True, eq=False)
class Numbers:
    """Value numbers of a tensor of ``shape``.

    Element [i, j, ...] has the number core[places[0][i], places[1][j], ...]: ``core`` int64 of the same rank,
    ``places`` int64 [shape[d]] for each axis. Places None are the positions themselves, or 0 where the core has one;
    there they are always None, and every position of the core is used.
    """

    shape: tuple[int, ...]
    core: Tensor
    places: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, core: Tensor, shape: Sequence[int] | None = None) -> Numbers:
        """A core that is laid out, or has size 1 where `shape` repeats it."""
        shape = tuple(core.shape) if shape is None else tuple(shape)
        return cls(shape, core, (None,) * len(shape))

    def is_repeated(self, dim: int) -> bool:
        """Whether all positions of an axis are known to be equal."""
        return self.core.shape[dim] == 1 and self.places[dim] is None

    def positions(self, dim: int) -> Tensor:
        """int64 [shape[dim]]: where in the core each position of an axis is."""
        places = self.places[dim]
        if places is not None:
            return places
        if self.core.shape[dim] == 1:
            return torch.zeros(self.shape[dim], dtype=torch.int64)
        return torch.arange(self.shape[dim])

    def take(self, dim: int, index: Tensor) -> Numbers:
        """The positions `index` (int64 [n]) of an axis, in that order."""
        shape = (*self.shape[:dim], len(index), *self.shape[dim + 1 :])
        if self.is_repeated(dim) and len(index):
            return Numbers(shape, self.core, self.places)
        used, places = torch.unique(self.positions(dim)[index], return_inverse=True)
        core = self.core.index_select(dim, used)
        if len(used) == len(index):
            return Numbers(shape, core.index_select(dim, places), _replaced(self.places, dim, None))
        return Numbers(shape, core, _replaced(self.places, dim, None if len(used) == 1 else places))

    def slice(self, dim: int, start: int, stop: int) -> Numbers:
        """Positions start..stop-1 of an axis."""
        return self if (start, stop) == (0, self.shape[dim]) else self.take(dim, torch.arange(start, stop))

    def spread(self, dims: Sequence[int]) -> Numbers | None:
        """The same with every position of some axes in the core; None where that is too large."""
        size = math.prod(self.shape[d] if d in dims else n for d, n in enumerate(self.core.shape))
        if size > LARGEST:
            return None
        core, places = self.core, self.places
        for dim in dims:
            core = core.index_select(dim, self.positions(dim))
            places = _replaced(places, dim, None)
        return Numbers(self.shape, core, places)

    def dense(self) -> Tensor | None:
        """int64 of ``shape``; None where that is too large."""
        spread = self.spread(range(len(self.shape)))
        return None if spread is None else spread.core

    def grouped(self) -> Numbers:
        """The same with equal slices of every axis kept once."""
        core, places = self.core, self.places
        for dim in range(len(self.shape)):
            count = core.shape[dim]
            if count < 2 or core.numel() > _LARGEST_GROUPED:
                continue
            rows = core.movedim(dim, 0).reshape(count, -1)
            if bool((rows == rows[:1]).all()):
                core, places = core.narrow(dim, 0, 1), _replaced(places, dim, None)
                continue
            if rows.shape[1] == 1:
                _, group = torch.unique(rows[:, 0], return_inverse=True)
            else:
                _, group = torch.unique(rows, dim=0, return_inverse=True)
            first = representatives(group)
            if len(first) < count:
                before = places[dim]
                core = core.index_select(dim, first)
                places = _replaced(places, dim, group if before is None else group[before])
        return Numbers(self.shape, core, places)

    def lifted(self, rank: int) -> Numbers:
        """Leading axes of size 1 up to `rank` axes."""
        missing = rank - len(self.shape)
        ones = (1,) * missing
        core = self.core.reshape(*ones, *self.core.shape)
        return Numbers((*ones, *self.shape), core, (*(None,) * missing, *self.places))

    def expand(self, shape: Sequence[int]) -> Numbers:
        """Broadcast to `shape`."""
        lifted = self.lifted(len(shape))
        if 0 in shape:
            return Numbers.of(torch.zeros(tuple(shape), dtype=torch.int64))
        return Numbers(tuple(shape), lifted.core, lifted.places)

    def permute(self, dims: Sequence[int]) -> Numbers:
        return Numbers(
            tuple(self.shape[d] for d in dims), self.core.permute(*dims), tuple(self.places[d] for d in dims)
        )

    def reshape(self, shape: Sequence[int]) -> Numbers | None:
        """Row-major; axes that are merged or cut are laid out, None where that is too large."""
        shape = tuple(shape)
        if 0 in shape:
            return Numbers.of(torch.zeros(shape, dtype=torch.int64))
        core_shape: list[int] = []
        places: list[Tensor | None] = []
        spread: Numbers | None = self
        for old, new in _stretches(self.shape, shape):
            wide = [n for n in new if n != 1]
            if all(self.is_repeated(d) for d in old):
                core_shape += [1] * len(new)
                places += [None] * len(new)
            elif len(old) == 1 and len(wide) == 1:
                core_shape += [1 if n == 1 else self.core.shape[old[0]] for n in new]
                places += [None if n == 1 else self.places[old[0]] for n in new]
            else:
                spread = None if spread is None else spread.spread(old)
                core_shape += new
                places += [None] * len(new)
        if spread is None:
            return None
        return Numbers(shape, spread.core.reshape(core_shape), tuple(places))


def representatives(group: Tensor) -> Tensor:
    """int64 [groups]: one position of each group 0..groups-1."""
    first = torch.empty(int(group.max()) + 1 if len(group) else 0, dtype=torch.int64)
    return first.scatter_(0, group, torch.arange(len(group)))


def _replaced(places: tuple[Tensor | None, ...], dim: int, value: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*places[:dim], value, *places[dim + 1 :])


def _stretches(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of old axes (their numbers; size 1 left out) and new sizes with equal products."""
    axes = [d for d, n in enumerate(old) if n != 1]
    stretches: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while j < len(new):
        sizes = [new[j]]
        run: list[int] = []
        product, target = 1, new[j]
        j += 1
        while product != target:
            if product < target:
                run.append(axes[i])
                product *= old[axes[i]]
                i += 1
            else:
                sizes.append(new[j])
                target *= new[j]
                j += 1
        stretches.append((run, sizes))
    return stretches


@dataclass(frozen=True, eq=False)
class Aligned:
    """Operands of one elementwise operation: cores that broadcast against each other, and the result's places."""

    shape: tuple[int, ...]
    cores: tuple[Tensor, ...]
    places: tuple[Tensor | None, ...]


def align(operands: Sequence[Numbers]) -> Aligned | None:
    """Operands that broadcast against each other, over common cores; None where these are too large."""
    return _align(_lift(operands, None), None)


def concatenate(parts: Sequence[Numbers], dim: int) -> Numbers | None:
    """The parts one after another along an axis; None where that is too large."""
    parts = [part for part in parts if part.shape[dim] != 0] or list(parts[:1])
    if len(parts) == 1:
        return parts[0]
    lifted = _lift(parts, dim)
    aligned = _align(lifted, dim)
    if aligned is None:
        return None
    sizes = [max(core.shape[d] for core in aligned.cores) for d in range(len(aligned.shape))]
    cores: list[Tensor] = []
    places: list[Tensor] = []
    offset = 0
    for part, core in zip(lifted, aligned.cores, strict=True):
        count = core.shape[dim]
        cores.append(core.expand(*sizes[:dim], count, *sizes[dim + 1 :]))
        places.append(offset + part.positions(dim))
        offset += count
    length = sum(part.shape[dim] for part in parts)
    shape = (*aligned.shape[:dim], length, *aligned.shape[dim + 1 :])
    laid_out = all(part.places[dim] is None and part.core.shape[dim] == part.shape[dim] for part in lifted)
    return Numbers(
        shape, torch.cat(cores, dim), _replaced(aligned.places, dim, None if laid_out else torch.cat(places))
    )


def _lift(operands: Sequence[Numbers], apart: int | None) -> list[Numbers]:
    rank = max(len(x.shape) for x in operands)
    lifted = [x.lifted(rank) for x in operands]
    if _common_size([x.core for x in lifted], apart) > _WORTH_GROUPING:
        lifted = [x.grouped() for x in lifted]
    return lifted


def _align(lifted: Sequence[Numbers], apart: int | None) -> Aligned | None:
    """Cores of one common shape; axis `apart` is left as every operand has it."""
    rank = len(lifted[0].shape)
    shape = [0 if any(x.shape[d] == 0 for x in lifted) else max(x.shape[d] for x in lifted) for d in range(rank)]
    cores = [x.core for x in lifted]
    places: list[Tensor | None] = []
    for dim in range(rank):
        wide = [i for i, x in enumerate(lifted) if not x.is_repeated(dim)]
        if dim == apart or all(lifted[i].places[dim] is None for i in wide):
            places.append(None)
        elif len(wide) == 1:
            places.append(lifted[wide[0]].places[dim])
        else:
            group = torch.zeros(shape[dim], dtype=torch.int64)
            for i in wide:
                code = group * cores[i].shape[dim] + lifted[i].positions(dim)
                _, group = torch.unique(code, return_inverse=True)
            first = representatives(group)
            for i in wide:
                cores[i] = cores[i].index_select(dim, lifted[i].positions(dim)[first])
            places.append(group)
    if _common_size(cores, apart) > LARGEST:
        return None
    return Aligned(tuple(shape), tuple(cores), tuple(places))


def _common_size(cores: Sequence[Tensor], apart: int | None) -> int:
    """Elements of the broadcast result, or of the concatenation along `apart`."""
    size = 1
    for dim in range(cores[0].dim()):
        lengths = [core.shape[dim] for core in cores]
        size *= sum(lengths) if dim == apart else max(lengths)
    return size
