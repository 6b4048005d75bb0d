"""Write the fused kernels behind scaled_dot_product_attention as that call.

Calls whose further results (log-sum-exp, random state) something reads stay.

Input graph:
    results = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, scale=s)
    out = results[0]
Output graph:
    out = aten.scaled_dot_product_attention(q, k, v, None, 0.0, False, scale=s)
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

_BACKENDS = (
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_fused_attention_overrideable,
    aten._scaled_dot_product_attention_math,
    aten._scaled_dot_product_attention_math_for_mps,
)


@dataclass(frozen=True)
class CanonicalizeAttentionBackends(GraphPass):
    """Replace kernels' own operations; dropout and causal attention keep their arguments."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        modified = False
        for node in list(graph_module.graph.nodes):
            if is_call(node, *_BACKENDS) and node.target._overloadname == "default":
                modified |= _replace(node)
        return modified


def _replace(node: fx.Node) -> bool:
    results = list(node.users)
    if any(user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in results):
        return False
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if given.get("dropout_mask") is not None:
        return False
    mask = given.get("attn_mask", given.get("attn_bias"))
    dropout, is_causal = given.get("dropout_p", 0.0), given.get("is_causal", False)
    keywords = {"scale": given.get("scale")}
    if given.get("enable_gqa"):
        keywords["enable_gqa"] = True
    call = Cursor(node).call(
        aten.scaled_dot_product_attention.default,
        *(given[name] for name in ("query", "key", "value")),
        mask,
        dropout,
        is_causal,
        **keywords,
    )
    for user in results:
        if user.args[1] == 0:
            replace_node(user, call)
        else:
            node.graph.erase_node(user)
    # Kernels count as random, so nothing else would drop the call.
    node.graph.erase_node(node)
    return True
