"""Choose between booleans with logic: onnxruntime's Where has no boolean kernel.

Input graph:
    out = aten.where(condition, a, b)                                 a, b: bool
Output graph:
    out = (condition & a) | (~condition & b)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from t3compile.passes.graph_pass import Cursor, GraphPass, is_call, replace_node
from t3compile.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class SelectBooleans(GraphPass):
    """Replace aten.where and aten.masked_fill of boolean results."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        modified = False
        for node in list(graph_module.graph.nodes):
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or value.dtype != torch.bool:
                continue
            if is_call(node, aten.where) and len(node.args) == 3:
                condition, chosen, other = node.args
            elif is_call(node, aten.masked_fill):
                other, condition, chosen = node.args
            else:
                continue
            cursor = Cursor(node)
            yes = _both(cursor, condition, chosen)
            no = _both(cursor, cursor.call(aten.logical_not.default, condition), other)
            made = cursor.call(aten.logical_or.default, yes, no) if yes is not None and no is not None else yes or no
            replace_node(node, _shaped(cursor, made, condition, value))
            modified = True
        return modified


def _both(cursor: Cursor, condition: fx.Node, choice: Any) -> fx.Node | None:
    """condition & choice; None where that is false throughout."""
    if isinstance(choice, fx.Node):
        return cursor.call(aten.logical_and.default, condition, choice)
    return condition if choice else None


def _shaped(cursor: Cursor, made: fx.Node | None, condition: fx.Node, value: Tensor) -> fx.Node:
    if made is None:
        made = cursor.call(aten.zeros_like.default, condition, dtype=torch.bool)
    if made.meta["val"].shape == value.shape:
        return made
    return cursor.call(aten.expand.default, made, list(value.shape))
