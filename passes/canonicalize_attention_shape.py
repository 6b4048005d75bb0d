"""Give every attention call four axes and equal batch and heads.

Input graph:
    out = aten.scaled_dot_product_attention(q, k, v, enable_gqa=True)         q [B, N, S, D], k, v [B, N/g, S, D]
Output graph:
    each head of k and v stands g times (unsqueeze, expand, reshape)
    out = aten.scaled_dot_product_attention(q, k, v, None, 0.0, False, scale=s)

Calls over fewer or more axes are reshaped: leading axes are one batch axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from t3compile.passes.aten_calls import node_shape
from t3compile.passes.attention_call import ATTENTION, AttentionCall
from t3compile.passes.graph_pass import Cursor, GraphPass, replace_node, viewable
from t3compile.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class CanonicalizeAttentionShape(GraphPass):
    """Reshape and repeat; calls that have the one shape stay as they are."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        modified = False
        for node in list(graph_module.graph.nodes):
            if node.target is ATTENTION:
                modified |= _replace(AttentionCall.read(node))
        return modified


def _replace(call: AttentionCall) -> bool:
    q, k, v = (node_shape(x) for x in (call.q, call.k, call.v))
    is_grouped = bool(call.node.kwargs.get("enable_gqa", False))
    if len(q) == len(k) == len(v) == 4 and q[:2] == k[:2] == v[:2] and not is_grouped:
        return False
    cursor = Cursor(call.node)
    nodes = [call.q, call.k, call.v]
    if is_grouped:
        nodes = [_repeat_heads(cursor, node, q[-3]) for node in nodes]
    outer = torch.broadcast_shapes(*(node_shape(node)[:-2] for node in nodes))
    # One axis before [S, D] is a batch; of several the last is the heads.
    batch = (math.prod(outer[:-1]), outer[-1]) if len(outer) > 1 else (math.prod(outer), 1)
    nodes = [_shaped(cursor, node, outer, batch) for node in nodes]
    mask = None if call.mask is None else _shaped_mask(cursor, call.mask, outer, batch)
    scale = call.scale if call.scale is not None else q[-1] ** -0.5
    attended = cursor.call(ATTENTION, *nodes, mask, call.dropout, call.is_causal, scale=scale)
    replace_node(call.node, _view(cursor, attended, node_shape(call.node)))
    return True


def _repeat_heads(cursor: Cursor, node: fx.Node, heads: int) -> fx.Node:
    """k or v [..., N/g, S, D] -> [..., N, S, D]"""
    shape = node_shape(node)
    if shape[-3] == heads:
        return node
    leading, groups = shape[:-3], heads // shape[-3]
    spread = cursor.call(aten.unsqueeze.default, node, len(leading) + 1)
    spread = cursor.call(aten.expand.default, spread, [*leading, shape[-3], groups, *shape[-2:]])
    return _view(cursor, spread, (*leading, heads, *shape[-2:]))


def _shaped(cursor: Cursor, node: fx.Node, outer: tuple[int, ...], batch: tuple[int, int]) -> fx.Node:
    rows = node_shape(node)[-2:]
    if node_shape(node)[:-2] != tuple(outer):
        node = cursor.call(aten.expand.default, node, [*outer, *rows])
    return _view(cursor, node, (*batch, *rows))


def _shaped_mask(cursor: Cursor, mask: fx.Node, outer: tuple[int, ...], batch: tuple[int, int]) -> fx.Node:
    """[..., S_q or 1, S_k] with its leading axes as the call's batch and heads, of size one where it has none."""
    shape = node_shape(mask)
    shape = (1,) * (2 - len(shape)) + shape
    leading = (1,) * (len(outer) - len(shape[:-2])) + shape[:-2]
    if math.prod(leading) == 1:
        return _view(cursor, mask, (1, 1, *shape[-2:]))
    if len(outer) == 2:
        return _view(cursor, mask, (*leading, *shape[-2:]))
    full = cursor.call(aten.expand.default, mask, [*outer, *shape[-2:]])
    return _view(cursor, full, (*batch, *shape[-2:]))


def _view(cursor: Cursor, node: fx.Node, shape: tuple[int, ...]) -> fx.Node:
    if node_shape(node) == shape:
        return node
    target = aten.view.default if viewable(node.meta["val"], shape) else aten.reshape.default
    return cursor.call(target, node, list(shape))
