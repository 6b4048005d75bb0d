"""Sort without asking for stability: ONNX's TopK breaks ties by the lower index, and knows no booleans.

Input graph:
    values, indices = aten.sort.stable(x, stable=True, dim=1)         x: bool
Output graph:
    y = aten._to_copy(x, dtype=int32)
    sorted, indices = aten.sort(y, 1, False)
    values = aten._to_copy(sorted, dtype=bool)
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


@dataclass(frozen=True)
class SortPlainly(GraphPass):
    """Replace stable sorts and sorts of booleans."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        modified = False
        for node in list(graph_module.graph.nodes):
            if not is_call(node, aten.sort, aten.argsort):
                continue
            is_stable = node.target in (aten.sort.stable, aten.argsort.stable)
            if is_stable or node.args[0].meta["val"].dtype == torch.bool:
                _spell(node)
                modified = True
        return modified


def _spell(node: fx.Node) -> None:
    cursor = Cursor(node)
    source: Any = node.args[0]
    # sort.stable takes the flag as an optional second argument, argsort.stable only by name.
    after = 2 if node.target is aten.sort.stable else 1
    given = dict(zip(("dim", "descending"), node.args[after:], strict=False)) | dict(node.kwargs)
    is_boolean = source.meta["val"].dtype == torch.bool
    if is_boolean:
        source = cursor.call(aten._to_copy.default, source, dtype=torch.int32)
    made = cursor.call(aten.sort.default, source, given.get("dim", -1), given.get("descending", False))
    if is_call(node, aten.argsort):
        replace_node(node, cursor.call(operator.getitem, made, 1))
        return
    if is_boolean:
        for user in [user for user in node.users if user.args[1] == 0]:
            values = Cursor(user).call(operator.getitem, made, 0)
            replace_node(user, Cursor(user).call(aten._to_copy.default, values, dtype=torch.bool))
    replace_node(node, made)
