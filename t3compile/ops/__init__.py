"""The window attention op: one contract, its dense reference and its torch implementation."""

from t3compile.ops.window_attention import (
    WINDOW_ATTENTION,
    WindowAttention,
    WindowAttentionArgs,
    WindowAttentionCall,
)

__all__ = ["WINDOW_ATTENTION", "WindowAttention", "WindowAttentionArgs", "WindowAttentionCall"]
