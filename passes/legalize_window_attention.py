"""Make t3::window_attention acceptable to the ONNX exporter: a symbolic node that carries the configuration.

Input graph:
    out = t3.window_attention(q, k, v, grid, splits, branches, ..., mask=m)
Output graph:
    out = onnx_symbolic.symbolic([q, k, v, m], "t3::WindowAttention", attributes=...)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from t3compile.errors import RewriteError
from t3compile.ops import WINDOW_ATTENTION
from t3compile.ops.window_attention import ONNX_NAME
from t3compile.passes.graph_pass import GraphPass
from t3compile.passes.inline_calls import inline_calls
from t3compile.program import Program


class _Symbolic(nn.Module):
    def __init__(self, attributes: dict[str, Any]) -> None:
        super().__init__()
        self.attributes = attributes

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
        out: Tensor = torch.onnx.ops.symbolic(
            ONNX_NAME,
            (q, k, v, *mask),
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
        return inline_calls(graph_module.graph, lambda args: _Symbolic(args.as_attributes()))

    def ensures(self, result: Program) -> None:
        if any(node.target is WINDOW_ATTENTION for node in result.graph.nodes):
            raise RewriteError("internal: a window attention call was not legalized")
