"""The window attention op: one contract, its dense reference, its torch implementations and its kernel."""

from t3compile.ops.regrouped_attention import WindowAttention
from t3compile.ops.window_arguments import WindowAttentionArgs
from t3compile.ops.window_attention import WINDOW_ATTENTION, WindowAttentionCall

__all__ = [
    "WINDOW_ATTENTION",
    "WindowAttention",
    "WindowAttentionArgs",
    "WindowAttentionCall",
]
