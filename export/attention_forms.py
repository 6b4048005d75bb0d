"""How attention is spelled: every opset-23 Attention of a graph kept, or replaced by another spelling of it.

Input graph:
    y = Attention(q, k, v, mask?)
Output graph, as matmul:
    y = MatMul(Softmax(MatMul(q * scale, Transpose(k)) + mask?), v)
Output graph, as onnxruntime:
    y = Reshape(com.microsoft.MultiHeadAttention(Reshape(q), Reshape(k), Reshape(v)))    heads folded into the batch
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal, get_args

import onnx_ir as ir

from t3compile.export.attention_rule import AttentionForm, choose_form
from t3compile.export.graph_values import initializer, put_in_place, sizes_of

# "auto" picks a form for each call, by the rule measured for onnxruntime on CPUs.
AttentionChoice = Literal["attention", "matmul", "onnxruntime", "auto"]
ATTENTION_FORMS: tuple[AttentionForm, ...] = get_args(AttentionForm)


def spell_attention(graph: ir.Graph, choice: AttentionChoice) -> dict[str, int]:
    """Spell every plain opset-23 Attention of a graph as chosen; how many got each form.

    Plain is what the exporter makes: [B, N, S, D] of as many key as query heads and at most a mask. Others stay.
    """
    counts: dict[str, int] = {}
    for node in [node for node in graph if is_attention(node)]:
        plain = is_plain(node) and (choice == "matmul" or _has_whole_mask(node))
        form = "attention" if not plain else _auto(node) if choice == "auto" else choice
        if plain:
            _SPELL[form](graph, node)
        counts[form] = counts.get(form, 0) + 1
    return counts


def count_attention(model: ir.Model) -> dict[str, int]:
    """How many attention calls one run of a model makes, by the operator that each is spelled with."""
    within = {identifier: _count(function) for identifier, function in model.functions.items()}
    counts = _count(model.graph)
    for node in model.graph:
        counts.update(within.get(node.op_identifier(), {}))
    return dict(sorted(counts.items()))


def _count(nodes: Iterable[ir.Node]) -> Counter[str]:
    found = Counter(node.op_type for node in nodes if node.op_type in ("Attention", "MultiHeadAttention", "Softmax"))
    if "Softmax" in found:
        found["MatMul-Softmax"] = found.pop("Softmax")
    return found


def attention_into_products(graph: ir.Graph) -> None:
    """Replace every opset-23 Attention node of a graph by MatMul-Softmax-MatMul; all must be plain."""
    spell_attention(graph, "matmul")


def is_attention(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type == "Attention"


def is_plain(node: ir.Node) -> bool:
    """Whether an Attention node has q, k, v [B, N, S, D] of equal heads and perhaps a mask, and nothing else."""
    shapes = [None if value is None else value.shape for value in node.inputs[:3]]
    if any(shape is None or len(shape) != 4 or not shape.is_static() for shape in shapes):
        return False
    if shapes[0][1] != shapes[1][1] or any(value is not None for value in node.inputs[4:]):  # type: ignore[index]
        return False
    if len(node.outputs) > 1 and any(output.uses() for output in node.outputs[1:]):
        return False
    numbers = {name: node.attributes[name].value for name in ("is_causal", "softcap") if name in node.attributes}
    return not any(numbers.values()) and node.outputs[0].shape is not None


def _has_whole_mask(node: ir.Node) -> bool:
    """Whether there is no mask, or one of four known axes."""
    mask = _mask_of(node)
    return mask is None or (mask.shape is not None and len(mask.shape) == 4 and mask.shape.is_static())


def _auto(node: ir.Node) -> AttentionForm:
    q, k = node.inputs[:2]
    mask = _mask_of(node)
    assert q is not None
    # The rule was measured in float32, and MultiHeadAttention holds all scores where it gets a row for each query.
    if q.dtype != ir.DataType.FLOAT or (mask is not None and sizes_of(mask)[2] != 1):
        return "attention"
    batch, heads, queries, head_dim = sizes_of(q)
    return choose_form(batch * heads, queries, sizes_of(k)[2], head_dim)


def _mask_of(node: ir.Node) -> ir.Value | None:
    return node.inputs[3] if len(node.inputs) > 3 else None


def _keep(graph: ir.Graph, node: ir.Node) -> None:
    """Opset-23 Attention: every runtime's own fused kernel. onnxruntime's wants a mask with a row for each query."""
    mask = _mask_of(node)
    if mask is None:
        return
    sizes = sizes_of(mask)
    wanted = (*sizes[:2], sizes_of(node.inputs[0])[2], sizes_of(node.inputs[1])[2])
    if sizes == wanted:
        return
    shape = initializer(graph, f"{node.outputs[0].name}_mask_shape", ir.tensor(list(wanted)))
    full = ir.node("Expand", [mask, shape])
    graph.insert_before(node, full)
    node.replace_input_with(3, full.outputs[0])


def _to_matmul(graph: ir.Graph, node: ir.Node) -> None:
    """MatMul-Softmax-MatMul with the query scaled first: for TensorRT before 10.14."""
    q, k, v = node.inputs[:3]
    assert q is not None and k is not None and v is not None and q.dtype is not None
    factor = initializer(graph, f"{node.outputs[0].name}_scale", ir.tensor(_scale(node), dtype=q.dtype))
    scaled = ir.node("Mul", [q, factor])
    keys = ir.node("Transpose", [k], {"perm": [0, 1, 3, 2]})
    scores = ir.node("MatMul", [scaled.outputs[0], keys.outputs[0]])
    biased = _biased(graph, node, scores.outputs[0])
    weights = ir.node("Softmax", [biased[-1].outputs[0] if biased else scores.outputs[0]], {"axis": -1})
    out = ir.node("MatMul", [weights.outputs[0], v])
    _replace(graph, node, [scaled, keys, scores, *biased, weights, out])


def _biased(graph: ir.Graph, node: ir.Node, scores: ir.Value) -> list[ir.Node]:
    """Nodes that add the mask to the scores."""
    mask = _mask_of(node)
    if mask is None:
        return []
    bias = _additive(graph, node, mask)
    return [*bias, ir.node("Add", [scores, bias[-1].outputs[0] if bias else mask])]


def _additive(graph: ir.Graph, node: ir.Node, mask: ir.Value) -> list[ir.Node]:
    """Nodes that make 0 and -inf, in the dtype of the queries, of a bool mask; none where it is additive."""
    q = node.inputs[0]
    assert q is not None and q.dtype is not None
    if mask.dtype != ir.DataType.BOOL:
        return [] if mask.dtype == q.dtype else [ir.node("Cast", [mask], {"to": q.dtype})]
    name = f"{node.outputs[0].name}_mask"
    visible, hidden = (
        initializer(graph, f"{name}_{part}", ir.tensor(value, dtype=q.dtype))
        for part, value in (("visible", 0.0), ("hidden", float("-inf")))
    )
    return [ir.node("Where", [mask, visible, hidden])]


def _to_onnxruntime(graph: ir.Graph, node: ir.Node) -> None:
    """com.microsoft.MultiHeadAttention: never holds the scores, on the CPU; the file then needs onnxruntime.

    It holds them where it gets a bias, so a mask that all queries share becomes a component of the keys instead.
    """
    mask = _mask_of(node)
    made: list[ir.Node] = []
    values = list(node.inputs[:3])
    widened = mask is not None and sizes_of(mask)[2] == 1
    if mask is not None and widened:
        made = _mask_into_keys(graph, node, mask)
        values[:2] = [made[-2].outputs[0], made[-1].outputs[0]]
    flat: list[ir.Value | None] = []
    for i, (value, given) in enumerate(zip(values, node.inputs[:3], strict=True)):
        _, _, tokens, depth = sizes_of(given)
        depth += widened and i < 2
        shape = initializer(graph, f"{node.outputs[0].name}_{i}_flat", ir.tensor([-1, tokens, depth]))
        made.append(ir.node("Reshape", [value, shape]))
        flat.append(made[-1].outputs[0])
    if mask is not None and not widened:
        made += _bias_of_queries(graph, node, mask)
        flat += [None, None, made[-1].outputs[0]]
    attributes: dict[str, int | float] = {"num_heads": 1}
    if mask is not None or "scale" in node.attributes:
        attributes["scale"] = _scale(node)
    fused = ir.node("MultiHeadAttention", flat, attributes, domain="com.microsoft")
    back = initializer(graph, f"{node.outputs[0].name}_shape", ir.tensor(list(sizes_of(node.outputs[0]))))
    out = ir.node("Reshape", [fused.outputs[0], back])
    _replace(graph, node, [*made, fused, out])


def _scale(node: ir.Node) -> float:
    given = node.attributes.get("scale")
    return float(sizes_of(node.inputs[0])[-1] ** -0.5) if given is None else given.as_float()


def _mask_into_keys(graph: ir.Graph, node: ir.Node, mask: ir.Value) -> list[ir.Node]:
    """Nodes that append 1 to every query and the mask over the scale to every key; the last two are q and k."""
    q, k = node.inputs[:2]
    assert q is not None and q.dtype is not None
    name = f"{node.outputs[0].name}_mask"
    scale = initializer(graph, f"{name}_scale", ir.tensor(_scale(node), dtype=q.dtype))
    one = initializer(graph, f"{name}_one", ir.tensor(1.0, dtype=q.dtype))
    q_shape, k_shape = (
        initializer(graph, f"{name}_{part}_shape", ir.tensor([*sizes_of(x)[:3], 1])) for part, x in (("q", q), ("k", k))
    )
    bias = _additive(graph, node, mask)
    divided = ir.node("Div", [bias[-1].outputs[0] if bias else mask, scale])
    column = ir.node("Transpose", [divided.outputs[0]], {"perm": [0, 1, 3, 2]})
    of_keys = ir.node("Expand", [column.outputs[0], k_shape])
    of_queries = ir.node("Expand", [one, q_shape])
    wide_q = ir.node("Concat", [q, of_queries.outputs[0]], {"axis": -1})
    wide_k = ir.node("Concat", [k, of_keys.outputs[0]], {"axis": -1})
    return [*bias, divided, column, of_keys, of_queries, wide_q, wide_k]


def _bias_of_queries(graph: ir.Graph, node: ir.Node, mask: ir.Value) -> list[ir.Node]:
    """Nodes that make the additive mask [1 or B*N, 1, Sq, S] for heads folded into the batch."""
    batch, heads, queries, _ = sizes_of(node.inputs[0])
    keys = sizes_of(node.inputs[1])[2]
    name = f"{node.outputs[0].name}_mask"
    bias = _additive(graph, node, mask)
    whole = (1, 1, queries, keys) if sizes_of(mask)[:2] == (1, 1) else (batch, heads, queries, keys)
    whole_shape = initializer(graph, f"{name}_whole_shape", ir.tensor(list(whole)))
    flat_shape = initializer(graph, f"{name}_flat_shape", ir.tensor([-1, 1, queries, keys]))
    full = ir.node("Expand", [bias[-1].outputs[0] if bias else mask, whole_shape])
    return [*bias, full, ir.node("Reshape", [full.outputs[0], flat_shape])]


def _replace(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    """Put the nodes in the place of `old`; the last one's output replaces its output, under its name."""
    source, target = old.outputs[0], new[-1].outputs[0]
    target.shape, target.type = source.shape, source.type
    for index, node in enumerate(new):
        node.name = f"{old.name}/{index}"
    put_in_place(graph, old, new, target)


_SPELL: dict[AttentionForm, Callable[[ir.Graph, ir.Node], None]] = {
    "attention": _keep,
    "matmul": _to_matmul,
    "onnxruntime": _to_onnxruntime,
}
