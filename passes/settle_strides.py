"""Make a graph valid for any strides: the exporter traces again, and attention's result may lie otherwise in memory.

Input graph:
    a = aten.scaled_dot_product_attention(q, k, v)
    out = aten.view(aten.transpose(a, 1, 2), [B, S, N * D])
Output graph:
    a = aten.clone(aten.scaled_dot_product_attention(q, k, v), memory_format=contiguous)
    out = aten.reshape(aten.transpose(a, 1, 2), [B, S, N * D])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from t3compile.passes.attention_call import ATTENTION
from t3compile.passes.graph_pass import Cursor, GraphPass, is_call
from t3compile.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class SettleStrides(GraphPass):
    """Copy the results of attention into plain order, which is nothing in ONNX; reshape instead of viewing."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        modified = False
        for node in list(graph_module.graph.nodes):
            if node.target in (aten.view.default, aten._unsafe_view.default):
                node.target = aten.reshape.default
                modified = True
            elif node.target is ATTENTION and not all(is_call(user, aten.clone) for user in node.users):
                settled = Cursor(node.next).call(aten.clone.default, node, memory_format=torch.contiguous_format)
                node.replace_all_uses_with(settled, delete_user_cb=lambda user, own=settled: user is not own)
                modified = True
        return modified
