"""Squeeze only axes of one element: torch leaves longer ones alone, ONNX refuses them.

Input graph:
    y = aten.squeeze(x, 1)                                            x [B, 24, C]
    z = aten.squeeze(w, [0, 1])                                       w [1, 3, C]
Output graph:
    y = x
    z = aten.squeeze(w, [0])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from t3compile.passes.graph_pass import Cursor, GraphPass, replace_node
from t3compile.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class SqueezeUnitAxes(GraphPass):
    """Leave out of every squeeze the axes that are longer than one."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        modified = False
        for node in list(graph_module.graph.nodes):
            if node.target not in (aten.squeeze.dim, aten.squeeze.dims):
                continue
            source, given = node.args
            shape = source.meta["val"].shape
            dims = [given] if isinstance(given, int) else list(given)
            units = [dim for dim in dims if shape and shape[dim] == 1]
            if len(units) == len(dims):
                continue
            new = Cursor(node).call(aten.squeeze.dims, source, units) if units else source
            replace_node(node, new)
            modified = True
        return modified
