"""Follow the axes of the model's inputs through the graph: which token stands where.

Abstract interpretation over passes.layout: one transfer function per kind of operation; an operation without
one makes axes of unknown meaning that carry its name, so that a declined site can say where the trail ended.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from t3compile.passes.aten_calls import node_shape
from t3compile.passes.layout import (
    ONE,
    Axis,
    Digit,
    Layout,
    Origin,
    input_axis,
    is_flat,
    unknown_axis,
)
from t3compile.passes.layout_rules import LayoutValue, maker_of, transfer_for
from t3compile.passes.read_values import Table

aten = torch.ops.aten

# Made from the shape of their input alone.
_SHAPE_ONLY = {
    aten.empty_like,
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.rand_like,
    aten.randn_like,
    aten.new_empty,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
}

# The value of an index tensor and the inputs whose example values it was computed from, or None.
ReadTable = Callable[[fx.Node], Table | None]


@dataclass(frozen=True)
class Beside:
    """A tensor that met a flat axis of an input element by element: it may hold those tokens' positions.

    The tokens stand at ``start`` .. on axis ``dim`` of what ``node`` yields.
    """

    node: fx.Node
    dim: int
    start: int


def _no_table(_: fx.Node) -> None:
    return None


class LayoutTracker:
    """Layouts of all nodes of a static-shape graph.

    ``inputs`` are the placeholders that are model inputs; ``read_table`` gives the values of index tensors.
    """

    def __init__(self, graph: fx.Graph, inputs: Sequence[str], read_table: ReadTable = _no_table) -> None:
        self._read_table = read_table
        self._index_inputs: set[str] = set()
        self._values: dict[fx.Node, LayoutValue] = {}
        self._beside: dict[Origin, dict[Beside, None]] = {}
        self._reach: dict[fx.Node, frozenset[str]] = {}
        self._dropped: dict[fx.Node, frozenset[tuple[str, int]]] = {}
        names = set(inputs)
        for node in graph.nodes:
            self._reach[node] = frozenset({node.name}) if node.name in names else self._reached_by(node)
            self._dropped[node] = frozenset().union(*(self._dropped[used] for used in node.all_input_nodes))
            self._values[node] = self._visit(node, names)

    def value(self, node: fx.Node) -> LayoutValue:
        """The layout of the tensor, or of every tensor, that `node` yields; None where it yields none."""
        return self._values[node]

    def layout(self, node: fx.Node) -> Layout:
        """One axis per dimension of the tensor that `node` yields."""
        value = self._values[node]
        if isinstance(value, tuple):
            return value
        return self.unknown(node)

    def _reached_by(self, node: fx.Node) -> frozenset[str]:
        """Inputs whose values reach the node."""
        if getattr(node.target, "overloadpacket", None) in _SHAPE_ONLY:
            return frozenset()
        return frozenset().union(*(self._reach[source] for source in node.all_input_nodes))

    def reach(self, node: fx.Node) -> frozenset[str]:
        """Inputs whose values reach the node."""
        return self._reach[node]

    def unknown(self, node: fx.Node) -> Layout:
        """Axes of which only the size is known, and the node that made them."""
        source = node.args[0] if node.target is operator.getitem else node
        assert isinstance(source, fx.Node)
        made_by = maker_of(source)
        shape = node_shape(node)
        reach = self._reach[node]
        return tuple(unknown_axis(made_by, i, size, reach) for i, size in enumerate(shape))

    def features(self, node: fx.Node, dim: int) -> Axis:
        """The axis that a weight makes: no tokens stand there."""
        size = node_shape(node)[dim]
        made_by = maker_of(node)
        origin = Origin(None, dim, size, made_by, self._reach[node], is_feature=True)
        return Axis.of((Digit(origin, 1, size, size),)) if size > 1 else ONE

    def _visit(self, node: fx.Node, inputs: set[str]) -> LayoutValue:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in inputs and isinstance(value, Tensor):
            return tuple(input_axis(node.name, i, size) for i, size in enumerate(node_shape(node)))
        if node.op == "call_function":
            transfer = transfer_for(node.target)
            result = transfer(self, node) if transfer is not None else None
            if result is not None:
                return self._fitting(node, result)
        return self.unknown(node) if isinstance(value, Tensor) else None

    def _fitting(self, node: fx.Node, result: LayoutValue) -> LayoutValue:
        """The result where its sizes are those of the node's tensor; a transfer that missed is not believed."""
        value = node.meta.get("val")
        if isinstance(result, list) or not isinstance(value, Tensor):
            return result
        fits = result is not None and tuple(axis.size for axis in result) == node_shape(node)
        return result if fits else self.unknown(node)

    def dropped(self, node: fx.Node) -> frozenset[tuple[str, int]]:
        """(input, axis) of which one position was picked on the way to the node: it stands for a part of them."""
        return self._dropped[node]

    def drop(self, node: fx.Node, axis: Axis) -> None:
        """Record that `node` keeps one position of an axis."""
        origins = (digit.origin for segment in axis.segments for digit in segment)
        picked = {(o.input_name, o.axis) for o in origins if o.input_name is not None}
        self._dropped[node] |= picked

    def read_index(self, node: fx.Node) -> Tensor | None:
        """The value of an index tensor; the inputs that it depends on are remembered."""
        table = self._read_table(node)
        if table is None:
            return None
        self._index_inputs |= table.inputs
        return table.value

    @property
    def index_inputs(self) -> frozenset[str]:
        """Inputs whose example values say where tokens stand."""
        return frozenset(self._index_inputs)

    def beside(self, origin: Origin) -> tuple[Beside, ...]:
        """What met the tokens of a flat input axis element by element, in graph order."""
        return tuple(self._beside.get(origin, ()))

    def meet(self, axis: Axis, node: fx.Node, dim: int) -> None:
        """Record that `node`'s axis `dim` met the tokens of `axis`."""
        for start, segment in axis.placed():
            if is_flat(segment):
                self._beside.setdefault(segment[0].origin, {})[Beside(node, dim, start)] = None

    def unless_filled(self, node: fx.Node, axis: Axis) -> Axis | None:
        """The axis, or None where it had no meaning and the operation puts tokens of an input there."""
        return None if axis.is_neutral and axis.size > 1 and self._reach[node] else axis

    def replace_unknown(self, node: fx.Node, axes: Sequence[Axis | None]) -> Layout:
        """The given axes, with unknown ones of this node's making where None."""
        return tuple(axis if axis is not None else blank for axis, blank in zip(axes, self.unknown(node), strict=True))
