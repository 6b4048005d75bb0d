"""Spell operators that a runtime's ONNX parser does not know with those it has known for long.

TensorRT's parser knows Attention from 10.14 on and RMSNormalization from 10.15 on, as its change log says; 10.13 knows
neither.

Input graph:
    y = Attention(q, k, v, mask?)
    z = RMSNormalization(x, w)
Output graph:
    y = MatMul(Softmax(MatMul(q * scale, Transpose(k)) + mask?), v)
    z = Cast(x32 / Sqrt(ReduceMean(x32 * x32) + epsilon)) * w        x32 = Cast(x, float)
Casts that change nothing are left out.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from t3compile.export.attention_forms import attention_into_products, is_attention, is_plain
from t3compile.export.graph_values import put_in_place
from t3compile.export.window_function import constants_into_nodes


def spell_operators(model: ir.Model, knows: Callable[[str], bool]) -> tuple[ir.Model, tuple[str, ...]]:
    """The model without what ``knows(operator type)`` denies and there is a spelling for, and what was respelled.

    The given model is left as it is, and returned where nothing has to change. Weights are shared.
    """
    graphs = [root if isinstance(root, ir.Graph) else root.graph for root in _roots(model)]
    wanted = [
        op_type
        for op_type, can in (("Attention", _all_plain), ("RMSNormalization", None))
        if not knows(op_type) and any(_has(g, op_type) for g in graphs) and (can is None or all(map(can, graphs)))
    ]
    if not wanted:
        return model, ()
    model = model.clone()
    for root in _roots(model):
        graph = root if isinstance(root, ir.Graph) else root.graph
        before = len(graph.initializers)
        if "Attention" in wanted:
            attention_into_products(graph)
        if "RMSNormalization" in wanted:
            for node in [node for node in graph if _is(node, "RMSNormalization")]:
                _spell_rms_norm(graph, node)
        if isinstance(root, ir.Function) and len(graph.initializers) > before:
            constants_into_nodes(graph)
    return model, tuple(wanted)


def _roots(model: ir.Model) -> list[ir.Graph | ir.Function]:
    return [model.graph, *model.functions.values()]


def _is(node: ir.Node, op_type: str) -> bool:
    return node.domain == "" and node.op_type == op_type


def _has(graph: ir.Graph, op_type: str) -> bool:
    return any(_is(node, op_type) for node in graph)


def _all_plain(graph: ir.Graph) -> bool:
    return all(map(is_plain, filter(is_attention, graph)))


def _spell_rms_norm(graph: ir.Graph, node: ir.Node) -> None:
    x, weight = node.inputs[:2]
    out = node.outputs[0]
    assert x is not None and weight is not None and x.shape is not None and x.dtype is not None
    rank = len(x.shape)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    kind = ir.DataType(node.attributes["stash_type"].as_int()) if "stash_type" in node.attributes else ir.DataType.FLOAT
    eps = _constant(f"{out.name}_epsilon", ir.tensor(epsilon, dtype=kind))
    axes = _constant(f"{out.name}_axes", ir.tensor(list(range(axis % rank, rank)), dtype=ir.DataType.INT64))
    casts = x.dtype != kind
    wide = ir.node("Cast", [x], {"to": kind})
    source = wide.outputs[0] if casts else x
    square = ir.node("Mul", [source, source])
    mean = ir.node("ReduceMean", [square.outputs[0], axes.outputs[0]], {"keepdims": 1})
    shifted = ir.node("Add", [mean.outputs[0], eps.outputs[0]])
    root = ir.node("Sqrt", [shifted.outputs[0]])
    divided = ir.node("Div", [source, root.outputs[0]])
    narrow = ir.node("Cast", [divided.outputs[0]], {"to": x.dtype})
    scaled = ir.node("Mul", [(narrow if casts else divided).outputs[0], weight])
    made = [eps, axes, *([wide] if casts else []), square, mean, shifted, root, divided]
    made += [narrow, scaled] if casts else [scaled]
    for index, new in enumerate(made):
        new.name = f"{node.name}/{index}"
    result = scaled.outputs[0]
    result.shape, result.type = out.shape, out.type
    put_in_place(graph, node, made, result)


def _constant(name: str, tensor: ir.TensorProtocol) -> ir.Node:
    node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=None)
    node.outputs[0].name = name
    node.outputs[0].const_value = tensor
    return node
