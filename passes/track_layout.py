"""Follow the axes of the model's inputs through the graph: which token stands where.

Abstract interpretation over passes.layout: one transfer function per kind of operation; an operation without
one makes axes of unknown meaning that carry its name, so that a declined site can say where the trail ended.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from t3compile.ops import WINDOW_ATTENTION
from t3compile.passes.layout import (
    ONE,
    Axis,
    Digit,
    Layout,
    concatenate,
    input_axis,
    join,
    product,
    unknown_axis,
)

aten = torch.ops.aten

Value = Layout | list[Layout] | None
Transfer = Callable[["LayoutTracker", fx.Node], Value]


def _shape(value: object) -> tuple[int, ...]:
    assert isinstance(value, Tensor)
    return tuple(int(size) for size in value.shape)


class LayoutTracker:
    """Layouts of all nodes of a static-shape graph; ``inputs`` are the placeholders that are model inputs."""

    def __init__(self, graph: fx.Graph, inputs: Sequence[str]) -> None:
        self._values: dict[fx.Node, Value] = {}
        self._reached: set[fx.Node] = set()
        self._dropped: dict[fx.Node, frozenset[tuple[str, int]]] = {}
        names = set(inputs)
        for node in graph.nodes:
            if node.name in names or self._is_reached(node):
                self._reached.add(node)
            self._dropped[node] = frozenset().union(*(self._dropped[used] for used in node.all_input_nodes))
            self._values[node] = self._visit(node, names)

    def layout(self, node: fx.Node) -> Layout:
        """One axis per dimension of the tensor that `node` yields."""
        value = self._values[node]
        if isinstance(value, tuple):
            return value
        return self.unknown(node)

    def _is_reached(self, node: fx.Node) -> bool:
        """Whether values of an input reach the node."""
        if getattr(node.target, "overloadpacket", None) in _SHAPE_ONLY:
            return False
        return any(source in self._reached for source in node.all_input_nodes)

    def unknown(self, node: fx.Node) -> Layout:
        source = node.args[0] if node.target is operator.getitem else node
        assert isinstance(source, fx.Node)
        made_by = f"{source.target} (node '{source.name}')"
        shape = _shape(node.meta["val"])
        neutral = node not in self._reached
        return tuple(unknown_axis(made_by, i, size, neutral=neutral) for i, size in enumerate(shape))

    def _visit(self, node: fx.Node, inputs: set[str]) -> Value:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in inputs and isinstance(value, Tensor):
            return tuple(input_axis(node.name, i, size) for i, size in enumerate(_shape(value)))
        if node.op == "call_function":
            transfer = _transfer_for(node.target)
            result = transfer(self, node) if transfer is not None else None
            if result is not None:
                return self._fitting(node, result)
        return self.unknown(node) if isinstance(value, Tensor) else None

    def _fitting(self, node: fx.Node, result: Value) -> Value:
        """The result where its sizes are those of the node's tensor; a transfer that missed is not believed."""
        value = node.meta.get("val")
        if isinstance(result, list) or not isinstance(value, Tensor):
            return result
        fits = result is not None and tuple(axis.size for axis in result) == _shape(value)
        return result if fits else self.unknown(node)

    def dropped(self, node: fx.Node) -> frozenset[tuple[str, int]]:
        """(input, axis) of which one position was picked on the way to the node: it stands for a part of them."""
        return self._dropped[node]

    def drop(self, node: fx.Node, axis: Axis) -> None:
        """Record that `node` keeps one position of an axis."""
        origins = (digit.origin for segment in axis.segments for digit in segment)
        picked = {(o.input_name, o.axis) for o in origins if o.input_name is not None}
        self._dropped[node] |= picked

    def unless_filled(self, node: fx.Node, axis: Axis) -> Axis | None:
        """The axis, or None where it had no meaning and the operation puts tokens of an input there."""
        return None if axis.is_neutral and axis.size > 1 and node in self._reached else axis

    def replace_unknown(self, node: fx.Node, axes: Sequence[Axis | None]) -> Layout:
        """The given axes, with unknown ones of this node's making where None."""
        return tuple(axis if axis is not None else blank for axis, blank in zip(axes, self.unknown(node), strict=True))


def _transfer_for(target: Any) -> Transfer | None:
    if target is operator.getitem:
        return _getitem
    packet = getattr(target, "overloadpacket", None)
    if packet in _TRANSFERS:
        return _TRANSFERS[packet]
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return _elementwise
    return None


def _getitem(tracker: LayoutTracker, node: fx.Node) -> Value:
    source, index = node.args
    assert isinstance(source, fx.Node)
    value = tracker._values[source]
    return value[index] if isinstance(value, list) and isinstance(index, int) else None


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _same_as_input(tracker: LayoutTracker, node: fx.Node) -> Value:
    return tracker.layout(_source(node))


