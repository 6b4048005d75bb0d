"""Write rotary position embedding (RoPE) of neighbouring pairs as onnxruntime's one operator.

Input graph:
    a, b = x[..., 0], x[..., 1]                           x [B, S, N, D/2, 2], cos and sin [1, S, 1, D/2]
    y = Concat(Unsqueeze(a * cos - b * sin), Unsqueeze(a * sin + b * cos))            axis -1
Output graph:
    y = Reshape(com.microsoft.RotaryEmbedding(Reshape(x), [0], Reshape(cos), Reshape(sin), interleaved=1))
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import onnx_ir as ir

from t3compile.export.graph_values import (
    int64_constant,
    int64_values,
    name_after,
    put_in_place,
    reshape_to,
    static_shape,
)

_OP = "RotaryEmbedding"


@dataclass(frozen=True)
class FuseRotary(ir.passes.InPlacePass):
    """Fuse every such rotation whose tables have one row per token, for all heads and batch elements alike."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph."""
        graph = model.graph
        views: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
        found = [(node, rotation) for node in graph if (rotation := _read(node)) is not None]
        for node, rotation in found:
            _write(graph, node, rotation, views)
        if found:
            model.opset_imports.setdefault("com.microsoft", 1)
        return ir.passes.PassResult(model, bool(found))


@dataclass(frozen=True)
class _Rotation:
    """Source of the pairs, its shape and that of the operator's input, and the tables."""

    x: ir.Value
    shape: tuple[int, ...]
    rotated: tuple[int, ...]
    cos: ir.Value
    sin: ir.Value


def _read(node: ir.Node) -> _Rotation | None:
    """The rotation that a Concat ends, or None."""
    if not _is(node, "Concat") or len(node.inputs) != 2:
        return None
    real, imaginary = (_through(x, "Unsqueeze", "Reshape") for x in node.inputs)
    minus, plus = _terms(real, "Sub"), _terms(imaginary, "Add")
    if minus is None or plus is None:
        return None
    # Factors of a product may stand in either order.
    for (a, cos), (b, sin) in itertools.product((minus[0], minus[0][::-1]), (minus[1], minus[1][::-1])):
        if {frozenset((a, sin)), frozenset((b, cos))} == {frozenset(plus[0]), frozenset(plus[1])}:
            rotation = _place(node, a, b, cos, sin)
            if rotation is not None:
                return rotation
    return None


def _terms(value: ir.Value | None, op_type: str) -> list[tuple[ir.Value, ir.Value]] | None:
    """The factors of the two products that an addition or subtraction takes."""
    node = None if value is None else value.producer()
    if node is None or not _is(node, op_type):
        return None
    products = [None if x is None else x.producer() for x in node.inputs]
    if any(product is None or not _is(product, "Mul") for product in products):
        return None
    return [(product.inputs[0], product.inputs[1]) for product in products]  # type: ignore[union-attr, misc]


def _place(node: ir.Node, a: ir.Value, b: ir.Value, cos: ir.Value, sin: ir.Value) -> _Rotation | None:
    """The rotation, if a and b are the pairs of one tensor and the tables' only long axes are tokens and depth."""
    first, second = _element(a), _element(b)
    if first is None or second is None or first[0] is not second[0] or (first[1], second[1]) != (0, 1):
        return None
    x = first[0]
    shape, table = static_shape(x), static_shape(cos)
    if shape is None or table is None or static_shape(node.outputs[0]) != shape or table != static_shape(sin):
        return None
    is_float32 = all(value.dtype == ir.DataType.FLOAT for value in (x, cos, sin))
    if not is_float32 or not 4 <= len(shape) <= 5 or shape[-1] != 2 or len(table) >= len(shape):
        return None
    depth = len(shape) - 2
    table = (1,) * (depth + 1 - len(table)) + table
    tokens = next((axis for axis, size in enumerate(table) if size > 1), depth)
    # One row per token of every batch element and head: all other axes of the table are short.
    if tokens not in (1, 2) or table != tuple(size if i in (tokens, depth) else 1 for i, size in enumerate(shape[:-1])):
        return None
    if tokens == 1:
        return _Rotation(x, shape, (shape[0], shape[1], math.prod(shape[2:])), cos, sin)
    return _Rotation(x, shape, (*shape[:3], 2 * shape[depth]), cos, sin) if depth == 3 else None


def _element(value: ir.Value) -> tuple[ir.Value, int] | None:
    """x and i where the value is x[..., i]."""
    source = _through(value, "Squeeze", "Reshape")
    node = source.producer() if source is not None else None
    if node is None or node.inputs[0] is None:
        return None
    if _is(node, "Gather"):
        index = int64_values(node.inputs[1])
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        ends = axis in (-1, len(static_shape(node.inputs[0]) or ()) - 1)
        return (node.inputs[0], index[0]) if ends and index is not None and len(index) == 1 else None
    if _is(node, "Split"):
        widths = {_last(output) for output in node.outputs}
        return (node.inputs[0], node.outputs.index(source)) if widths == {1} else None
    if not _is(node, "Slice") or len(node.inputs) < 4 or _last(node.outputs[0]) != 1:
        return None
    start, axes = int64_values(node.inputs[1]), int64_values(node.inputs[3])
    rank = len(static_shape(node.inputs[0]) or ())
    if start is None or axes is None or len(axes) != 1 or axes[0] not in (-1, rank - 1):
        return None
    return node.inputs[0], start[0]


def _write(
    graph: ir.Graph, node: ir.Node, rotation: _Rotation, views: dict[tuple[ir.Value, tuple[int, ...]], ir.Value]
) -> None:
    made: list[ir.Node] = []

    def reshape(value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        if static_shape(value) == shape:
            return value
        made.extend(reshape_to(value, shape))
        return made[-1].outputs[0]

    depth = rotation.shape[-2]
    tables = []
    for table in (rotation.cos, rotation.sin):
        flat = (math.prod(static_shape(table) or ()) // depth, depth)
        if (table, flat) not in views:
            views[table, flat] = reshape(table, flat)
        tables.append(views[table, flat])
    x = reshape(rotation.x, rotation.rotated)
    heads = rotation.rotated[-1] // (2 * depth) if len(rotation.rotated) == 3 else rotation.rotated[1]
    first = int64_constant([0])
    fused = ir.node(_OP, [x, first.outputs[0], *tables], {"interleaved": 1, "num_heads": heads}, domain="com.microsoft")
    fused.outputs[0].shape, fused.outputs[0].type = x.shape, x.type
    made += [first, fused]
    result = reshape(fused.outputs[0], rotation.shape)
    name_after(node, made)
    put_in_place(graph, node, made, result)


def _is(node: ir.Node, op_type: str) -> bool:
    return node.domain == "" and node.op_type == op_type


def _through(value: ir.Value | None, *op_types: str) -> ir.Value | None:
    """What a view that adds or removes a last axis of length one reads."""
    node = None if value is None else value.producer()
    if node is None or not any(_is(node, op_type) for op_type in op_types):
        return value
    before, after = static_shape(node.inputs[0]), static_shape(value)
    if before is None or after is None or before not in ((*after, 1), after[:-1] if after[-1:] == (1,) else None):
        return value
    return node.inputs[0]


def _last(value: ir.Value) -> int | None:
    shape = static_shape(value)
    return shape[-1] if shape else None
