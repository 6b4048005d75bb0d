"""Axes as products of atoms: what reshapes, permutes and products leave of the axes of one attention.

An atom is an indivisible factor of an axis; an axis is a row-major tuple of atoms, an axis of size one the empty
tuple. A reshape regroups atoms and may split one: all earlier mentions of it then mean its parts, so that two tensors
which share an atom keep sharing it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Atom = int
Axes = tuple[tuple[Atom, ...], ...]


@dataclass
class Atoms:
    """The atoms of one attention: their sizes, and the parts of those that were split."""

    sizes: list[int] = field(default_factory=list)
    parts: dict[Atom, tuple[Atom, Atom]] = field(default_factory=dict)

    def new(self, size: int) -> tuple[Atom, ...]:
        """An axis of this size that nothing else shares."""
        if size == 1:
            return ()
        self.sizes.append(size)
        return (len(self.sizes) - 1,)

    def leaves(self, atoms: Iterable[Atom]) -> tuple[Atom, ...]:
        """The atoms with every split one replaced by its parts."""
        found: list[Atom] = []
        for atom in atoms:
            found += self.leaves(self.parts[atom]) if atom in self.parts else (atom,)
        return tuple(found)

    def flat(self, axes: Axes) -> tuple[Atom, ...]:
        return self.leaves(atom for axis in axes for atom in axis)

    def size(self, atoms: Iterable[Atom]) -> int:
        return math.prod(self.sizes[atom] for atom in atoms)

    def shape(self, axes: Axes) -> tuple[int, ...]:
        return tuple(self.size(axis) for axis in axes)

    def regroup(self, axes: Axes, shape: Sequence[int]) -> Axes | None:
        """The axes after a reshape to `shape`; None where a new axis cuts an old one at no whole factor."""
        pending = list(reversed(self.flat(axes)))
        grouped: list[tuple[Atom, ...]] = []
        for size in shape:
            taken: list[Atom] = []
            rest = size
            while rest > 1:
                if not pending:
                    return None
                atom = pending.pop()
                length = self.sizes[atom]
                if rest % length:
                    if length % rest:
                        return None
                    outer, inner = self.new(rest) + self.new(length // rest)
                    self.parts[atom] = (outer, inner)
                    pending.append(inner)
                    atom, length = outer, rest
                taken.append(atom)
                rest //= length
            grouped.append(tuple(taken))
        return tuple(grouped) if not pending else None
