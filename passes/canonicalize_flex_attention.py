"""Write flex_attention that changes no score and hides nothing as scaled_dot_product_attention.

Calls with a score or mask function of their own stay, and so do those whose log-sum-exp something reads.

Input graph:
    results = flex_attention(q, k, v, identity, empty_block_mask, scale, ...)
    out = results[0]
Output graph:
    out = aten.scaled_dot_product_attention(q, k, v, None, 0.0, False, scale=scale)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from t3compile.passes.graph_pass import Cursor, GraphPass, is_call, replace_node
from t3compile.program import Program

aten = torch.ops.aten
FLEX_ATTENTION = torch.ops.higher_order.flex_attention


@dataclass(frozen=True)
class CanonicalizeFlexAttention(GraphPass):
    """Replace flex_attention calls that are plain attention."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        calls = [node for node in graph_module.graph.nodes if node.target is FLEX_ATTENTION]
        replaced = [_replace(node, graph_module) for node in calls]
        return any(replaced)


def _replace(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    query, key, value, score_function, block_mask, scale = node.args[:6]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(block_mask, tuple)
    *_, query_block, key_block, mask_function = block_mask
    lengths = (query.meta["val"].shape[-2], key.meta["val"].shape[-2])
    is_one_block = query_block >= lengths[0] and key_block >= lengths[1]
    if not is_one_block or not _keeps_scores(graph_module, score_function) or not _is_true(graph_module, mask_function):
        return False
    if any(user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in node.users):
        return False
    is_grouped = query.meta["val"].shape[1] != key.meta["val"].shape[1]
    keywords = {"scale": scale, **({"enable_gqa": True} if is_grouped else {})}
    call = Cursor(node).call(aten.scaled_dot_product_attention.default, query, key, value, None, 0.0, False, **keywords)
    for user in list(node.users):
        if user.args[1] == 0:
            replace_node(user, call)
        else:
            node.graph.erase_node(user)
    functions = [used for used in node.all_input_nodes if used.op == "get_attr"]
    node.graph.erase_node(node)
    for function in functions:
        if not function.users:
            node.graph.erase_node(function)
    return True


def _returned(graph_module: fx.GraphModule, function: Any) -> tuple[fx.Node, fx.Node] | None:
    """The first argument of a subgraph and what it returns."""
    body = getattr(graph_module, str(function.target), None) if isinstance(function, fx.Node) else None
    if not isinstance(body, fx.GraphModule):
        return None
    nodes = list(body.graph.nodes)
    result = nodes[-1].args[0]
    if isinstance(result, list | tuple):
        (result,) = result
    return (nodes[0], result) if isinstance(result, fx.Node) else None


def _keeps_scores(graph_module: fx.GraphModule, function: Any) -> bool:
    """Whether the function gives the score that it takes first."""
    returned = _returned(graph_module, function)
    return returned is not None and returned[0] is returned[1]


def _is_true(graph_module: fx.GraphModule, function: Any) -> bool:
    returned = _returned(graph_module, function)
    return returned is not None and is_call(returned[1], aten.new_ones, aten.ones)
