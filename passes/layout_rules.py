"""Rules for layouts: where an operation puts the tokens of its operands, one rule per kind of operation.

A rule gets the tracker and the call. None stands for axes of unknown meaning.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from t3compile.ops import WINDOW_ATTENTION
from t3compile.passes.aten_calls import node_shape
from t3compile.passes.layout import (
    ONE,
    Axis,
    Digit,
    Layout,
    Segment,
    concatenate,
    join,
    product,
    segment_size,
    single_digit,
    unknown_axis,
)

if TYPE_CHECKING:
    from t3compile.passes.track_layout import LayoutTracker

aten = torch.ops.aten

# Of one tensor, or of every tensor of a call that yields several.
LayoutValue = Layout | list[Layout] | None
Transfer = Callable[["LayoutTracker", fx.Node], LayoutValue]


def maker_of(node: fx.Node) -> str:
    """The node in words, as reasons name the maker of an axis of unknown meaning."""
    return f"{node.target} (node '{node.name}')"


def transfer_for(target: Any) -> Transfer | None:
    """The rule for calls of an operator; None where there is none."""
    if target is operator.getitem:
        return _getitem
    packet = getattr(target, "overloadpacket", None)
    if packet in _TRANSFERS:
        return _TRANSFERS[packet]
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return _elementwise
    return None


def _getitem(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    source, index = node.args
    assert isinstance(source, fx.Node)
    value = tracker.value(source)
    if isinstance(value, list) and isinstance(index, int) and index < len(value):
        return value[index]
    return None


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _same_as_input(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    return tracker.layout(_source(node))


def _elementwise(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """Broadcast: an output axis means what its operands say that have its full size."""
    shape = node_shape(node)
    axes: list[Axis | None] = [None] * len(shape)
    conflicts: set[int] = set()
    operands = [x for x in node.all_input_nodes if isinstance(x.meta.get("val"), Tensor)]
    layouts = [(x, len(shape) - len(tracker.layout(x)), tracker.layout(x)) for x in operands]
    for _, skipped, layout in layouts:
        for i, axis in enumerate(layout, start=skipped):
            if axis.size != shape[i] or i in conflicts:
                continue
            present = axes[i]
            axes[i] = axis if present is None else join(present, axis)
            if axes[i] is None:
                conflicts.add(i)
    for operand, skipped, layout in layouts:
        for i, joined in enumerate(axes):
            own = layout[i - skipped] if i >= skipped else ONE
            if joined is not None and own.size > 1 and own != joined:
                tracker.meet(joined, operand, i - skipped)
    return tracker.replace_unknown(node, axes)


def _linear(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """[..., K] @ weight -> [..., M]: the last axis is new; where it held an input's tokens, they are mixed."""
    *outer, mixed = tracker.layout(_source(node))
    if any(digit.origin.is_known and digit.is_whole for segment in mixed.segments for digit in segment):
        return tracker.replace_unknown(node, [*outer, None])
    return (*outer, tracker.features(node, -1))


