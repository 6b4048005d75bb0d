"""Large Transposes as Gathers: onnxruntime's CPU Transpose runs on one thread, its Gather on all.

Input graph:
    y = Transpose(x, perm=[0, 2, 4, 1, 3, 5])                       x [1, 17, 8, 30, 4, 128]
Output graph:
    y = Reshape(Gather(Reshape(x, [1, 16320, 128]), places, axis=1), [1, 8, 4, 17, 30, 128])

Leading and trailing axes that stay move along; ``places`` is an int32 table over the axes between, shared by equal
ones.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from t3compile.export.graph_values import initializer, int64_constant, put_in_place, sizes_of, static_shape

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

    @classmethod
    def of(cls, shape: tuple[int, ...], perm: tuple[int, ...]) -> _Move:
        stays = [axis == source for axis, source in enumerate(perm)]
        first = stays.index(False) if False in stays else len(perm)
        last = len(perm) - stays[::-1].index(False) if False in stays else len(perm)
        between = tuple(axis - first for axis in perm[first:last])
        return cls(math.prod(shape[:first]), shape[first:last], between, math.prod(shape[last:]))

    @property
    def places(self) -> int:
        return math.prod(self.sizes)

    @property
    def elements(self) -> int:
        return self.leading * self.places * self.piece

    def gains(self, element_bytes: int) -> bool:
        piece = self.piece * element_bytes
        is_large = self.elements * element_bytes >= FEWEST_BYTES and piece >= FEWEST_PIECE_BYTES
        return is_large and 4 * self.places <= MOST_TABLE_BYTES

    def in_pieces(self, leading: int, piece: int) -> _Move:
        """The same move, of smaller pieces and with fewer leading places."""
        inner, outer = self.piece // piece, self.leading // leading
        sizes = (outer, *self.sizes, inner)
        perm = (0, *(axis + 1 for axis in self.perm), len(self.perm) + 1)
        return _Move(leading, sizes, perm, piece)

    def table(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """The place in the input of every place in the output."""
        return np.arange(self.places, dtype=np.int32).reshape(self.sizes).transpose(self.perm).reshape(-1)


@dataclass(frozen=True)
class GatherTransposes(ir.passes.InPlacePass):
    """Every Transpose of a known shape that moves whole pieces of a large tensor becomes a Gather."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph."""
        moves = {node: move for node in model.graph if (move := _move(node)) is not None}
        tables: dict[bytes, ir.Value] = {}
        for node, move in _alike(moves).items():
            places = move.table()
            key = hashlib.sha256(places.tobytes()).digest()
            if key not in tables:
                tables[key] = initializer(model.graph, f"transposed_places_{len(tables)}", ir.tensor(places))
            _gather(model.graph, node, move, tables[key])
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
    move = _Move.of(shape, _permutation(node, len(shape)))
    return move if move.gains(int(source.dtype.itemsize)) else None


def _alike(moves: Mapping[ir.Node, _Move]) -> dict[ir.Node, _Move]:
    """Tensors of one size in one shape: onnxruntime gives the memory of one to another where their shapes are equal."""
    shapes: dict[int, tuple[int, int]] = {}
    for move in moves.values():
        leading, piece = shapes.get(move.elements, (move.leading, move.piece))
        shapes[move.elements] = (math.gcd(leading, move.leading), math.gcd(piece, move.piece))
    alike = {}
    for node, move in moves.items():
        cut = move.in_pieces(*shapes[move.elements])
        source = node.inputs[0]
        assert source is not None and source.dtype is not None
        alike[node] = cut if cut.gains(int(source.dtype.itemsize)) else move
    return alike


def _permutation(node: ir.Node, axes: int) -> tuple[int, ...]:
    return tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else tuple(range(axes))[::-1]


def _gather(graph: ir.Graph, node: ir.Node, move: _Move, table: ir.Value) -> None:
    source, out_shape = node.inputs[0], sizes_of(node.outputs[0])
    assert source is not None
    pieces = (move.leading, move.places, move.piece)
    before, after = int64_constant(pieces), int64_constant(out_shape)
    view = ir.node("Reshape", [source, before.outputs[0]])
    gathered = ir.node("Gather", [view.outputs[0], table], {"axis": 1})
    back = ir.node("Reshape", [gathered.outputs[0], after.outputs[0]])
    made = [before, view, gathered, after, back]
    for new, shape in ((view, pieces), (gathered, pieces), (back, out_shape)):
        new.outputs[0].shape, new.outputs[0].type = ir.Shape(list(shape)), source.type
    for index, new in enumerate(made):
        # Merged views before have the plain numbers.
        new.name = f"{node.name}/gather/{index}"
        new.outputs[0].name = f"{node.outputs[0].name}/gather/{index}"
    put_in_place(graph, node, made, back.outputs[0])
