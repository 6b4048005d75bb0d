"""Give operands of different dtypes the dtype of the result: ONNX promotes nothing.

The exporter promotes elementwise operations and cat itself; it leaves these two as they are.

Input graph:
    out = aten.stack([a, b], 1)                                       a: float32, b, out: float64
Output graph:
    out = aten.stack([aten._to_copy(a, dtype=float64), b], 1)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from t3compile.passes.graph_pass import Cursor, GraphPass, is_call
from t3compile.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class PromoteOperands(GraphPass):
    """Cast the operands of aten.stack and aten.einsum where they differ from the result."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        modified = False
        for node in graph_module.graph.nodes:
            if not is_call(node, aten.stack, aten.einsum):
                continue
            cursor, dtype = Cursor(node), node.meta["val"].dtype
            for used in node.all_input_nodes:
                if used.meta["val"].dtype != dtype:
                    node.replace_input_with(used, cursor.call(aten._to_copy.default, used, dtype=dtype))
                    modified = True
        return modified
