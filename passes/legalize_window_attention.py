"""Make t3::window_attention acceptable to the ONNX exporter: a symbolic node that carries the configuration.

Input graph:
    out = t3.window_attention(q, k, v, grid, splits, branches, ...)
Output graph:
    out = onnx_symbolic.symbolic([q, k, v], "t3::WindowAttention", attributes=...)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from t3compile.errors import RewriteError
from t3compile.ops import WINDOW_ATTENTION, WindowAttentionArgs
from t3compile.ops.window_attention import ONNX_NAME
from t3compile.passes.graph_pass import GraphPass, inline_graph
from t3compile.program import Program, trace


class _Symbolic(nn.Module):
    def __init__(self, attributes: dict[str, Any]) -> None:
        super().__init__()
        self.attributes = attributes

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.onnx.ops.symbolic(
            ONNX_NAME,
            (q, k, v),
            self.attributes,
            dtype=q.dtype,
            shape=(*q.shape[:-1], v.shape[-1]),
            version=1,
        )
        return out


@dataclass(frozen=True)
class LegalizeWindowAttention(GraphPass):
    """Replace every call of the op by a symbolic ONNX node."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        calls = [node for node in graph_module.graph.nodes if node.target is WINDOW_ATTENTION]
        for node in calls:
            attributes = WindowAttentionArgs.of_call(node.args, node.kwargs).as_attributes()
            values = tuple(x.meta["val"] for x in node.args[:3])
            body = trace(_Symbolic(attributes), values).graph
            inline_graph(node, node.args[:3], body)
        return bool(calls)

    def ensures(self, result: Program) -> None:
        if any(node.target is WINDOW_ATTENTION for node in result.graph.nodes):
            raise RewriteError("internal: a window attention call was not legalized")
