"""Rules for operations that move, copy, convert or reduce values: what they make of value numbers.

A rule gets the analysis and the call. None stands for a result of which nothing is known; so does ValueError, which
the analysis raises where it has no numbers, and every error of arguments that a rule does not read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from t3compile.passes.aten_calls import arguments_of, element_counts, node_shape, operator_name
from t3compile.passes.value_numbers import LARGEST, Numbers, concatenate
from t3compile.passes.value_ranges import Reduction, all_of, any_of, largest_of, smallest_of, sum_of

if TYPE_CHECKING:
    from t3compile.passes.bound_values import ValueBounds

# Of one tensor, or of every tensor of a call that yields several.
NumbersValue = Numbers | list[Numbers | None] | None
MovementRule = Callable[["ValueBounds", fx.Node], NumbersValue]


def _same(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    return analysis.value(node.args[0])


def _reshaped(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if node.meta["val"].dtype != source.meta["val"].dtype:
        return None  # a view of the same bytes as another dtype
    return analysis.value(source).reshape(node_shape(node))


def _expanded(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    return analysis.value(node.args[0]).expand(node_shape(node))


def _permuted(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    numbers = analysis.value(node.args[0])
    rank = len(numbers.shape)
    return numbers.permute([d % rank for d in arguments_of(node)["dims"]])


def _transposed(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    numbers = analysis.value(node.args[0])
    rank = len(numbers.shape)
    dims = list(range(rank))
    if rank > 1:
        given = arguments_of(node)
        a, b = given.get("dim0", given.get("axis0", 0)) % rank, given.get("dim1", given.get("axis1", 1)) % rank
        dims[a], dims[b] = dims[b], dims[a]
    return numbers.permute(dims)


def _sliced(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    numbers = analysis.value(node.args[0])
    given = arguments_of(node)
    dim = given["dim"] % len(numbers.shape)
    return numbers.take(dim, torch.arange(numbers.shape[dim])[slice(given["start"], given["end"], given["step"])])


def _narrowed(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    numbers = analysis.value(node.args[0])
    given = arguments_of(node)
    dim = given["dim"] % len(numbers.shape)
    start = given["start"] % numbers.shape[dim]
    return numbers.slice(dim, start, start + given["length"])


def _selected(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    numbers = analysis.value(node.args[0])
    given = arguments_of(node)
    dim = given["dim"] % len(numbers.shape)
    index = given["index"] % numbers.shape[dim]
    return numbers.slice(dim, index, index + 1).reshape(node_shape(node))


def _cut(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    """split, chunk: consecutive stretches of one axis."""
    numbers = analysis.value(node.args[0])
    dim = arguments_of(node)["dim"] % len(numbers.shape)
    stops = torch.tensor([value.shape[dim] for value in node.meta["val"]]).cumsum(0).tolist()
    return [numbers.slice(dim, start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _unbound(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    numbers = analysis.value(node.args[0])
    dim = arguments_of(node)["dim"] % len(numbers.shape)
    shape = (*numbers.shape[:dim], *numbers.shape[dim + 1 :])
    return [numbers.slice(dim, i, i + 1).reshape(shape) for i in range(numbers.shape[dim])]


def _index_selected(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    numbers = analysis.value(node.args[0])
    given = arguments_of(node)
    return numbers.take(given["dim"] % len(numbers.shape), analysis.exact(given["index"]).reshape(-1).long())


def _flipped(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    numbers = analysis.value(node.args[0])
    for dim in arguments_of(node)["dims"]:
        dim %= len(numbers.shape)
        numbers = numbers.take(dim, torch.arange(numbers.shape[dim]).flip(0))
    return numbers


def _repeated(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    numbers = analysis.value(node.args[0])
    given = arguments_of(node)
    repeats = list(given["repeats"] if "repeats" in given else given["dims"])
    numbers = numbers.lifted(max(len(repeats), len(numbers.shape)))
    repeats = [1] * (len(numbers.shape) - len(repeats)) + repeats
    for dim, repeat in enumerate(repeats):
        if repeat != 1:
            numbers = numbers.take(dim, torch.arange(numbers.shape[dim]).repeat(repeat))
    return numbers


def _interleaved(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    given = arguments_of(node)
    numbers = analysis.value(given["self"])
    if not isinstance(given["repeats"], int) or given["dim"] is None:
        return None
    dim = given["dim"] % len(numbers.shape)
    return numbers.take(dim, torch.arange(numbers.shape[dim]).repeat_interleave(given["repeats"]))


def _cat(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    result = node.meta["val"]
    given = arguments_of(node)
    tensors = [x for x in given["tensors"] if x.meta["val"].dim() == result.dim()]
    parts = [analysis.cast(analysis.value(x), x.meta["val"].dtype, result.dtype) for x in tensors]
    return concatenate(parts, given["dim"] % result.dim())


def _stacked(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    result = node.meta["val"]
    given = arguments_of(node)
    dim = given["dim"] % result.dim()
    parts: list[Numbers] = []
    for x in given["tensors"]:
        numbers = analysis.cast(analysis.value(x), x.meta["val"].dtype, result.dtype)
        reshaped = numbers.reshape((*numbers.shape[:dim], 1, *numbers.shape[dim:]))
        if reshaped is None:
            return None
        parts.append(reshaped)
    return concatenate(parts, dim)


def _padded(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    numbers: Numbers | None = analysis.value(node.args[0])
    given = arguments_of(node)
    if given.get("mode", "constant") != "constant":
        return None
    fill = torch.full((), given["value"] or 0, dtype=node.meta["val"].dtype)
    pads = given["pad"]
    for i in range(len(pads) // 2):
        if numbers is None:
            return None
        dim = len(numbers.shape) - 1 - i
        before, after = pads[2 * i], pads[2 * i + 1]
        numbers = numbers.slice(dim, max(-before, 0), numbers.shape[dim] - max(-after, 0))
        around = [
            analysis.filled(fill, (*numbers.shape[:dim], max(size, 0), *numbers.shape[dim + 1 :]))
            for size in (before, after)
        ]
        numbers = concatenate([around[0], numbers, around[1]], dim)
    return numbers


def _filled(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    """full, zeros, ones and their kin."""
    name = operator_name(node)
    assert name is not None
    given = arguments_of(node)
    value = given.get("fill_value", given.get("value", 1.0 if "ones" in name else 0.0))
    result = node.meta["val"]
    if isinstance(value, fx.Node):
        source = analysis.cast(analysis.value(value), value.meta["val"].dtype, result.dtype)
        return source.expand(node_shape(node))
    if isinstance(value, complex):
        return None
    return analysis.filled(torch.full((), value, dtype=result.dtype), node_shape(node))


def _converted(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return analysis.cast(analysis.value(source), source.meta["val"].dtype, node.meta["val"].dtype)


def _copied(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    source = node.args[1]
    assert isinstance(source, fx.Node)
    numbers = analysis.cast(analysis.value(source), source.meta["val"].dtype, node.meta["val"].dtype)
    return numbers.expand(node_shape(node))


def _slice_scattered(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    """Contiguous stretches only: what is before, the new values, what is behind."""
    given = arguments_of(node)
    base = analysis.value(given["self"])
    dim = given["dim"] % len(base.shape)
    start, stop, step = slice(given["start"], given["end"], given["step"]).indices(base.shape[dim])
    if step != 1:
        return None
    return _with_stretch(analysis, node, base, given["src"], dim, start, max(stop, start))


def _select_scattered(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    given = arguments_of(node)
    base = analysis.value(given["self"])
    dim = given["dim"] % len(base.shape)
    index = given["index"] % base.shape[dim]
    return _with_stretch(analysis, node, base, given["src"], dim, index, index + 1)


def _with_stretch(
    analysis: ValueBounds, node: fx.Node, base: Numbers, source: fx.Node, dim: int, start: int, stop: int
) -> NumbersValue:
    inserted: Numbers | None = analysis.cast(analysis.value(source), source.meta["val"].dtype, node.meta["val"].dtype)
    shape = (*base.shape[:dim], stop - start, *base.shape[dim + 1 :])
    if inserted is not None and len(inserted.shape) < len(shape):
        inserted = inserted.reshape(shape)
    if inserted is None or start == stop:
        return base if start == stop else None
    parts = [base.slice(dim, 0, start), inserted.expand(shape), base.slice(dim, stop, base.shape[dim])]
    return concatenate(parts, dim)


def _triangle(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    """tril, triu: zeros outside of the triangle."""
    dense = analysis.value(node.args[0]).dense()
    if dense is None:
        return None
    inside = torch.ones(dense.shape[-2:], dtype=torch.bool)
    diagonal = arguments_of(node)["diagonal"]
    inside = inside.tril(diagonal) if operator_name(node) == "tril" else inside.triu(diagonal)
    zero = analysis.constant(torch.zeros((), dtype=node.meta["val"].dtype)).core
    return Numbers.of(torch.where(inside, dense, zero))


def _moved(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    """Operations that only move values to constant places, carried out on the numbers themselves."""
    given = arguments_of(node)
    if given.get("accumulate") or given.get("reduce"):
        return None
    dtype = node.meta["val"].dtype
    arguments: dict[str, Any] = {}
    for name, value in given.items():
        if name in ("self", "src", "source", "values") and isinstance(value, fx.Node):
            dense = analysis.value(value).dense()
            if dense is None or value.meta["val"].dtype != dtype:
                return None
            arguments[name] = dense
        elif name == "value":
            arguments[name] = int(analysis.constant(torch.full((), value, dtype=dtype)).core)
        else:
            arguments[name] = fx.map_arg(value, analysis.exact)
    if sum(element_counts(node)) > LARGEST:
        return None
    assert callable(node.target)
    moved = node.target(**arguments)
    return Numbers.of(moved)


def _dims(node: fx.Node) -> list[int]:
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    dim = arguments_of(node).get("dim")
    if dim is None or dim == []:
        return list(range(rank))
    return [d % rank for d in ([dim] if isinstance(dim, int) else dim)] if rank else []


def _reduced(rule: Reduction) -> MovementRule:
    def reduction(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
        dims = _dims(node)
        if not dims:
            return None
        reduced = analysis.reduce(node, dims, rule)
        result = node.meta["val"]
        if isinstance(result, Tensor):
            return None if reduced is None else reduced.reshape(tuple(result.shape))
        # max and min along an axis also say where; of that nothing is known.
        return [None if reduced is None else reduced.reshape(tuple(result[0].shape)), None]

    return reduction


def _accumulated(analysis: ValueBounds, node: fx.Node) -> NumbersValue:
    """cumsum."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    numbers = analysis.value(source)
    if not numbers.shape:
        return None
    return analysis.accumulate(node, numbers, arguments_of(node)["dim"] % len(numbers.shape))


