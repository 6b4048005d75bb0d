"""Give operands that torch promotes to one dtype this dtype: ONNX's operators take operands of one type.

Input graph:
    out = aten.einsum("n,d->nd", [positions, rates])                  positions float32, rates float64
    y = aten.layer_norm(x, [D], weight, bias)                         x bfloat16, weight and bias float32
Output graph:
    wide = aten._to_copy(positions, dtype=float64)
    out = aten.einsum("n,d->nd", [wide, rates])
    y = _to_copy(aten.layer_norm(_to_copy(x, float32), [D], weight, bias), bfloat16)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import fx

from t3compile.passes.graph_pass import Cursor, GraphPass, compute_value, is_call
from t3compile.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class PromoteOperands(GraphPass):
    """Cast the operands of einsum, stack and norms with weights; the exporter does so for all others."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        modified = False
        for node in list(graph_module.graph.nodes):
            if is_call(node, aten.einsum, aten.stack, aten.layer_norm, aten.group_norm, aten.rms_norm):
                modified |= _promote(node)
        return modified


def _promote(node: fx.Node) -> bool:
    """Cast a call's operands to the widest of their dtypes, and its result back to the dtype that it had."""
    operands = dict.fromkeys(node.all_input_nodes)
    dtypes = [operand.meta["val"].dtype for operand in operands]
    widest = reduce(torch.promote_types, dtypes)
    if all(dtype == widest for dtype in dtypes):
        return False
    cursor = Cursor(node)
    for operand, dtype in zip(operands, dtypes, strict=True):
        if dtype != widest:
            node.replace_input_with(operand, cursor.call(aten._to_copy.default, operand, dtype=widest))
    wanted = node.meta["val"].dtype
    if wanted == widest:
        return True
    users = list(node.users)
    node.meta["val"] = compute_value(node)
    narrow = Cursor(node.next).call(aten._to_copy.default, node, dtype=wanted)
    for user in users:
        user.replace_input_with(node, narrow)
    return True
