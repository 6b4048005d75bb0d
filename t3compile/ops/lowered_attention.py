"""Window attention in torch calls for graphs that torch itself runs or compiles: AOTInductor, portable .pt2 files.

Beside ops/regrouped_attention.py, the body of ONNX functions: there heads are folded into the batch, and both branches
are stacked into one call. Here tokens keep their heads side by side, so that a copy moves whole tokens, and none is
made where a partition is a view; each branch is a call of its own, so that nothing is copied to stack it, and its
regrouped tokens are free before the next branch's are made. At most eight axes, as such a file may become an engine.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from t3compile.ops.regroup import Box, boxes, group, ungroup_tokens
from t3compile.ops.regrouped_attention import (
    around_grid,
    extra_key_mask,
    repeat_heads,
    window_attention,
    with_extra_queries,
)
from t3compile.ops.window_arguments import WindowAttentionArgs
from t3compile.ops.window_views import WindowSteps
from t3compile.pattern import Branch

# Of heads, where a compiled graph may take long to make but shall be fast: each is regrouped in memory that the group
# before has left, so that less of it is fresh, and more of it in cache.
HEAD_GROUPS = 6


def lowered_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    args: WindowAttentionArgs,
    mask: Tensor | None = None,
    *,
    head_groups: int = 1,
) -> Tensor:
    """The op in differentiable torch calls, without in-place writes.

    q [B, N, Sq, D], k [B, N/g, S, D], v [B, N/g, S, Dv], mask broadcastable to [B, N, Sq, S]; any floating dtype.
    Returns [B, N, Sq, Dv], a view of a contiguous [B, Sq, N, Dv]. Heads are taken in at most ``head_groups`` equal
    groups, one after the other, where tokens are regrouped at all.
    """
    if args.pattern.is_full():
        return window_attention(q, k, v, args, mask)
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    groups = 1 if _is_view(args) else max(n for n in range(1, head_groups + 1) if k.shape[1] % n == 0)
    if groups == 1:
        mean = _mean_of_branches(q, k, v, args, mask)
    else:
        masks = (mask,) * groups if mask is None or mask.shape[1] == 1 else mask.chunk(groups, dim=1)
        parts = zip(*(x.chunk(groups, dim=1) for x in (q, k, v)), masks, strict=True)
        mean = torch.cat([_mean_of_branches(a, b, c, args, of_heads) for a, b, c, of_heads in parts], dim=2)
    if args.extra_queries:
        k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
        mean = with_extra_queries(mean, q, k, v, mask, args)
    return mean.contiguous().transpose(1, 2)


def _is_view(args: WindowAttentionArgs) -> bool:
    """Whether no token is copied."""
    branch, *others = args.pattern.computed_branches(args.grid)
    return not others and WindowSteps.in_order(args, branch) is not None


def _mean_of_branches(q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, mask: Tensor | None) -> Tensor:
    """[B, T*H*W, N, Dv]"""
    outputs = [_attend_in_branch(q, k, v, args, mask, branch) for branch in args.pattern.computed_branches(args.grid)]
    return outputs[0] if len(outputs) == 1 else (outputs[0] + outputs[1]) * 0.5


def _attend_in_branch(
    q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, mask: Tensor | None, branch: Branch
) -> Tensor:
    """One branch for the queries of the grid: [B, T*H*W, N, Dv]."""
    grid, splits, batch = args.grid, args.pattern.splits, q.shape[0]
    starts = (args.query_prefix, args.prefix, args.prefix)
    in_grid = [
        x.narrow(2, start, grid.tokens).transpose(1, 2).flatten(2).unflatten(1, grid.sizes)  # [B, T, H, W, N*D]
        for x, start in zip((q, k, v), starts, strict=True)
    ]
    extra_k, extra_v = (around_grid(x, 2, args.prefix, args.suffix) for x in (k, v))
    extra_mask = None if mask is None else extra_key_mask(mask, args)
    pieces = []
    for box in boxes(grid, splits):
        shape = (batch, box.windows, box.window_tokens)
        q_w, k_w, v_w = (
            group(x, grid, splits, branch, box).reshape(*shape, heads, -1)
            for x, heads in zip(in_grid, (q.shape[1], k.shape[1], k.shape[1]), strict=True)
        )
        k_w, v_w = _append_extra(k_w, extra_k), _append_extra(v_w, extra_v)
        q_w, k_w, v_w = (x.flatten(0, 1).transpose(1, 2) for x in (q_w, k_w, v_w))  # [B*windows, N, s, D]
        out = scaled_dot_product_attention(
            q_w,
            k_w,
            v_w,
            attn_mask=None if extra_mask is None else _window_mask(extra_mask, box),
            scale=args.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        pieces.append(out.transpose(1, 2).flatten(2).unflatten(1, box.sizes).unflatten(0, (batch, *box.parts)))
    by_token = ungroup_tokens(pieces, grid, splits, branch).flatten(1, 3)
    return torch.unflatten(by_token, 2, (q.shape[1], -1))


def _append_extra(windows: Tensor, extra: Tensor | None) -> Tensor:
    """Append the keys (or values) outside the grid [B, N, E, D] to every window's [B, windows, s, N, D]."""
    if extra is None:
        return windows
    spread = extra.transpose(1, 2).unsqueeze(1).expand(-1, windows.shape[1], -1, -1, -1)
    return torch.cat([windows, spread], dim=2)


def _window_mask(extra_mask: Tensor, box: Box) -> Tensor:
    """[1 or B, 1 or N, 1, E] -> [1 or B*windows, 1 or N, 1, s + E], where every key of the window is visible."""
    masks, heads = extra_mask.shape[:2]
    shape = (masks, heads, 1, box.window_tokens)
    inside = extra_mask.new_ones(shape) if extra_mask.dtype == torch.bool else extra_mask.new_zeros(shape)
    mask = torch.cat([inside, extra_mask], dim=3)
    return mask if masks == 1 else mask.unsqueeze(1).expand(-1, box.windows, -1, -1, -1).flatten(0, 1)
