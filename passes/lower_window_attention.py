"""Lower t3::window_attention to plain aten calls, so that a file loads with torch alone.

Input graph:
    out = t3.window_attention(q, k, v, grid, splits, branches, ..., mask=m)
Output graph:
    the body of ops.lowered_attention: views, permutes, cat, a scaled_dot_product_attention per branch and window size
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, fx, nn

from t3compile.errors import RewriteError
from t3compile.ops import WINDOW_ATTENTION, WindowAttentionArgs
from t3compile.ops.lowered_attention import lowered_window_attention
from t3compile.passes.graph_pass import GraphPass
from t3compile.passes.inline_calls import inline_calls
from t3compile.program import Program

# Of q, k, v, the arguments and the mask, as ops.lowered_attention.lowered_window_attention.
AttentionFunction = Callable[[Tensor, Tensor, Tensor, WindowAttentionArgs, Tensor | None], Tensor]


@dataclass(frozen=True)
class LowerWindowAttention(GraphPass):
    """Inline the torch calls of ``body`` at every call: that of ops.lowered_attention, or another beside it."""

    body: AttentionFunction = lowered_window_attention

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        return inline_calls(graph_module.graph, lambda args: _Body(self.body, args))

    def ensures(self, result: Program) -> None:
        if any(node.target is WINDOW_ATTENTION for node in result.graph.nodes):
            raise RewriteError("internal: a window attention call was not lowered")


class _Body(nn.Module):
    def __init__(self, function: AttentionFunction, args: WindowAttentionArgs) -> None:
        super().__init__()
        self._function, self._args = function, args

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._function(q, k, v, self._args, mask)
