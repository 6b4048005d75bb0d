"""Drop aten.copy: it restates its source, which is at most cast and expanded.

The destination is only looked at for its shape and dtype; where it was made by empty_like, nothing of it is left.

Input graph:
    out = aten.copy(destination, source)
Output graph:
    cast = aten._to_copy(source, dtype of destination)                only where the dtypes differ
    out = aten.expand(cast, shape of destination)                     only where the shapes differ
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from t3compile.passes.graph_pass import Cursor, GraphPass, is_call, replace_node
from t3compile.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class ForwardCopies(GraphPass):
    """Use the source of a functional copy directly."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        copies = [node for node in graph_module.graph.nodes if is_call(node, aten.copy)]
        for node in copies:
            source = node.args[1]
            copied = node.meta["val"]
            cursor = Cursor(node)
            if source.meta["val"].dtype != copied.dtype:
                source = cursor.call(aten._to_copy.default, source, dtype=copied.dtype)
            if source.meta["val"].shape != copied.shape:
                source = cursor.call(aten.expand.default, source, list(copied.shape))
            replace_node(node, source)
        return bool(copies)
