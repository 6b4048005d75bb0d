"""Write searchsorted as a count: the place of a value is the number of boundaries below it. ONNX has no search.

Input graph:
    out = aten.searchsorted(boundaries, values)                       boundaries [..., K], values [..., N]
Output graph:
    below = aten.lt(aten.unsqueeze(boundaries, -2), aten.unsqueeze(values, -1))
    out = aten.sum(below, [-1])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from t3compile.passes.graph_pass import Cursor, GraphPass, is_call, replace_node
from t3compile.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class SearchByCounting(GraphPass):
    """Replace aten.searchsorted by comparisons of every value with every boundary."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        calls = [node for node in graph_module.graph.nodes if is_call(node, aten.searchsorted)]
        for node in calls:
            _count(node)
        return bool(calls)


def _count(node: fx.Node) -> None:
    cursor = Cursor(node)
    boundaries: Any = node.args[0]
    values: Any = node.args[1]
    traced = node.meta["val"]
    if not isinstance(values, fx.Node):
        values = cursor.call(aten.full.default, [], values, device=traced.device)
    if (sorter := node.kwargs.get("sorter")) is not None:
        boundaries = cursor.call(aten.gather.default, boundaries, -1, sorter)
    # One row of boundaries serves values of any shape; several rows stand beside rows of values.
    if values.meta["val"].dim() and boundaries.meta["val"].dim() > 1:
        boundaries = cursor.call(aten.unsqueeze.default, boundaries, -2)
    is_right = node.kwargs.get("right") or node.kwargs.get("side") == "right" or (len(node.args) > 3 and node.args[3])
    compare = aten.le.Tensor if is_right else aten.lt.Tensor
    below = cursor.call(compare, boundaries, cursor.call(aten.unsqueeze.default, values, -1))
    counted = cursor.call(aten.sum.dim_IntList, below, [-1])
    replace_node(node, cursor.call(aten._to_copy.default, counted, dtype=traced.dtype))
