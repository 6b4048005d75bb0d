"""The naive version that is the truth: dense attention under the branches' masks.

Written from the index laws of the paper token by token, sharing nothing with the regrouped implementation.
Source: arXiv 2512.13492; prefix/suffix tokens stay global (own extension). Grid and pattern are in (T, H, W); the
tokens stand in the sequence in any ``order`` of these axes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from t3compile.geometry import AXES, FRAME_MAJOR, TokenGrid, dilated_part, local_part
from t3compile.pattern import Branch, WindowPattern

_PART_OF = {"local": local_part, "dilated": dilated_part}


def window_ids(grid: TokenGrid, pattern: WindowPattern, branch: Branch, order: str = FRAME_MAJOR) -> Tensor:
    """Window number of every grid token in sequence order; int64 [T*H*W]."""
    part_of = _PART_OF[branch]
    n_t, n_h, n_w = pattern.splits.counts
    t, h, w = (
        torch.tensor([part_of(i, length, n) for i in range(length)])
        for length, n in zip(grid.sizes, (n_t, n_h, n_w), strict=True)
    )
    ids = (t[:, None, None] * n_h + h[None, :, None]) * n_w + w[None, None, :]
    return ids.permute(*(AXES.index(axis) for axis in order)).reshape(-1)


def branch_mask(
    grid: TokenGrid,
    pattern: WindowPattern,
    branch: Branch,
    *,
    prefix: int = 0,
    suffix: int = 0,
    query_prefix: int | None = None,
    query_suffix: int | None = None,
    order: str = FRAME_MAJOR,
    rows: Tensor | None = None,
) -> Tensor:
    """Which keys each query sees; bool [R, S] for the query positions ``rows`` (int64 [R], default all).

    The queries have as many tokens before and after the grid as the keys where ``query_prefix`` or ``query_suffix``
    is None.
    """
    extra = -1
    grid_ids = window_ids(grid, pattern, branch, order)

    def with_extra(before: int, after: int) -> Tensor:
        return torch.cat([torch.full((before,), extra), grid_ids, torch.full((after,), extra)])

    ids = with_extra(prefix, suffix)
    row_ids = with_extra(
        prefix if query_prefix is None else query_prefix, suffix if query_suffix is None else query_suffix
    )
    row_ids = row_ids if rows is None else row_ids[rows]
    same_window = row_ids[:, None] == ids[None, :]
    return same_window | (ids == extra)[None, :] | (row_ids == extra)[:, None]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale, under the mask) v, in the dtype of v; 0 for a query that sees no key, as torch's SDPA.

    q: [..., R, D], k and v: [..., S, D], mask: None or broadcastable to [..., R, S], bool (True: visible) or floating
    (added to the scores), scale: D^-0.5 where None.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q * scale) @ k.transpose(-1, -2)  # [..., R, S]
    if mask is None:
        return scores.softmax(dim=-1) @ v
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    is_blind = (scores == float("-inf")).all(dim=-1, keepdim=True)
    weights = scores.softmax(dim=-1).masked_fill(is_blind, 0.0)
    return weights.to(v.dtype) @ v


# softmax attention of q, k, v under a mask, bool (True: visible) or additive, and a scale (None: D^-0.5).
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
    query_prefix: int | None = None,
    query_suffix: int | None = None,
    order: str = FRAME_MAJOR,
    mask: Tensor | None = None,
    scale: float | None = None,
    rows: Tensor | None = None,
    attend: MaskedAttention = masked_attention,
    chunk: int = 1024,
) -> Tensor:
    """Mean over the branches of dense masked attention, in the dtype of q.

    q: [B, N, Sq, D], k and v: [B, N/g, S, D], each head for g heads of q in a row; mask: of the full attention, bool
    (True: visible) or additive, broadcastable to [B, N, Sq, S]; all of it is applied. Returns [B, N, R, D] for the
    query positions ``rows`` (int64 [R], default all Sq), computed ``chunk`` rows at a time so that no Sq x S tensor is
    held.
    """
    rows = torch.arange(q.shape[-2]) if rows is None else rows
    k, v = (x if x.shape[-3] == q.shape[-3] else x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    outputs = []
    for part in rows.split(chunk):
        total = torch.zeros((), dtype=q.dtype)
        for branch in pattern.branches:
            visible = branch_mask(
                grid,
                pattern,
                branch,
                prefix=prefix,
                suffix=suffix,
                query_prefix=query_prefix,
                query_suffix=query_suffix,
                order=order,
                rows=part,
            )
            both = visible if mask is None else _under_mask(visible, mask, part)
            total = total + attend(q[..., part, :], k, v, both, scale)
        outputs.append(total / len(pattern.branches))
    return torch.cat(outputs, dim=-2)


def _under_mask(visible: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    """A mask at the query positions ``rows`` where ``visible`` [R, S] admits it."""
    has_rows = mask.dim() > 1 and mask.shape[-2] > 1
    at_rows = mask[..., rows, :] if has_rows else mask
    if mask.dtype == torch.bool:
        return visible & at_rows
    return at_rows.masked_fill(~visible, float("-inf"))
