"""Drop aten.copy, which only restates its source where shape and dtype agree.

Input graph:
    out = aten.copy(destination, source)
Output graph:
    out = source
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from t3compile.passes.graph_pass import GraphPass, is_call, replace_node
from t3compile.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class ForwardCopies(GraphPass):
    """Use the source of a functional copy directly."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        modified = False
        for node in list(graph_module.graph.nodes):
            if not is_call(node, aten.copy):
                continue
            source = node.args[1]
            value, copied = source.meta["val"], node.meta["val"]
            if (value.shape, value.dtype) == (copied.shape, copied.dtype):
                replace_node(node, source)
                modified = True
        return modified
