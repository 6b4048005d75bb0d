"""Values of ONNX graphs in memory: known shapes and numbers, constants, and new nodes in the place of one."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The sizes of a value; None where one is unknown."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(str(size)) for size in value.shape)


def sizes_of(value: ir.Value | None) -> tuple[int, ...]:
    """The sizes of a value that has known ones."""
    sizes = static_shape(value)
    assert sizes is not None
    return sizes


def int64_values(value: ir.Value | None) -> list[int] | None:
    """The numbers of a constant, flattened; None where it is none."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]


def int64_constant(numbers: Sequence[int]) -> ir.Node:
    """A Constant node of one axis, its output's value, shape and type known."""
    node = ir.node("Constant", [], {"value": ir.tensor(list(numbers), dtype=ir.DataType.INT64)})
    out = node.outputs[0]
    out.const_value = node.attributes["value"].as_tensor()
    out.shape, out.type = ir.Shape([len(numbers)]), ir.TensorType(ir.DataType.INT64)
    return node


def permutation_of(transpose: ir.Node, axes: int) -> tuple[int, ...]:
    """The order of a Transpose of so many axes; without one it reverses them."""
    order = transpose.attributes.get("perm")
    return tuple(range(axes))[::-1] if order is None else tuple(order.as_ints())


def reshape_to(value: ir.Value, sizes: Sequence[int]) -> tuple[ir.Node, ir.Node]:
    """A Constant and the Reshape that reads it, its output's shape and type known."""
    constant = int64_constant(sizes)
    view = ir.node("Reshape", [value, constant.outputs[0]])
    view.outputs[0].shape, view.outputs[0].type = ir.Shape(list(sizes)), value.type
    return constant, view


def name_after(old: ir.Node, made: Sequence[ir.Node], part: str = "") -> None:
    """Number nodes of one output and their values behind the names of the node that they replace."""
    for index, new in enumerate(made):
        new.name, new.outputs[0].name = (f"{name}{part}/{index}" for name in (old.name, old.outputs[0].name))


def initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer of the graph, its value's shape and type known."""
    value = ir.Value(
        name=name, const_value=tensor, shape=ir.Shape(tensor.numpy().shape), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value


def put_in_place(graph: ir.Graph, old: ir.Node, made: Sequence[ir.Node], result: ir.Value) -> None:
    """Put nodes in the place of one with a single output that is used; ``result`` replaces it, under its name.

    Without ``made`` nodes the result is another's value and keeps its own name.
    """
    out = old.outputs[0]
    name = out.name
    graph.insert_before(old, made)
    ir.convenience.replace_all_uses_with(out, result, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    if made:
        result.name = name
