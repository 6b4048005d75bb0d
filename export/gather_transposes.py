"""Large Transposes as Gathers: onnxruntime's CPU Transpose runs on one thread, its Gather on all.

Input graph:
    y = Transpose(x, perm=[0, 2, 4, 1, 3, 5])                       x [1, 17, 8, 30, 4, 128]
Output graph:
    y = Reshape(Gather(Reshape(x, [1, 16320, 128]), places, axis=1), [1, 8, 4, 17, 30, 128])

Leading and trailing axes that stay move along; ``places`` is an int32 table over the axes between, shared by equal
ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from t3compile.export.graph_values import (
    initializer,
    name_after,
    permutation_of,
    put_in_place,
    reshape_to,
    sizes_of,
    static_shape,
)
from t3compile.export.merge_transposes import Atom, joined_atoms

# Below, starting threads costs what they save.
FEWEST_BYTES = 2**20
# Of what moves as one piece: a table has four bytes for each.
FEWEST_PIECE_BYTES = 64
MOST_TABLE_BYTES = 2**24


@dataclass(frozen=True)
class _Move:
    """A Transpose as [leading, places, piece] -> [leading, places, piece]."""

    leading: int
    sizes: tuple[int, ...]
    perm: tuple[int, ...]
    piece: int
    element_bytes: int

    @classmethod
    def of(cls, shape: tuple[int, ...], perm: tuple[int, ...], element_bytes: int) -> _Move:
        stays = [axis == source for axis, source in enumerate(perm)]
        first = stays.index(False) if False in stays else len(perm)
        last = len(perm) - stays[::-1].index(False) if False in stays else len(perm)
        between = tuple(axis - first for axis in perm[first:last])
        return cls(math.prod(shape[:first]), shape[first:last], between, math.prod(shape[last:]), element_bytes)

    @property
    def places(self) -> int:
        return math.prod(self.sizes)

    @property
    def elements(self) -> int:
        return self.leading * self.places * self.piece

    @property
    def gains(self) -> bool:
        is_large = self.elements * self.element_bytes >= FEWEST_BYTES
        moves_pieces = self.piece * self.element_bytes >= FEWEST_PIECE_BYTES
        return is_large and moves_pieces and 4 * self.places <= MOST_TABLE_BYTES

    def in_pieces(self, leading: int, piece: int) -> _Move:
        """The same move, of smaller pieces and with fewer leading places."""
        inner, outer = self.piece // piece, self.leading // leading
        sizes = (outer, *self.sizes, inner)
        perm = (0, *(axis + 1 for axis in self.perm), len(self.perm) + 1)
        return _Move(leading, sizes, perm, piece, self.element_bytes)

    @property
    def order(self) -> tuple[Atom, ...]:
        """The places of the input in the order of the output: equal for equal moves, however their axes are cut."""
        atoms = [Atom(math.prod(self.sizes[axis + 1 :]), self.sizes[axis]) for axis in self.perm]
        return tuple(joined_atoms([atom for atom in atoms if atom.size > 1]))


def _table(order: Sequence[Atom]) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """The place in the input of every place in the output."""
    places = np.zeros(1, dtype=np.int32)
    for atom in order:
        places = np.add.outer(places, np.arange(atom.size, dtype=np.int32) * np.int32(atom.stride)).reshape(-1)
    return places


@dataclass(frozen=True)
class GatherTransposes(ir.passes.InPlacePass):
    """Every Transpose of a known shape that moves whole pieces of a large tensor becomes a Gather."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph."""
        moves = {node: move for node in model.graph if (move := _move(node)) is not None}
        tables: dict[tuple[Atom, ...], ir.Value] = {}
        for node, move in _alike(moves).items():
            order = move.order
            if order not in tables:
                tables[order] = initializer(model.graph, f"transposed_places_{len(tables)}", ir.tensor(_table(order)))
            _gather(model.graph, node, move, tables[order])
        return ir.passes.PassResult(model, bool(moves))


def _move(node: ir.Node) -> _Move | None:
    """What a Transpose moves; None where another node does, or a Gather would gain nothing."""
    # The view behind a Gather would be a copy where it is a graph's output.
    if node.domain != "" or node.op_type != "Transpose" or node.outputs[0].is_graph_output():
        return None
    source = node.inputs[0]
    shape = static_shape(source)
    if source is None or source.dtype is None or shape is None or static_shape(node.outputs[0]) is None:
        return None
    move = _Move.of(shape, permutation_of(node, len(shape)), int(source.dtype.itemsize))
    return move if move.gains else None


def _alike(moves: Mapping[ir.Node, _Move]) -> dict[ir.Node, _Move]:
    """Tensors of one size in one shape: onnxruntime gives the memory of one to another where their shapes are equal."""
    shapes: dict[int, tuple[int, int]] = {}
    for move in moves.values():
        leading, piece = shapes.get(move.elements, (move.leading, move.piece))
        shapes[move.elements] = (math.gcd(leading, move.leading), math.gcd(piece, move.piece))
    cut = {node: move.in_pieces(*shapes[move.elements]) for node, move in moves.items()}
    return {node: cut[node] if cut[node].gains else move for node, move in moves.items()}


def _gather(graph: ir.Graph, node: ir.Node, move: _Move, table: ir.Value) -> None:
    source, out_shape = node.inputs[0], sizes_of(node.outputs[0])
    assert source is not None
    pieces = (move.leading, move.places, move.piece)
    before = reshape_to(source, pieces)
    gathered = ir.node("Gather", [before[-1].outputs[0], table], {"axis": 1})
    gathered.outputs[0].shape, gathered.outputs[0].type = ir.Shape(list(pieces)), source.type
    after = reshape_to(gathered.outputs[0], out_shape)
    made = [*before, gathered, *after]
    name_after(node, made, "/gather")  # merged views before have the plain numbers
    put_in_place(graph, node, made, after[-1].outputs[0])