def _elementwise(tracker: LayoutTracker, node: fx.Node) -> Value:
    """Broadcast: an output axis means what its operands say that have its full size."""
    shape = _shape(node.meta["val"])
    axes: list[Axis | None] = [None] * len(shape)
    conflicts: set[int] = set()
    for operand in node.all_input_nodes:
        if not isinstance(operand.meta.get("val"), Tensor):
            continue
        layout = tracker.layout(operand)
        for i, axis in enumerate(layout, start=len(shape) - len(layout)):
            if axis.size != shape[i] or i in conflicts:
                continue
            present = axes[i]
            axes[i] = axis if present is None else join(present, axis)
            if axes[i] is None:
                conflicts.add(i)
    return tracker.replace_unknown(node, axes)


def _linear(tracker: LayoutTracker, node: fx.Node) -> Value:
    """[..., K] @ weight -> [..., M]: the last axis is new."""
    return tracker.replace_unknown(node, [*tracker.layout(_source(node))[:-1], None])


def _matmul(tracker: LayoutTracker, node: fx.Node) -> Value:
    """[..., M, K] @ [..., K, N] -> [..., M, N]."""
    tensors = [x for x in node.args if isinstance(x, fx.Node)][-2:]
    a, b = (tracker.layout(x) for x in tensors)
    rank = len(_shape(node.meta["val"]))
    if len(a) != rank or len(b) != rank:
        return None
    batch = [join(x, y) if x.size == y.size else None for x, y in zip(a[:-2], b[:-2], strict=True)]
    return tracker.replace_unknown(node, [*batch, *(tracker.unless_filled(node, x) for x in (a[-2], b[-1]))])


def _attention(tracker: LayoutTracker, node: fx.Node) -> Value:
    """[B, N, S, D]: the queries' tokens, the values' depth."""
    q, v = node.args[0], node.args[2]
    assert isinstance(q, fx.Node) and isinstance(v, fx.Node)
    *outer, tokens, _ = tracker.layout(q)
    return tracker.replace_unknown(node, [*outer, tracker.unless_filled(node, tokens), tracker.layout(v)[-1]])


def _convolution(tracker: LayoutTracker, node: fx.Node) -> Value:
    """[B, C, *space]: positions stay ordered, `stride` input positions become one."""
    layout = tracker.layout(_source(node))
    out_shape = _shape(node.meta["val"])
    axes: list[Axis | None] = [layout[0], None]
    for axis, size in zip(layout[2:], out_shape[2:], strict=True):
        axes.append(_strided(axis, size))
    return tracker.replace_unknown(node, axes)


