"""Window attention as the paper computes it: the baseline that the op is measured against.

Source: arXiv 2512.13492 and the authors' code (zhangzjn/T3-Video, diffsynth/models/wan_video_dit.py). Each branch on
its own, also where both are the same partition: q, k and v regrouped by window, one batched attention, its output
put back; then the sum of both outputs, halved. Full attention runs once. Written apart from ops/regroup.py.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from t3compile.geometry import Splits, TokenGrid
from t3compile.ops.regrouped_attention import window_attention
from t3compile.ops.window_arguments import WindowAttentionArgs
from t3compile.pattern import Branch, WindowPattern

# Axes of [B, (axis t), (axis h), (axis w), N, D], where each axis is (part, token) for local windows and
# (token, part) for dilated ones, in the order batch, parts, tokens, heads, depth.
_BY_WINDOW: dict[Branch, tuple[int, ...]] = {
    "local": (0, 1, 3, 5, 2, 4, 6, 7, 8),
    "dilated": (0, 2, 4, 6, 1, 3, 5, 7, 8),
}


def paper_window_attention(
    q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, mask: Tensor | None = None
) -> Tensor:
    """The op's result, computed as the paper does.

    q [B, N, Sq, D], k [B, N/g, S, D], v [B, N/g, S, Dv], mask broadcastable to [B, N, Sq, S]; any floating dtype.
    Returns [B, N, Sq, Dv]. Tokens are regrouped with their heads side by side, [B*windows, window tokens, N, D], as the
    authors' code does: a copy per tensor and branch, but for partitions that are a view, such as frame by frame.

    The paper has neither windows of several sizes nor tokens outside the grid nor masks: there each branch runs by
    ops.regrouped_attention, still on its own.
    """
    if args.pattern.is_full():
        return window_attention(q, k, v, args, mask)
    outputs = [_attend_in_branch(q, k, v, args, mask, branch) for branch in args.pattern.branches]
    return outputs[0] if len(outputs) == 1 else (outputs[0] + outputs[1]) / 2


def _attend_in_branch(
    q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, mask: Tensor | None, branch: Branch
) -> Tensor:
    grid, splits = args.grid, args.pattern.splits
    if mask is not None or args.extra_tokens or args.extra_queries or not splits.divide(grid):
        return window_attention(q, k, v, replace(args, pattern=WindowPattern(splits, (branch,))), mask)
    q, k, v = (_by_window(x, grid, splits, branch).transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, scale=args.scale, enable_gqa=q.shape[1] != k.shape[1])
    return _by_token(out.transpose(1, 2), grid, splits, branch).transpose(1, 2)


def _spread(grid: TokenGrid, splits: Splits, branch: Branch) -> list[int]:
    """Both sizes of every axis, as the branch's law cuts it."""
    pairs = [(n, length // n) for length, n in zip(grid.sizes, splits.counts, strict=True)]
    return [size for pair in pairs for size in (pair if branch == "local" else pair[::-1])]


def _by_window(x: Tensor, grid: TokenGrid, splits: Splits, branch: Branch) -> Tensor:
    """[B, N, T*H*W, D] -> [B*windows, window tokens, N, D], contiguous."""
    batch, heads, tokens, depth = x.shape
    axes = x.transpose(1, 2).reshape(batch, *_spread(grid, splits, branch), heads, depth)
    windows = axes.permute(_BY_WINDOW[branch]).reshape(batch * splits.windows, tokens // splits.windows, heads, depth)
    return windows.contiguous()


def _by_token(x: Tensor, grid: TokenGrid, splits: Splits, branch: Branch) -> Tensor:
    """[B*windows, window tokens, N, D] -> [B, T*H*W, N, D], contiguous."""
    heads, depth = x.shape[2:]
    sizes = [length // n for length, n in zip(grid.sizes, splits.counts, strict=True)]
    back = sorted(range(9), key=_BY_WINDOW[branch].__getitem__)
    axes = x.reshape(-1, *splits.counts, *sizes, heads, depth).permute(back)
    return axes.reshape(-1, grid.tokens, heads, depth).contiguous()
