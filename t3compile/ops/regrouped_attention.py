"""Window attention in differentiable torch calls: what runs on the CPU, and the body of the exported forms.

Tokens are regrouped by window (ops/regroup.py), one batched SDPA per window size serves both branches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from t3compile.geometry import Splits, TokenGrid
from t3compile.ops.regroup import Box, boxes, group, ungroup
from t3compile.ops.window_arguments import WindowAttentionArgs
from t3compile.pattern import Branch


def window_attention(q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, mask: Tensor | None = None) -> Tensor:
    """The op in differentiable torch calls: tokens regrouped by window, one batched SDPA per window size.

    q [B, N, Sq, D], k and v [B, N/g, S, D], mask broadcastable to [B, N, Sq, S]. Both branches run in one call,
    stacked along the batch.
    """
    k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    if args.pattern.is_full():
        full = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=args.scale)
        return full.transpose(1, 2).contiguous().transpose(1, 2)
    grid, splits = args.grid, args.pattern.splits
    branches = args.pattern.computed_branches(grid)
    starts = (args.query_prefix, args.prefix, args.prefix)
    folded = [x.flatten(0, 1) for x in (q, k, v)]  # [M, S, D] with M = B * N
    grid_qkv = [
        x.narrow(1, start, grid.tokens).unflatten(1, grid.sizes) for x, start in zip(folded, starts, strict=True)
    ]
    extra_kv = [around_grid(x, 1, args.prefix, args.suffix) for x in folded[1:]]
    extra_mask = None if mask is None else _fold_mask(extra_key_mask(mask, args), q.shape[:2])
    by_branch: list[list[Tensor]] = [[] for _ in branches]
    for box in boxes(grid, splits):
        q_w, k_w, v_w = (_stack_branches(x, grid, splits, branches, box) for x in grid_qkv)
        k_w, v_w = (_append_extra(x, extra, box, len(branches)) for x, extra in zip((k_w, v_w), extra_kv, strict=True))
        out = _attend_in_windows(q_w, k_w, v_w, extra_mask, args.scale)
        for results, piece in zip(by_branch, out.unbind(0), strict=True):
            results.append(piece.unflatten(1, box.sizes).unflatten(0, (-1, *box.parts)))
    merged = [ungroup(results, grid, splits, branch) for results, branch in zip(by_branch, branches, strict=True)]
    mean = merged[0] if len(merged) == 1 else (merged[0] + merged[1]) * 0.5
    by_token = mean.flatten(0, 2).unflatten(1, q.shape[:2]).transpose(0, 1)  # [B, G, N, Dv]
    return with_extra_queries(by_token, q, k, v, mask, args).contiguous().transpose(1, 2)


class WindowAttention(nn.Module):
    """The torch implementation as a module of q, k, v and, where there is one, the mask, for tracing its body."""

    def __init__(self, args: WindowAttentionArgs) -> None:
        super().__init__()
        self.args = args

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return window_attention(q, k, v, self.args, mask)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N/g, S, D] -> [B, N, S, D]: g queries' heads in a row share one of the keys' and values'."""
    if x.shape[1] == heads:
        return x
    batch, key_heads, tokens, depth = x.shape
    return x.unsqueeze(2).expand(batch, key_heads, heads // key_heads, tokens, depth).flatten(1, 2)


def _stack_branches(x: Tensor, grid: TokenGrid, splits: Splits, branches: tuple[Branch, ...], box: Box) -> Tensor:
    """[M, T, H, W, D] -> [branches, M*windows, window tokens, D], with one copy per branch."""
    grouped = [group(x, grid, splits, branch, box) for branch in branches]
    stacked = grouped[0] if len(grouped) == 1 else torch.cat(grouped, 0)
    return stacked.reshape(len(branches), -1, box.window_tokens, x.shape[-1])


def around_grid(x: Tensor, dim: int, before: int, after: int) -> Tensor | None:
    """The first and last tokens along ``dim``, or None where there are none outside the grid."""
    if before + after == 0:
        return None
    return torch.cat([x.narrow(dim, 0, before), x.narrow(dim, x.shape[dim] - after, after)], dim)


def _append_extra(x: Tensor, extra: Tensor | None, box: Box, branches: int) -> Tensor:
    """Append the global keys (or values) [M, E, D] to those of every window [branches, M*windows, s, D]."""
    if extra is None:
        return x
    folded, tokens, depth = extra.shape
    spread = extra.unsqueeze(1).expand(folded, box.windows, tokens, depth)
    spread = spread.reshape(1, folded * box.windows, tokens, depth)
    return torch.cat([x, spread.expand(branches, -1, -1, -1)], dim=2)


def extra_key_mask(mask: Tensor, args: WindowAttentionArgs) -> Tensor | None:
    """The row that all grid queries have, at the keys outside the grid, [1 or B, 1 or N, 1, E]; None: all visible."""
    if mask.shape[3] == 1:
        return None  # the same at the keys of the grid, which are visible
    row = mask if mask.shape[2] == 1 else mask.narrow(2, args.query_prefix, 1)
    extra = around_grid(row, 3, args.prefix, args.suffix)
    if extra is not None and extra.dtype != torch.bool:
        # What is added at every key of the grid alike counts for nothing; the others are weighted against it.
        extra = extra - row.narrow(3, args.prefix, 1)
    return extra


def _fold_mask(mask: Tensor | None, batch_and_heads: torch.Size) -> Tensor | None:
    """[1 or B, 1 or N, 1, E] -> [1 or B or M, 1, 1, E]."""
    if mask is None or mask.shape[1] == 1:
        return mask
    return mask.expand(*batch_and_heads, -1, -1).flatten(0, 1).unsqueeze(1)


def _attend_in_windows(q: Tensor, k: Tensor, v: Tensor, extra_mask: Tensor | None, scale: float | None) -> Tensor:
    """SDPA of [branches, M*windows, s, D]; the mask of the extra keys is shared by all windows of its batch element.

    The batch elements with a mask of their own go to the first axis: so the mask broadcasts over windows.
    """
    if extra_mask is None:
        return scaled_dot_product_attention(q, k, v, scale=scale)
    masks, branches = extra_mask.shape[0], q.shape[0]
    window = (masks, 1, 1, q.shape[2])
    visible = extra_mask.new_ones(window) if extra_mask.dtype == torch.bool else extra_mask.new_zeros(window)
    mask = torch.cat([visible, extra_mask], dim=3)
    if masks == 1:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    mask = torch.cat([mask] * branches, dim=0)
    q, k, v = (x.reshape(branches * masks, -1, *x.shape[2:]) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.reshape(branches, -1, *out.shape[2:])


def with_extra_queries(
    grid_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, args: WindowAttentionArgs
) -> Tensor:
    """[B, G, N, Dv] -> [B, Sq, N, Dv]: queries outside the grid attend to all keys that their mask shows."""
    around = (args.query_prefix, args.query_suffix)
    extra_q = around_grid(q, 2, *around)
    if extra_q is None:
        return grid_out
    if mask is not None and mask.shape[2] != 1:
        mask = around_grid(mask, 2, *around)
    out = scaled_dot_product_attention(extra_q, k, v, attn_mask=mask, scale=args.scale).transpose(1, 2)
    before, after = out.split(around, dim=1)
    return torch.cat([before, grid_out, after], dim=1)