def _strided(axis: Axis, size: int) -> Axis | None:
    """A single digit cut into `size` equal patches."""
    if axis.size == size:
        return axis
    if size == 1:
        return ONE
    if len(axis.segments) != 1 or len(axis.segments[0]) != 1 or axis.size % size:
        return None
    (digit,) = axis.segments[0]
    patch = axis.size // size
    if digit.start % patch or digit.modulus % patch:
        return None
    return Axis.of((Digit(digit.origin, digit.stride * patch, size, digit.modulus // patch, digit.start // patch),))


def _permute(tracker: LayoutTracker, node: fx.Node) -> Value:
    layout = tracker.layout(_source(node))
    dims = node.args[1]
    assert isinstance(dims, list | tuple)
    return tuple(layout[dim] for dim in dims)  # type: ignore[index]


def _transpose(tracker: LayoutTracker, node: fx.Node) -> Value:
    axes = list(tracker.layout(_source(node)))
    a, b = node.args[1:3] if len(node.args) > 2 else (0, -1)
    axes[a], axes[b] = axes[b], axes[a]  # type: ignore[index]
    return tuple(axes)


def _reshape(tracker: LayoutTracker, node: fx.Node) -> Value:
    """Match the shortest stretches of old and new axes with equal products, and redistribute their digits."""
    old = tracker.layout(_source(node))
    new_shape = _shape(node.meta["val"])
    if 0 in new_shape:
        return None
    axes: list[Axis | None] = []
    i = 0
    j = 0
    while i < len(old) or j < len(new_shape):
        old_stop, new_stop = _matching_stretch([a.size for a in old], new_shape, i, j)
        merged = product(old[i:old_stop])
        sizes = new_shape[j:new_stop]
        parts = None if merged is None else merged.split(sizes)
        axes.extend(parts if parts is not None else [None] * len(sizes))
        i, j = old_stop, new_stop
    return tracker.replace_unknown(node, axes)


def _matching_stretch(old: Sequence[int], new: Sequence[int], i: int, j: int) -> tuple[int, int]:
    """The ends of the shortest stretches from i and j with equal products; trailing ones belong to the last."""
    if i == len(old) or j == len(new):
        return len(old), len(new)
    if old[i] != 1 and new[j] == 1:
        return i, j + 1
    if old[i] == 1 and new[j] != 1:
        return i + 1, j
    a, b = old[i], new[j]
    i, j = i + 1, j + 1
    while a != b:
        if a < b:
            a, i = a * old[i], i + 1
        else:
            b, j = b * new[j], j + 1
    return i, j


def _unsqueeze(tracker: LayoutTracker, node: fx.Node) -> Value:
    axes = list(tracker.layout(_source(node)))
    dim = node.args[1]
    assert isinstance(dim, int)
    axes.insert(dim if dim >= 0 else len(axes) + 1 + dim, ONE)
    return tuple(axes)


def _expand(tracker: LayoutTracker, node: fx.Node) -> Value:
    """expand, repeat: one position repeated says nothing about order."""
    layout = tracker.layout(_source(node))
    shape = _shape(node.meta["val"])
    padded = [ONE] * (len(shape) - len(layout)) + list(layout)
    axes: list[Axis | None] = []
    for i, (axis, size) in enumerate(zip(padded, shape, strict=True)):
        repeated = unknown_axis(str(node.target), i, size, neutral=True) if axis.size == 1 else None
        axes.append(axis if axis.size == size else repeated)
    return tracker.replace_unknown(node, axes)


def _dim(node: fx.Node, rank: int, position: int, default: int = 0) -> int:
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    assert isinstance(dim, int)
    return dim % rank


def _cat(tracker: LayoutTracker, node: fx.Node) -> Value:
    tensors = node.args[0]
    assert isinstance(tensors, list | tuple)
    layouts = [tracker.layout(x) for x in tensors if isinstance(x, fx.Node)]
    rank = len(_shape(node.meta["val"]))
    layouts = [layout for layout in layouts if len(layout) == rank]
    dim = _dim(node, rank, 1)
    axes = [_join_all([layout[i] for layout in layouts]) for i in range(rank)]
    axes[dim] = concatenate([layout[dim] for layout in layouts])
    return tracker.replace_unknown(node, axes)


def _stack(tracker: LayoutTracker, node: fx.Node) -> Value:
    tensors = node.args[0]
    assert isinstance(tensors, list | tuple)
    layouts = [tracker.layout(x) for x in tensors if isinstance(x, fx.Node)]
    rank = len(layouts[0])
    axes: list[Axis | None] = [_join_all([layout[i] for layout in layouts]) for i in range(rank)]
    axes.insert(_dim(node, rank + 1, 1), None)
    return tracker.replace_unknown(node, axes)


def _join_all(axes: Sequence[Axis]) -> Axis | None:
    joined: Axis | None = axes[0]
    for axis in axes[1:]:
        joined = None if joined is None else join(joined, axis)
    return joined


def _pieces(tracker: LayoutTracker, node: fx.Node) -> Value:
    """split, chunk: consecutive stretches of one axis."""
    layout = tracker.layout(_source(node))
    values = node.meta["val"]
    dim = _dim(node, len(layout), 2)
    pieces: list[Layout] = []
    start = 0
    for i, value in enumerate(values):
        shape = _shape(value)
        axis = layout[dim].slice(start, start + shape[dim])
        blank = unknown_axis(f"{node.target} (node '{node.name}')", i, shape[dim])
        pieces.append((*layout[:dim], axis or blank, *layout[dim + 1 :]))
        start += shape[dim]
    return pieces


def _unbind(tracker: LayoutTracker, node: fx.Node) -> Value:
    layout = tracker.layout(_source(node))
    dim = _dim(node, len(layout), 1)
    tracker.drop(node, layout[dim])
    return [(*layout[:dim], *layout[dim + 1 :]) for _ in node.meta["val"]]


def _slice(tracker: LayoutTracker, node: fx.Node) -> Value:
    layout = tracker.layout(_source(node))
    _, dim, start, stop, step = (*node.args, *(None,) * 4)[:5]
    dim = int(dim or 0) % len(layout)  # type: ignore[arg-type]
    size = layout[dim].size
    first, last, stride = slice(start, stop, step).indices(size)
    axes: list[Axis | None] = list(layout)
    axes[dim] = layout[dim].slice(first, last) if stride == 1 else None
    return tracker.replace_unknown(node, axes)


def _select(tracker: LayoutTracker, node: fx.Node) -> Value:
    layout = tracker.layout(_source(node))
    dim = _dim(node, len(layout), 1)
    tracker.drop(node, layout[dim])
    return (*layout[:dim], *layout[dim + 1 :])


def _pad(tracker: LayoutTracker, node: fx.Node) -> Value:
    axes: list[Axis | None] = list(tracker.layout(_source(node)))
    pads = node.args[1]
    assert isinstance(pads, list | tuple)
    made_by = f"{node.target} (node '{node.name}')"
    for i in range(len(pads) // 2):
        before, after = int(pads[2 * i]), int(pads[2 * i + 1])  # type: ignore[arg-type]
        dim = len(axes) - 1 - i
        axis = axes[dim]
        if (before, after) == (0, 0) or axis is None:
            continue
        if before < 0 or after < 0:
            axes[dim] = None
            continue
        around = [unknown_axis(made_by, dim, size) for size in (before, after)]
        stretches = [around[0]] * bool(before) + [axis] + [around[1]] * bool(after)
        axes[dim] = concatenate(stretches)
    return tracker.replace_unknown(node, axes)


def _roll(tracker: LayoutTracker, node: fx.Node) -> Value:
    axes: list[Axis | None] = list(tracker.layout(_source(node)))
    shifts, dims = node.args[1], node.args[2] if len(node.args) > 2 else []
    if not dims:
        return None
    for shift, dim in zip(shifts, dims, strict=True):  # type: ignore[arg-type]
        axis = axes[dim]
        if axis is None or axis.size == 0:
            continue
        cut = -shift % axis.size
        tail, head = axis.slice(cut, axis.size), axis.slice(0, cut)
        axes[dim] = None if tail is None or head is None else concatenate([tail, head])
    return tracker.replace_unknown(node, axes)


def _slice_scatter(tracker: LayoutTracker, node: fx.Node) -> Value:
    """Other axes mean what base or source say; the written axis is the base's, unless only its size is."""
    base, source = node.args[:2]
    assert isinstance(base, fx.Node) and isinstance(source, fx.Node)
    into, written = tracker.layout(base), tracker.layout(source)
    dim = _dim(node, len(into), 2)
    axes: list[Axis | None] = [join(a, b) for a, b in zip(into, written, strict=True)]
    axes[dim] = tracker.unless_filled(node, into[dim])
    return tracker.replace_unknown(node, axes)


def _reduce(tracker: LayoutTracker, node: fx.Node) -> Value:
    layout = tracker.layout(_source(node))
    rank = len(layout)
    dims = node.args[1] if len(node.args) > 1 else None
    if isinstance(dims, int):
        dims = [dims]
    if not isinstance(dims, list | tuple):
        return None
    reduced = {int(dim) % rank for dim in dims}
    keep = len(_shape(node.meta["val"])) == rank
    if keep:
        return tuple(ONE if i in reduced else axis for i, axis in enumerate(layout))
    return tuple(axis for i, axis in enumerate(layout) if i not in reduced)


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

_TRANSFERS: dict[Any, Transfer] = {
    **dict.fromkeys(
        [
            aten.layer_norm,
            aten.rms_norm,
            aten._fused_rms_norm,
            aten.group_norm,
            aten.softmax,
            aten._softmax,
            aten.dropout,
            aten.clone,
            aten.contiguous,
            aten._to_copy,
            aten.to,
            aten.type_as,
            aten.detach,
            aten.alias,
            aten.lift_fresh_copy,
            aten.cumsum,
            aten.feature_dropout,
        ],
        _same_as_input,
    ),
    aten.copy: _elementwise,
    aten.linear: _linear,
    **dict.fromkeys([aten.matmul, aten.mm, aten.bmm, aten.addmm, aten.baddbmm], _matmul),
    aten.scaled_dot_product_attention: _attention,
    WINDOW_ATTENTION.overloadpacket: _attention,
    **dict.fromkeys([aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution], _convolution),
    aten.permute: _permute,
    **dict.fromkeys([aten.transpose, aten.t], _transpose),
    **dict.fromkeys(
        [
            aten.view,
            aten.reshape,
            aten._unsafe_view,
            aten.flatten,
            aten.unflatten,
            aten.squeeze,
        ],
        _reshape,
    ),
    aten.unsqueeze: _unsqueeze,
    **dict.fromkeys([aten.expand, aten.repeat], _expand),
    **dict.fromkeys([aten.cat, aten.concat, aten.concatenate], _cat),
    aten.stack: _stack,
    **dict.fromkeys([aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split], _pieces),
    aten.unbind: _unbind,
    aten.slice: _slice,
    aten.select: _select,
    **dict.fromkeys([aten.constant_pad_nd, aten.pad], _pad),
    aten.roll: _roll,
    aten.slice_scatter: _slice_scatter,
    **dict.fromkeys([aten.mean, aten.sum, aten.amax, aten.amin, aten.var, aten.std], _reduce),
}
