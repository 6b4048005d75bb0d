"""Whether a mask leaves the attention among grid tokens alone: proven from the graph, or read from the examples.

A mask that pads text is often an input over the whole sequence. The graph cannot tell that such an input never hides
a grid token; in joint attention its example value is then taken at its word, and that is said as an assumption.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from t3compile.passes.read_grid import Refusal
from t3compile.passes.read_mask import GridPlace, MaskReader
from t3compile.passes.read_values import ValueReader
from t3compile.program import Program


class GridMasks:
    """Judges the masks of one program's attention calls."""

    def __init__(self, program: Program, values: ValueReader) -> None:
        self._reader = MaskReader(program)
        self._values = values
        self._known: dict[tuple[object, ...], tuple[str, ...] | Refusal] = {}

    def read(self, mask: fx.Node, shape: Sequence[int], place: GridPlace) -> tuple[str, ...] | Refusal:
        """Assumptions under which grid queries see every grid key alike, and the same other keys; or why they may not.

        ``shape`` is [B, N, Sq, S].
        """
        key = (mask, *shape, place)
        if key not in self._known:
            self._known[key] = self._read(mask, shape, place)
        return self._known[key]

    def _read(self, mask: fx.Node, shape: Sequence[int], place: GridPlace) -> tuple[str, ...] | Refusal:
        reading = self._reader.read(mask, shape, place)
        if reading.allows_windows:
            return tuple(f"input '{name}' is taken to hold only 0 and 1, as in the example" for name in reading.assumed)
        example = self._values.read(mask) if place.prefix + place.suffix else None
        if example is None or not example.inputs:
            return Refusal("masked", reading.detail)
        rows = _narrowed(example.value, -2, place.query_prefix, place.grid_tokens)
        if not _leaves_grid_alone(rows, place.prefix, place.grid_tokens):
            return Refusal("masked", f"{reading.detail}; in the example inputs it does so")
        named = " and ".join(f"'{name}'" for name in sorted(example.inputs))
        return (
            f"the mask made of input {named} is taken to hide no grid token and to be the same for all grid queries, "
            "as in the example",
        )


def _narrowed(mask: Tensor, dim: int, start: int, length: int) -> Tensor:
    """A stretch of an axis of a mask; an axis that is broadcast, or missing, has all of it already."""
    if mask.dim() < -dim or mask.shape[dim] == 1:
        return mask
    return mask.narrow(dim, start, length)


def _leaves_grid_alone(rows: Tensor, prefix: int, grid_tokens: int) -> bool:
    """Whether all rows of a mask are the same, and visible or alike at the keys of the grid."""
    if rows.dim() > 1 and not bool((rows == rows[..., :1, :]).all()):
        return False
    block = _narrowed(rows, -1, prefix, grid_tokens)
    if block.dtype == torch.bool:
        return bool(block.all())
    first = block[..., :1]
    return bool((block == first).all()) and bool(first.isfinite().all())
