"""Give attention calls four axes and equal batches and heads: ONNX's Attention broadcasts neither.

Input graph:
    a = aten.scaled_dot_product_attention(q, k, v)                    [M, S, D]
    b = aten.scaled_dot_product_attention(r, s, s)                    r [B, N, S, D], s [1, 1, K, D]
Output graph:
    a = aten.reshape(aten.scaled_dot_product_attention(unsqueeze(q, 0), ...), [M, S, D])
    b = aten.scaled_dot_product_attention(r, t, t)                    t = aten.expand(s, [B, N, K, D])
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from t3compile.passes.attention_call import ATTENTION, AttentionCall
from t3compile.passes.graph_pass import Cursor, GraphPass, replace_node
from t3compile.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class ExpandAttention(GraphPass):
    """Reshape operands to [B, N, S, D] and expand what torch broadcasts; grouped heads stay grouped."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        modified = False
        for node in list(graph_module.graph.nodes):
            if node.target is not ATTENTION:
                continue
            call = AttentionCall.read(node)
            if not _is_plain(call):
                _expand(call)
                modified = True
        return modified


def _is_grouped(call: AttentionCall) -> bool:
    """Whether key and value heads serve several query heads each."""
    heads = [call.shape(x)[-3] if len(call.shape(x)) > 2 else 1 for x in (call.q, call.k, call.v)]
    return bool(call.node.kwargs.get("enable_gqa", False)) and heads[0] > heads[1] == heads[2]


def _is_plain(call: AttentionCall) -> bool:
    shapes = [call.shape(x) for x in (call.q, call.k, call.v)]
    if any(len(shape) != 4 for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        return False
    if call.node.kwargs.get("enable_gqa", False):
        return _is_grouped(call)
    return len({shape[1] for shape in shapes}) == 1


def _expand(call: AttentionCall) -> None:
    cursor = Cursor(call.node)
    is_grouped = _is_grouped(call)
    shared = torch.broadcast_shapes(*((1, *call.shape(x))[:-3] for x in (call.q, call.k, call.v)))
    heads = 1 if is_grouped else _shared_heads(call)

    def operand(x: fx.Node) -> fx.Node:
        shape = call.shape(x)
        own_heads = shape[-3] if len(shape) > 2 else 1
        wanted = (*shared, own_heads if is_grouped else heads, *shape[-2:])
        return _reshaped(cursor, x, wanted)

    mask = call.mask
    if mask is not None and len(call.shape(mask)) > 3:
        rows = call.shape(mask)
        mask = _reshaped(cursor, mask, (*shared, *rows[-3:]))
    q, k, v = (operand(x) for x in (call.q, call.k, call.v))
    options = {"enable_gqa": True} if is_grouped else {}
    if call.scale is not None:
        options["scale"] = call.scale  # type: ignore[assignment]
    made = cursor.call(ATTENTION, q, k, v, mask, call.dropout, call.is_causal, **options)
    shape = list(call.node.meta["val"].shape)
    replace_node(call.node, made if len(shape) == 4 else cursor.call(aten.reshape.default, made, shape))


def _shared_heads(call: AttentionCall) -> int:
    heads = [call.shape(x)[-3:-2] for x in (call.q, call.k, call.v)]
    shared: int = (*torch.broadcast_shapes(*heads), 1)[0]
    return shared


def _reshaped(cursor: Cursor, x: fx.Node, wanted: tuple[int, ...]) -> fx.Node:
    """`x` expanded to `wanted`, with all axes before the last three as one."""
    shape = tuple(x.meta["val"].shape)
    if shape != wanted:
        aligned = (1,) * (len(wanted) - len(shape)) + shape
        if shape != aligned:
            x = cursor.call(aten.reshape.default, x, list(aligned))
        if aligned != wanted:
            x = cursor.call(aten.expand.default, x, list(wanted))
    if len(wanted) == 4:
        return x
    return cursor.call(aten.reshape.default, x, [math.prod(wanted[:-3]), *wanted[-3:]])
