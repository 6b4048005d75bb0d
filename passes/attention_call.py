"""The one call that every spelling of attention becomes, and its arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one scaled_dot_product_attention node."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    dropout: float
    is_causal: bool
    scale: float | None

    @classmethod
    def read(cls, node: fx.Node) -> AttentionCall:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        q, k, v = (given[name] for name in names[:3])
        assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
        return cls(
            node,
            q,
            k,
            v,
            given.get("attn_mask"),  # type: ignore[arg-type]
            given.get("dropout_p", 0.0),  # type: ignore[arg-type]
            bool(given.get("is_causal", False)),
            given.get("scale"),  # type: ignore[arg-type]
        )

    def shape(self, which: fx.Node) -> tuple[int, ...]:
        value = which.meta["val"]
        assert isinstance(value, Tensor)
        return tuple(int(size) for size in value.shape)
