"""The naive version that is the truth: dense attention under the branches' masks.

Written from the index laws of the paper token by token, sharing nothing with the regrouped implementation.
Source: arXiv 2512.13492; prefix/suffix tokens stay global (own extension).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from t3compile.geometry import TokenGrid, dilated_part, local_part
from t3compile.pattern import Branch, WindowPattern

_PART_OF = {"local": local_part, "dilated": dilated_part}


def window_ids(grid: TokenGrid, pattern: WindowPattern, branch: Branch) -> Tensor:
    """Window number of every grid token in sequence order; int64 [T*H*W]."""
    part_of = _PART_OF[branch]
    n_t, n_h, n_w = pattern.splits.counts
    t, h, w = (
        torch.tensor([part_of(i, length, n) for i in range(length)])
        for length, n in zip(grid.sizes, (n_t, n_h, n_w), strict=True)
    )
    ids = (t[:, None, None] * n_h + h[None, :, None]) * n_w + w[None, None, :]
    return ids.reshape(-1)


def branch_mask(
    grid: TokenGrid,
    pattern: WindowPattern,
    branch: Branch,
    *,
    prefix: int = 0,
    suffix: int = 0,
    rows: Tensor | None = None,
) -> Tensor:
    """Which keys each query sees; bool [R, S] for the query positions ``rows`` (int64 [R], default all S)."""
    extra = -1
    ids = torch.cat(
        [
            torch.full((prefix,), extra),
            window_ids(grid, pattern, branch),
            torch.full((suffix,), extra),
        ]
    )
    row_ids = ids if rows is None else ids[rows]
    same_window = row_ids[:, None] == ids[None, :]
    return same_window | (ids == extra)[None, :] | (row_ids == extra)[:, None]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale, over the keys that the mask admits) v, in the dtype of q.

    q: [..., R, D], k and v: [..., S, D], mask: bool [R, S] or None, scale: D^-0.5 where None.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q * scale) @ k.transpose(-1, -2)  # [..., R, S]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v


# softmax attention of q, k, v under a bool mask (True: visible) and a scale (None: D^-0.5).
MaskedAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """The same as masked_attention by torch's own fused call."""
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def reference_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: TokenGrid,
    pattern: WindowPattern,
    prefix: int = 0,
    suffix: int = 0,
    scale: float | None = None,
    rows: Tensor | None = None,
    attend: MaskedAttention = masked_attention,
    chunk: int = 1024,
) -> Tensor:
    """Mean over the branches of dense masked attention, in the dtype of q.

    q, k, v: [B, N, S, D]. Returns [B, N, R, D] for the query positions ``rows`` (int64 [R], default all S),
    computed ``chunk`` rows at a time so that no S x S tensor is held.
    """
    rows = torch.arange(q.shape[-2]) if rows is None else rows
    outputs = []
    for part in rows.split(chunk):
        total = torch.zeros((), dtype=q.dtype)
        for branch in pattern.branches:
            mask = branch_mask(grid, pattern, branch, prefix=prefix, suffix=suffix, rows=part)
            total = total + attend(q[..., part, :], k, v, mask, scale)
        outputs.append(total / len(pattern.branches))
    return torch.cat(outputs, dim=-2)
