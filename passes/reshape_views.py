"""Ask for reshapes, not views: the exporter traces again, and attention's result may then lie otherwise in memory.

Input graph:
    y = aten.transpose(aten.scaled_dot_product_attention(q, k, v), 1, 2)
    out = aten.view(y, [B, S, N * D])
Output graph:
    y = aten.transpose(aten.scaled_dot_product_attention(q, k, v), 1, 2)
    out = aten.reshape(y, [B, S, N * D])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from t3compile.passes.graph_pass import GraphPass
from t3compile.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class ReshapeViews(GraphPass):
    """Replace aten.view and aten._unsafe_view by aten.reshape, which any strides allow."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        views = [
            node for node in graph_module.graph.nodes if node.target in (aten.view.default, aten._unsafe_view.default)
        ]
        for node in views:
            node.target = aten.reshape.default
        return bool(views)