MOVEMENT_RULES: dict[str, MovementRule] = {
    **dict.fromkeys(("clone", "contiguous", "detach", "alias", "lift_fresh_copy", "lift_fresh"), _same),
    **dict.fromkeys(
        ("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "view_as", "reshape_as", "ravel"),
        _reshaped,
    ),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expanded),
    "permute": _permuted,
    **dict.fromkeys(("transpose", "t"), _transposed),
    "slice": _sliced,
    "narrow": _narrowed,
    "select": _selected,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _cut),
    "unbind": _unbound,
    "index_select": _index_selected,
    "flip": _flipped,
    **dict.fromkeys(("repeat", "tile"), _repeated),
    "repeat_interleave": _interleaved,
    "cat": _cat,
    "stack": _stacked,
    **dict.fromkeys(("constant_pad_nd", "pad"), _padded),
    **dict.fromkeys(
        (
            *("full", "zeros", "ones", "full_like", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones"),
            *("fill", "zero"),
        ),
        _filled,
    ),
    "to": _converted,
    "copy": _copied,
    "slice_scatter": _slice_scattered,
    "select_scatter": _select_scattered,
    **dict.fromkeys(("tril", "triu"), _triangle),
    **dict.fromkeys(
        (
            *("gather", "take_along_dim", "index", "index_put", "index_copy", "scatter", "roll", "movedim"),
            *("diagonal", "unfold", "rot90"),
        ),
        _moved,
    ),
    "any": _reduced(any_of),
    "all": _reduced(all_of),
    **dict.fromkeys(("amax", "max"), _reduced(largest_of)),
    **dict.fromkeys(("amin", "min"), _reduced(smallest_of)),
    "sum": _reduced(sum_of),
    "cumsum": _accumulated,
}
