"""Write flex_attention as plain attention under its mask. Exporters do not know the call.

The mask is what the call's mask function says of every query and key. Its lists of blocks, which only compiled
kernels read, are left out, as torch does when it runs the call.

Input graph:
    out, lse, max = flex_attention(q, k, v, score_mod, (..., mask_mod), scale, ...)      mask_mod: q_idx >= kv_idx
Output graph:
    mask = aten.ge(aten.view(aten.arange(S), [1, 1, S, 1]), aten.view(aten.arange(K), [1, 1, 1, K]))
    out = aten.scaled_dot_product_attention(q, k, v, aten.expand(mask, [1, 1, S, K]), scale=scale)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.flex_attention import flex_attention

from t3compile.passes.attention_call import ATTENTION
from t3compile.passes.graph_pass import Cursor, GraphPass, is_call, replace_node
from t3compile.program import Program

aten = torch.ops.aten


# Element by element too, though torch does not tag them so.
_ELEMENTWISE = (aten.__and__, aten.__or__, aten.__xor__, aten._to_copy, aten.clone, aten.alias, aten.detach)


@dataclass(frozen=True)
class SpellFlexAttention(GraphPass):
    """Replace flex_attention whose functions are made of element-wise calls; only its first result may be used."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        modified = False
        for node in list(graph_module.graph.nodes):
            if node.target is flex_attention and _is_spellable(graph_module, node):
                _spell(graph_module, node)
                modified = True
        if modified:
            _drop_functions(graph_module)
        return modified


def _functions(graph_module: fx.GraphModule, node: fx.Node) -> tuple[fx.Graph, fx.Graph]:
    """The graphs of score_mod (score, b, h, q, k, others) and mask_mod (b, h, q, k, others)."""
    score, blocks = node.args[3], node.args[4]
    mask = blocks[-1]  # type: ignore[index]
    functions = [graph_module.get_submodule(str(x.target)) for x in (score, mask)]  # type: ignore[union-attr]
    score_graph, mask_graph = (function.graph for function in functions)
    assert isinstance(score_graph, fx.Graph) and isinstance(mask_graph, fx.Graph)
    return score_graph, mask_graph


def _is_spellable(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    uses_rest = any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users)
    return not uses_rest and all(_is_elementwise(graph) for graph in _functions(graph_module, node))


def _is_elementwise(graph: fx.Graph) -> bool:
    """Whether a function of one query and one key may be called with all of them at once."""
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            return False
        is_scalar_fill = is_call(node, aten.new_ones, aten.new_zeros, aten.new_full) and not list(node.args[1])
        is_scalar_fill |= is_call(node, aten.full, aten.scalar_tensor) and not node.meta["val"].dim()
        is_lookup = is_call(node, aten.index) and None not in node.args[1]
        is_pointwise = torch.Tag.pointwise in node.target.tags or is_call(node, *_ELEMENTWISE)
        if not (is_pointwise or is_scalar_fill or is_lookup):
            return False
    return True


def _spell(graph_module: fx.GraphModule, node: fx.Node) -> None:
    cursor = Cursor(node)
    q, k, v = node.args[:3]
    scale = node.args[5]
    score_others, mask_others = node.args[7:9]
    rows, keys = (x.meta["val"] for x in (q, k))  # type: ignore[union-attr]
    sizes = (rows.shape[0], rows.shape[1], rows.shape[2], keys.shape[2])
    places = [_places(cursor, size, axis, rows.device) for axis, size in enumerate(sizes)]
    score_graph, mask_graph = _functions(graph_module, node)
    seen = _inline(cursor, mask_graph, [*places, *mask_others])  # type: ignore[misc]
    mask: fx.Node | None = None
    if not _is_true(seen):
        # Attention broadcasts a mask over batch and heads, not over queries and keys.
        shape = (*((1,) * 4), *seen.meta["val"].shape)[-4:]
        mask = cursor.call(aten.expand.default, seen, [*shape[:2], *sizes[2:]])
    is_grouped = rows.shape[1] != keys.shape[1]
    if _returned(score_graph) is next(iter(score_graph.nodes)):
        options = {"enable_gqa": True} if is_grouped else {}
        out = cursor.call(ATTENTION, q, k, v, mask, 0.0, False, scale=scale, **options)
    else:
        repeats = rows.shape[1] // keys.shape[1]
        if is_grouped:
            k, v = (cursor.call(aten.repeat_interleave.self_int, x, repeats, 1) for x in (k, v))
        products = cursor.call(aten.matmul.default, q, cursor.call(aten.transpose.int, k, -2, -1))
        scores = cursor.call(aten.mul.Tensor, products, scale)
        scores = _inline(cursor, score_graph, [scores, *places, *score_others])  # type: ignore[misc]
        out = _attend(cursor, scores, mask, v)
    for user in list(node.users):
        replace_node(user, out)


def _attend(cursor: Cursor, scores: fx.Node, mask: fx.Node | None, v: Any) -> fx.Node:
    if mask is None:
        return cursor.call(aten.matmul.default, cursor.call(aten.softmax.int, scores, -1), v)
    hidden = cursor.call(aten.logical_not.default, mask)
    scores = cursor.call(aten.masked_fill.Scalar, scores, hidden, float("-inf"))
    shares = cursor.call(aten.softmax.int, scores, -1)
    # A query that sees nothing gets zeros.
    shares = cursor.call(aten.masked_fill.Scalar, shares, hidden, 0.0)
    return cursor.call(aten.matmul.default, shares, v)


def _places(cursor: Cursor, size: int, axis: int, device: torch.device) -> fx.Node:
    """0..size-1 along one of the axes [B, N, S, K]."""
    shape = [1, 1, 1, 1]
    shape[axis] = size
    numbers = cursor.call(aten.arange.default, size, dtype=torch.int32, device=device)
    return cursor.call(aten.reshape.default, numbers, shape)


def _returned(graph: fx.Graph) -> Any:
    (returned,) = graph.output_node().args
    return returned[0] if isinstance(returned, list | tuple) else returned


def _inline(cursor: Cursor, graph: fx.Graph, inputs: Sequence[Any]) -> fx.Node:
    values: dict[fx.Node, Any] = {}
    arguments = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(arguments)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: values[used])
            values[node] = cursor.call(node.target, *args, **kwargs)
    made: fx.Node = values[_returned(graph)]
    return made


def _is_true(mask: fx.Node) -> bool:
    """Whether a mask function hides nothing, as far as its last call says."""
    value = mask.meta["val"]
    assert isinstance(value, Tensor)
    if value.dim():
        return False
    is_full = is_call(mask, aten.full) and mask.args[1] is True
    return is_call(mask, aten.new_ones, aten.ones) or is_full


def _drop_functions(graph_module: fx.GraphModule) -> None:
    """Erase what was replaced, and the functions that nothing calls any more: exporters write every one they find."""
    for node in reversed(list(graph_module.graph.nodes)):
        is_replaced = node.target is flex_attention or node.op == "get_attr"
        if is_replaced and not node.users:
            graph_module.graph.erase_node(node)
    graph_module.delete_all_unused_submodules()
