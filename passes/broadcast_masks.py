"""Give attention masks their full query axis.

onnxruntime's Attention refuses masks that broadcast over queries, such as key-padding masks [B, 1, 1, S].

Input graph:
    out = aten.scaled_dot_product_attention(q, k, v, mask)            mask [..., 1, S_k]
Output graph:
    full = aten.expand(mask, [..., S_q, S_k])
    out = aten.scaled_dot_product_attention(q, k, v, full)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from t3compile.passes.attention_call import ATTENTION, AttentionCall
from t3compile.passes.graph_pass import Cursor, GraphPass
from t3compile.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class BroadcastMasks(GraphPass):
    """Expand masks whose query or key axis has one position."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        modified = False
        for node in list(graph_module.graph.nodes):
            if node.target is not ATTENTION:
                continue
            call = AttentionCall.read(node)
            if call.mask is None:
                continue
            given = call.shape(call.mask)
            wanted = (*given[:-2], call.shape(call.q)[-2], call.shape(call.k)[-2])
            if given == wanted:
                continue
            full = Cursor(node).call(aten.expand.default, call.mask, list(wanted))
            node.replace_input_with(call.mask, full)
            modified = True
        return modified