def _matmul(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """[..., M, K] @ [..., K, N] -> [..., M, N]."""
    tensors = [x for x in node.args if isinstance(x, fx.Node)][-2:]
    a, b = (tracker.layout(x) for x in tensors)
    rank = len(node_shape(node))
    if len(a) != rank or len(b) != rank:
        return None
    batch = [join(x, y) if x.size == y.size else None for x, y in zip(a[:-2], b[:-2], strict=True)]
    return tracker.replace_unknown(node, [*batch, *(tracker.unless_filled(node, x) for x in (a[-2], b[-1]))])


def _attention(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """[B, N, S, D]: the queries' tokens, the values' depth."""
    q, v = node.args[0], node.args[2]
    assert isinstance(q, fx.Node) and isinstance(v, fx.Node)
    *outer, tokens, _ = tracker.layout(q)
    return tracker.replace_unknown(node, [*outer, tracker.unless_filled(node, tokens), tracker.layout(v)[-1]])


def _convolution(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """[B, C, *space]: positions stay ordered, `stride` input positions become one."""
    layout = tracker.layout(_source(node))
    out_shape = node_shape(node)
    axes: list[Axis | None] = [layout[0], tracker.features(node, 1)]
    for axis, size in zip(layout[2:], out_shape[2:], strict=True):
        axes.append(_strided(_without_padding(axis, size), size))
    return tracker.replace_unknown(node, axes)


def _without_padding(axis: Axis, size: int) -> Axis:
    """The one stretch of whole patches that is not padding, where the axis is that and padding around it."""
    stretches = [segment for segment in axis.segments if not Axis((segment,)).is_neutral]
    if len(stretches) != 1 or len(axis.segments) == 1:
        return axis
    length = segment_size(stretches[0])
    is_around = length == size or (axis.size % size and not length % size)
    return Axis((stretches[0],)) if is_around else axis


def _strided(axis: Axis, size: int) -> Axis | None:
    """An axis cut into `size` equal patches, or its patches cut up into `size` smaller ones."""
    if axis.size == size:
        return axis
    if size == 1:
        return ONE
    digit = single_digit(axis)
    if digit is not None and digit.origin.is_known and size % axis.size == 0:
        parts = size // axis.size
        if digit.stride % parts == 0:
            finer = Digit(digit.origin, digit.stride // parts, size, digit.modulus * parts, digit.start * parts)
            return Axis.of((finer,))
    if axis.size % size:
        return None
    patch = axis.size // size
    stretches = [_strided_stretch(segment, patch) for segment in axis.segments]
    if None in stretches and digit is not None:
        # Patches across the parts of a lengthened axis.
        stretches = [_strided_stretch((digit,), patch)]
    return None if None in stretches else Axis.of(*(stretch for stretch in stretches if stretch is not None))


def _strided_stretch(segment: Segment, patch: int) -> Segment | None:
    if len(segment) != 1:
        return None
    (digit,) = segment
    if digit.size % patch or digit.start % patch or digit.modulus % patch:
        return None
    sizes = (digit.size // patch, digit.modulus // patch, digit.start // patch)
    return (Digit(digit.origin, digit.stride * patch, *sizes),)


def _permute(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    layout = tracker.layout(_source(node))
    dims = node.args[1]
    assert isinstance(dims, list | tuple)
    return tuple(layout[dim] for dim in dims)  # type: ignore[index]


def _transpose(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    axes = list(tracker.layout(_source(node)))
    a, b = node.args[1:3] if len(node.args) > 2 else (0, -1)
    axes[a], axes[b] = axes[b], axes[a]  # type: ignore[index]
    return tuple(axes)


def _reshape(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """Match the shortest stretches of old and new axes with equal products, and redistribute their digits."""
    old = tracker.layout(_source(node))
    new_shape = node_shape(node)
    if 0 in new_shape:
        return None
    axes: list[Axis | None] = []
    i = 0
    j = 0
    while i < len(old) or j < len(new_shape):
        old_stop, new_stop = _matching_stretch([a.size for a in old], new_shape, i, j)
        merged = product(old[i:old_stop])
        sizes = new_shape[j:new_stop]
        parts = merged.split(sizes)
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


def _unsqueeze(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    axes = list(tracker.layout(_source(node)))
    dim = node.args[1]
    assert isinstance(dim, int)
    axes.insert(dim if dim >= 0 else len(axes) + 1 + dim, ONE)
    return tuple(axes)


def _expand(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """expand, repeat: one position repeated says nothing about order."""
    layout = tracker.layout(_source(node))
    shape = node_shape(node)
    padded = [ONE] * (len(shape) - len(layout)) + list(layout)
    axes: list[Axis | None] = []
    for i, (axis, size) in enumerate(zip(padded, shape, strict=True)):
        repeated = unknown_axis(str(node.target), i, size) if axis.size == 1 else None
        axes.append(axis if axis.size == size else repeated)
    return tracker.replace_unknown(node, axes)


def _dim(node: fx.Node, rank: int, position: int, default: int = 0) -> int:
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    assert isinstance(dim, int)
    return dim % rank


def _cat(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    tensors = node.args[0]
    assert isinstance(tensors, list | tuple)
    layouts = [tracker.layout(x) for x in tensors if isinstance(x, fx.Node)]
    rank = len(node_shape(node))
    layouts = [layout for layout in layouts if len(layout) == rank]
    dim = _dim(node, rank, 1)
    # Across the stretches the longest names the axes: a reference frame has those of the video.
    by_length = sorted(layouts, key=lambda layout: -layout[dim].size)
    axes = [_join_all([layout[i] for layout in by_length]) for i in range(rank)]
    axes[dim] = concatenate([layout[dim] for layout in layouts])
    return tracker.replace_unknown(node, axes)


def _stack(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    tensors = node.args[0]
    assert isinstance(tensors, list | tuple)
    layouts = [tracker.layout(x) for x in tensors if isinstance(x, fx.Node)]
    rank = len(layouts[0])
    axes: list[Axis | None] = [_join_all([layout[i] for layout in layouts]) for i in range(rank)]
    axes.insert(_dim(node, rank + 1, 1), None)
    return tracker.replace_unknown(node, axes)


def _pad_sequence(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """Sequences of one length, or padded behind, stacked along a new batch axis."""
    tensors, batch_first = node.args[0], bool(node.args[1]) if len(node.args) > 1 else False
    assert isinstance(tensors, list | tuple)
    layouts = [tracker.layout(x) for x in tensors if isinstance(x, fx.Node)]
    longest = max(layout[0].size for layout in layouts)
    made_by = maker_of(node)
    padded = [concatenate([x[0], unknown_axis(made_by, 0, longest - x[0].size)]) for x in layouts]
    tokens = _join_all(padded)
    batch = ONE if len(layouts) == 1 else None
    rest = [_join_all([layout[i] for layout in layouts]) for i in range(1, len(layouts[0]))]
    outer = [batch, tokens] if batch_first else [tokens, batch]
    return tracker.replace_unknown(node, [*outer, *rest])


def _join_all(axes: Sequence[Axis]) -> Axis | None:
    joined: Axis | None = axes[0]
    for axis in axes[1:]:
        joined = None if joined is None else join(joined, axis)
    return joined


def _pieces(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """split, chunk: consecutive stretches of one axis."""
    layout = tracker.layout(_source(node))
    values = node.meta["val"]
    dim = _dim(node, len(layout), 2)
    pieces: list[Layout] = []
    start = 0
    for i, value in enumerate(values):
        size = int(value.shape[dim])
        axis = layout[dim].slice(start, start + size)
        blank = unknown_axis(maker_of(node), i, size, tracker.reach(node))
        pieces.append((*layout[:dim], axis or blank, *layout[dim + 1 :]))
        start += size
    return pieces


def _unbind(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    layout = tracker.layout(_source(node))
    dim = _dim(node, len(layout), 1)
    tracker.drop(node, layout[dim])
    return [(*layout[:dim], *layout[dim + 1 :]) for _ in node.meta["val"]]


def _slice(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    layout = tracker.layout(_source(node))
    _, dim, start, stop, step = (*node.args, *(None,) * 4)[:5]
    dim = int(dim or 0) % len(layout)  # type: ignore[arg-type]
    size = layout[dim].size
    first, last, stride = slice(start, stop, step).indices(size)
    axes: list[Axis | None] = list(layout)
    axes[dim] = layout[dim].slice(first, last) if stride == 1 else None
    return tracker.replace_unknown(node, axes)


def _select(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    layout = tracker.layout(_source(node))
    dim = _dim(node, len(layout), 1)
    tracker.drop(node, layout[dim])
    return (*layout[:dim], *layout[dim + 1 :])


def _pad(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    axes: list[Axis | None] = list(tracker.layout(_source(node)))
    pads = node.args[1]
    assert isinstance(pads, list | tuple)
    made_by = maker_of(node)
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


def _roll(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
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


def _slice_scatter(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """A stretch of the base is replaced by the source."""
    base, source = node.args[:2]
    assert isinstance(base, fx.Node) and isinstance(source, fx.Node)
    into, written = tracker.layout(base), tracker.layout(source)
    _, _, dim, start, stop, step = (*node.args, *(None,) * 4)[:6]
    dim = int(dim or 0) % len(into)  # type: ignore[arg-type]
    first, last, stride = slice(start, stop, step).indices(into[dim].size)
    axes: list[Axis | None] = [join(a, b) for a, b in zip(into, written, strict=True)]
    before, after = into[dim].slice(0, first), into[dim].slice(last, into[dim].size)
    is_whole = before is not None and after is not None and stride == 1
    axes[dim] = concatenate([before, written[dim], after]) if is_whole else None  # type: ignore[list-item]
    return tracker.replace_unknown(node, axes)


def _select_scatter(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """One position of the base is replaced by the source."""
    base, source = node.args[:2]
    assert isinstance(base, fx.Node) and isinstance(source, fx.Node)
    into, written = tracker.layout(base), list(tracker.layout(source))
    dim = _dim(node, len(into), 2)
    written.insert(dim, ONE)
    axes: list[Axis | None] = [join(a, b) for a, b in zip(into, written, strict=True)]
    if into[dim].size == 1:
        return tuple(written)
    axes[dim] = into[dim]
    return tracker.replace_unknown(node, axes)


def _take(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """index_select: positions picked by a constant index."""
    layout = tracker.layout(_source(node))
    index = node.args[2]
    assert isinstance(index, fx.Node)
    return _picked(tracker, node, layout, _dim(node, len(layout), 1), tracker.read_index(index))


def _index(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """x[:, index]: one axis picked by a constant index of any rank, or by a constant mask."""
    layout = tracker.layout(_source(node))
    indices = node.args[1]
    assert isinstance(indices, list | tuple)
    given = [i for i, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        return None
    index = indices[given[0]]
    assert isinstance(index, fx.Node)
    return _picked(tracker, node, layout, given[0], tracker.read_index(index))


def _gather(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """gather by a constant index that is the same along all other axes."""
    layout = tracker.layout(_source(node))
    index_node = node.args[2]
    assert isinstance(index_node, fx.Node)
    index = tracker.read_index(index_node)
    dim = _dim(node, len(layout), 1)
    if index is None or index.numel() == 0:
        return None
    rows = index.movedim(dim, 0).flatten(1)
    same = bool((rows == rows[:, :1]).all()) and all(
        size == axis.size for i, (size, axis) in enumerate(zip(index.shape, layout, strict=True)) if i != dim
    )
    return _picked(tracker, node, layout, dim, rows[:, 0]) if same else None


def _index_copy(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """Rows of the source written at the positions of an index: index_copy, scatter, scatter_add."""
    base, _, index_node, source = node.args[:4]
    assert isinstance(base, fx.Node) and isinstance(index_node, fx.Node)
    if not isinstance(source, fx.Node):
        return None
    dim = _dim(node, len(tracker.layout(base)), 1)
    index = tracker.read_index(index_node)
    if index is not None and index.dim() > 1:
        rows = index.movedim(dim, 0).flatten(1)
        index = rows[:, 0] if bool((rows == rows[:, :1]).all()) else None
    return _written(tracker, node, base, source, dim, index)


def _index_put(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """base[:, index] = source with one index."""
    base, indices, source = node.args[:3]
    assert isinstance(base, fx.Node) and isinstance(indices, list | tuple) and isinstance(source, fx.Node)
    given = [i for i, index in enumerate(indices) if index is not None]
    if len(given) != 1 or len(tracker.layout(source)) != len(tracker.layout(base)):
        return None
    index = indices[given[0]]
    assert isinstance(index, fx.Node)
    return _written(tracker, node, base, source, given[0], tracker.read_index(index))


def _written(
    tracker: LayoutTracker, node: fx.Node, base: fx.Node, source: fx.Node, dim: int, index: Tensor | None
) -> LayoutValue:
    into, written = tracker.layout(base), tracker.layout(source)
    if index is None or len(into) != len(written):
        return None
    if index.dtype == torch.bool:
        index = index.nonzero().flatten()
    if index.dim() != 1 or len(index) != written[dim].size:
        return None
    origin_of = dict(zip((int(i) % into[dim].size for i in index.tolist()), range(len(index)), strict=True))
    axes: list[Axis | None] = [join(a, b) for a, b in zip(into, written, strict=True)]
    # Positions of the source follow those of the base in one numbering, so that runs of either are stretches.
    both = concatenate([into[dim], unknown_axis("a gap", dim, 1), written[dim]])
    first = into[dim].size + 1
    axes[dim] = both.take([first + origin_of[i] if i in origin_of else i for i in range(into[dim].size)])
    return tracker.replace_unknown(node, axes)


def _picked(tracker: LayoutTracker, node: fx.Node, layout: Layout, dim: int, index: Tensor | None) -> LayoutValue:
    if index is None:
        return None
    if index.dtype == torch.bool:
        if index.dim() != 1:
            return None
        index = index.nonzero().flatten()
    positions = [int(i) % layout[dim].size for i in index.flatten().tolist()]
    taken = layout[dim].take(positions)
    parts = None if taken is None else taken.split(tuple(index.shape))
    blank: list[Axis | None] = [None] * index.dim()
    axes: list[Axis | None] = [*layout[:dim], *(blank if parts is None else parts), *layout[dim + 1 :]]
    return tracker.replace_unknown(node, axes)


def _repeat_interleave(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """Every position `repeats` times in a row: a product with an axis that says nothing."""
    layout = tracker.layout(_source(node))
    repeats = node.args[1]
    if not isinstance(repeats, int) or (len(node.args) < 3 and node.kwargs.get("dim") is None):
        return None
    axes = list(layout)
    dim = _dim(node, len(layout), 2)
    copies = unknown_axis(str(node.target), dim, repeats)
    axes[dim] = product([axes[dim], copies])
    return tuple(axes)


def _flip(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    layout = tracker.layout(_source(node))
    dims = node.args[1]
    assert isinstance(dims, list | tuple)
    made_by = maker_of(node)
    turned = {int(dim) % len(layout) for dim in dims}  # type: ignore[arg-type]
    return tuple(axis.reversed(made_by) if i in turned else axis for i, axis in enumerate(layout))


def _as_complex(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    return tracker.layout(_source(node))[:-1]


def _as_real(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    return tracker.replace_unknown(node, [*tracker.layout(_source(node)), None])


def _resample(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """Pooling or upsampling over [..., *space] by whole factors: positions stay ordered."""
    layout = tracker.layout(_source(node))
    shape = node_shape(node)
    axes = [axis if axis.size == size else _strided(axis, size) for axis, size in zip(layout, shape, strict=True)]
    return tracker.replace_unknown(node, axes)


def _transposed_convolution(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """Patches that neither overlap nor leave gaps."""
    weight, stride = node.args[1], node.args[3] if len(node.args) > 3 else ()
    assert isinstance(weight, fx.Node) and isinstance(stride, list | tuple)
    return _resample(tracker, node) if node_shape(weight)[2:] == tuple(stride) else None


def _first_as_input(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """Several results of which the first has the input's axes; statistics follow."""
    return [tracker.layout(_source(node))]


def _pixel_unshuffle(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """[..., C, H*r, W*r] -> [..., C*r*r, H, W]."""
    *outer, _, h, w = tracker.layout(_source(node))
    size_h, size_w = node_shape(node)[-2:]
    return tracker.replace_unknown(node, [*outer, None, _strided(h, size_h), _strided(w, size_w)])


def _pixel_shuffle(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """[..., C*r*r, H, W] -> [..., C, H*r, W*r]."""
    *outer, _, h, w = tracker.layout(_source(node))
    size_h, size_w = node_shape(node)[-2:]
    return tracker.replace_unknown(node, [*outer, None, _strided(h, size_h), _strided(w, size_w)])


def _unfold(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """Patches along one axis that do not overlap: [.., L, ..] -> [.., L/size, .., size]."""
    layout = tracker.layout(_source(node))
    _, dim, size, step = node.args
    assert isinstance(dim, int) and isinstance(size, int)
    dim %= len(layout)
    is_cut = size == step and layout[dim].size % size == 0
    outer, inner = (layout[dim].split((layout[dim].size // size, size)) if is_cut else None) or (None, None)
    return tracker.replace_unknown(node, [*layout[:dim], outer, *layout[dim + 1 :], inner])


def _im2col(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """F.unfold with patches that do not overlap: [B, C, H, W] -> [B, C*k*k, (H/k)*(W/k)]."""
    layout = tracker.layout(_source(node))
    _, kernel, dilation, padding, stride = node.args
    if len(layout) != 4 or kernel != stride or set(dilation) != {1} or set(padding) != {0}:  # type: ignore[arg-type]
        return None
    patches = []
    for axis, size in zip(layout[2:], kernel, strict=True):  # type: ignore[arg-type]
        patches.append(_strided(axis, axis.size // size) if axis.size % size == 0 else None)
    rows, columns = patches
    tokens = None if rows is None or columns is None else product([rows, columns])
    return tracker.replace_unknown(node, [layout[0], None, tokens])


def _einsum(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """A letter of the output means what the operands say that have it."""
    equation, operands = node.args[:2]
    assert isinstance(equation, str) and isinstance(operands, list | tuple)
    left, arrow, right = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation:
        return None
    meanings: dict[str, Axis | None] = {}
    for letters, operand in zip(left.split(","), operands, strict=True):
        assert isinstance(operand, fx.Node)
        for letter, axis in zip(letters, tracker.layout(operand), strict=True):
            present = meanings.get(letter, axis)
            meanings[letter] = None if present is None else join(present, axis)
    axes = [meanings[letter] for letter in right]
    return tracker.replace_unknown(node, [None if a is None else tracker.unless_filled(node, a) for a in axes])


def _reduce(tracker: LayoutTracker, node: fx.Node, position: int = 1) -> LayoutValue:
    layout = tracker.layout(_source(node))
    rank = len(layout)
    dims = node.args[position] if len(node.args) > position else None
    if isinstance(dims, int):
        dims = [dims]
    if not isinstance(dims, list | tuple):
        return None
    reduced = {int(dim) % rank for dim in dims}
    keep = len(node_shape(node)) == rank
    if keep:
        return tuple(ONE if i in reduced else axis for i, axis in enumerate(layout))
    return tuple(axis for i, axis in enumerate(layout) if i not in reduced)


def _norm(tracker: LayoutTracker, node: fx.Node) -> LayoutValue:
    """The length of vectors: their order p comes before the axes."""
    return _reduce(tracker, node, position=2)


_TRANSFERS: dict[Any, Transfer] = {
    **dict.fromkeys(
        [
            aten.layer_norm,
            aten.rms_norm,
            aten._fused_rms_norm,
            aten.group_norm,
            aten.instance_norm,
            aten.prelu,
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
    aten._native_batch_norm_legit_no_training: _first_as_input,
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
    **dict.fromkeys([aten.expand, aten.repeat, aten.tile], _expand),
    **dict.fromkeys([aten.cat, aten.concat, aten.concatenate], _cat),
    aten.stack: _stack,
    aten.pad_sequence: _pad_sequence,
    **dict.fromkeys([aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split], _pieces),
    aten.unbind: _unbind,
    aten.slice: _slice,
    aten.select: _select,
    **dict.fromkeys([aten.constant_pad_nd, aten.pad], _pad),
    aten.roll: _roll,
    aten.slice_scatter: _slice_scatter,
    aten.select_scatter: _select_scatter,
    aten.index_select: _take,
    aten.index: _index,
    aten.gather: _gather,
    **dict.fromkeys([aten.index_copy, aten.scatter, aten.scatter_add, aten.index_add], _index_copy),
    aten.index_put: _index_put,
    aten.flip: _flip,
    aten.repeat_interleave: _repeat_interleave,
    aten.view_as_complex: _as_complex,
    aten.view_as_real: _as_real,
    **dict.fromkeys([aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, aten.max_pool2d, aten.max_pool3d], _resample),
    **dict.fromkeys([aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d], _resample),
    **dict.fromkeys([aten.upsample_bilinear2d, aten.upsample_trilinear3d], _resample),
    aten.pixel_unshuffle: _pixel_unshuffle,
    aten.pixel_shuffle: _pixel_shuffle,
    aten.unfold: _unfold,
    aten.im2col: _im2col,
    aten.einsum: _einsum,
    **dict.fromkeys([aten.linalg_vector_norm, aten.norm], _norm),
    **dict.fromkeys([aten.logsumexp, aten.prod], _reduce),
    **dict.fromkeys([aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d], _transposed_convolution),
    **dict.fromkeys([aten.mean, aten.sum, aten.amax, aten.amin, aten.var, aten.std], _reduce),
}
