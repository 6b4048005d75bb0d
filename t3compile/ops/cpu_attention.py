"""Window attention on CPUs: a few windows at a time, so that regrouped tokens stay in cache.

torch's CPU SDPA takes any strides, but one step between the tokens of a window. Where a window's tokens stand at one
step in memory (frame by frame, rows of a grid, every n-th token of the last axis) q, k and v are read where they are;
where the windows follow each other too, the output is the result, and nothing is copied at all. Elsewhere tokens are
copied into a scratch that a chunk of windows and heads fills and the next chunk uses again. Outputs are written to
their places, the second branch averaged with the first: memory is that of full attention plus the scratch, and most of
what copies cost is the cache's bandwidth, not the memory's.

In-place code on plain tensors, below autograd and never traced; lowered_attention.py is for torch's graphs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from t3compile.ops.regroup import boxes
from t3compile.ops.regrouped_attention import around_grid, extra_key_mask, window_attention
from t3compile.ops.window_arguments import WindowAttentionArgs
from t3compile.ops.window_views import WindowSteps, as_attention_input
from t3compile.pattern import Branch

# q, k, v and the output of a chunk: with more they fall out of the caches, with less the calls themselves cost.
CHUNK_BYTES_PER_THREAD = 6 << 20


def cpu_window_attention(
    q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, mask: Tensor | None = None
) -> Tensor:
    """The op on CPU tensors that passed its checks; not differentiable.

    q [B, N, Sq, D], k [B, N/g, S, D], v [B, N/g, S, Dv], mask broadcastable to [B, N, Sq, S]; any floating dtype and
    strides. Returns [B, N, Sq, Dv], a view of a contiguous [B, Sq, N, Dv].
    """
    if args.pattern.is_full():
        return window_attention(q, k, v, args, mask)
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    first, *second = args.pattern.computed_branches(args.grid)
    out = _attend_in_place(q, k, v, args, first)
    if out is None:
        out = q.new_empty((q.shape[0], args.query_tokens, q.shape[1], v.shape[3])).transpose(1, 2)
        _attend_in_chunks(q, k, v, args, first, mask, out, averages=False)
    for branch in second:
        _attend_in_chunks(q, k, v, args, branch, mask, out, averages=True)
    if args.extra_queries:
        _write_extra_queries(q, k, v, args, mask, out)
    return out


def _attend_in_place(q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, branch: Branch) -> Tensor | None:
    """One call on q, k and v as they are, whose output is the branch's; None where that takes a copy."""
    if args.extra_tokens or args.extra_queries or q.shape[3] != v.shape[3]:
        return None
    steps = WindowSteps.in_order(args, branch)
    if steps is None:
        return None
    queries, keys, values = (as_attention_input(steps.view(x, 0), leading=4) for x in (q, k, v))
    if queries is None or keys is None or values is None or not _is_tokens_first(queries):
        return None
    out = _attend(queries, keys, values, None, args.scale)
    by_token: Tensor = out.transpose(1, 2).reshape(q.shape[0], args.grid.tokens, *q.shape[1::2])
    return by_token.contiguous().transpose(1, 2)


def _is_tokens_first(x: Tensor) -> bool:
    """Whether [windows, N, s, D] stands in memory as [windows, s, N, D], gaps aside: so does SDPA's output then."""
    batch, head, token, _ = x.stride()
    return x.shape[1] == 1 or batch >= token >= head * x.shape[1]


@dataclass(frozen=True)
class _Chunk:
    """Windows of a box, per axis, and heads of the keys."""

    t: slice
    h: slice
    w: slice
    heads: slice

    def of(self, windows: Tensor, group: int = 1) -> Tensor:
        """Its part of [p_t, p_h, p_w, N, ...] whose heads are ``group`` for each of the keys."""
        return windows[self.t, self.h, self.w, slice(self.heads.start * group, self.heads.stop * group)]


def _slices(length: int, at_most: int, held: int, threads: int) -> tuple[list[slice], int]:
    """Few slices, nearly equal, a largest one first; and the length of that.

    Each of ``length`` has ``held`` windows and heads. An axis that does not fit is cut into slices whose windows and
    heads the threads share equally, where every thread can have one; the last takes what is left.
    """
    step = threads // math.gcd(held, threads)
    if at_most >= length or at_most < step:
        step = 1
    steps = -(-length // step)
    count = -(-steps // (at_most // step))
    bounds = [min(length, -(-steps * i // count) * step) for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)], bounds[1]


def _chunks(parts: tuple[int, ...], key_heads: int, bytes_per_head: int) -> Iterator[_Chunk]:
    """All heads of one window, if they fit; then windows, neighbours along w first. See _slices for how many."""
    threads = torch.get_num_threads()
    fit = max(1, CHUNK_BYTES_PER_THREAD * threads // bytes_per_head)
    slices: list[list[slice]] = []
    held = 1
    for length in (key_heads, *reversed(parts)):
        of_axis, longest = _slices(length, max(1, fit // held), held, threads)
        slices.append(of_axis)
        held *= longest
    for t, h, w, heads in itertools.product(*reversed(slices)):
        yield _Chunk(t, h, w, heads)


class _Scratch:
    """One buffer for the windows of q, of k or of v, that every chunk uses again."""

    def __init__(self, like: Tensor, depth: int) -> None:
        self.buffer = like.new_empty((0, depth))
        self.is_padded = like.shape[3] < depth

    def hold(self, windows: Tensor, extra: Tensor | None) -> Tensor:
        """[c_t, c_h, c_w, N, s_t, s_h, s_w, D], keys outside the grid [N, E, D] -> [windows, N, s + E, depth].

        As they are where that is a view, else copied.
        """
        if extra is None and not self.is_padded:
            in_place = as_attention_input(windows, leading=3)
            if in_place is not None:
                return in_place
        *parts, heads, s_t, s_h, s_w, depth = windows.shape
        tokens = s_t * s_h * s_w
        with_extra = tokens + (0 if extra is None else extra.shape[1])
        shape = (parts[0] * parts[1] * parts[2], with_extra, heads, self.buffer.shape[1])
        rows = shape[0] * with_extra * heads
        if self.buffer.shape[0] < rows:
            # Nothing but zeros may stand in the columns that pad the depth.
            make = self.buffer.new_zeros if self.is_padded else self.buffer.new_empty
            self.buffer = make((rows, shape[3]))
        held: Tensor = self.buffer[:rows].view(shape).transpose(1, 2)
        held[:, :, :tokens, :depth].unflatten(2, (s_t, s_h, s_w)).unflatten(0, parts).copy_(windows)
        if extra is not None:
            held[:, :, tokens:, :depth].copy_(extra)
        return held


def _attend_in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    args: WindowAttentionArgs,
    branch: Branch,
    mask: Tensor | None,
    out: Tensor,
    *,
    averages: bool,
) -> None:
    """Write one branch to the grid's tokens of ``out``, or the mean of it and what they hold."""
    # torch's fused SDPA wants one depth; columns of zeros change nothing under the scale that was meant.
    depth = max(q.shape[3], v.shape[3])
    scale = q.shape[3] ** -0.5 if args.scale is None and depth > q.shape[3] else args.scale
    group = q.shape[1] // k.shape[1]
    outside = (None, *(around_grid(x, 2, args.prefix, args.suffix) for x in (k, v)))
    extra_mask = None if mask is None else extra_key_mask(mask, args)
    scratch = [_Scratch(x, depth) for x in (q, k, v)]
    starts = (args.query_prefix, args.prefix, args.prefix, args.query_prefix)
    for box in boxes(args.grid, args.pattern.splits):
        steps = WindowSteps.of(args, branch, box)
        views = [steps.view(x, start) for x, start in zip((q, k, v, out), starts, strict=True)]
        tokens = group * box.window_tokens + box.window_tokens + args.extra_tokens
        chunks = list(_chunks(box.parts, k.shape[1], 2 * tokens * depth * q.element_size()))
        for i, chunk in itertools.product(range(q.shape[0]), chunks):
            *qkv, out_w = (chunk.of(x[i], g) for x, g in zip(views, (group, 1, 1, group), strict=True))
            extras = (None if x is None else x[i, chunk.heads] for x in outside)
            held = [s.hold(x, extra) for s, x, extra in zip(scratch, qkv, extras, strict=True)]
            visible = None if extra_mask is None else _window_mask(extra_mask, i, chunk, group, box.window_tokens)
            _write_windows(out_w, held, visible, scale, averages=averages)


def _write_windows(out: Tensor, qkv: list[Tensor], mask: Tensor | None, scale: float | None, *, averages: bool) -> None:
    """Attention of q, k, v [windows, N, s, depth] to their places [c_t, c_h, c_w, N, s_t, s_h, s_w, Dv]."""
    q, k, v = qkv
    result = _attend(q, k, v, mask, scale)[..., : out.shape[-1]]
    result = result.unflatten(2, out.shape[4:7]).unflatten(0, out.shape[:3])
    if averages:
        torch.mul(result.add_(out), 0.5, out=out)
    else:
        out.copy_(result)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _window_mask(extra_mask: Tensor, element: int, chunk: _Chunk, group: int, window_tokens: int) -> Tensor:
    """The mask of a batch element and heads: visible keys of a window, then those outside, [1, 1 or N, 1, s + E]."""
    masks, heads, _, _ = extra_mask.shape
    of_heads = slice(chunk.heads.start * group, chunk.heads.stop * group) if heads > 1 else slice(0, 1)
    outside = extra_mask[element if masks > 1 else 0, of_heads].unsqueeze(0)
    shape = (1, outside.shape[1], 1, window_tokens)
    inside = outside.new_ones(shape) if outside.dtype == torch.bool else outside.new_zeros(shape)
    return torch.cat([inside, outside], dim=3)


def _write_extra_queries(
    q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, mask: Tensor | None, out: Tensor
) -> None:
    """Queries outside the grid attend to all keys that their mask shows."""
    around = (args.query_prefix, args.query_suffix)
    extra_q = around_grid(q, 2, *around)
    assert extra_q is not None
    if mask is not None and mask.shape[2] != 1:
        mask = around_grid(mask, 2, *around)
    before, after = _attend(extra_q, k, v, mask, args.scale).split(around, dim=2)
    out[:, :, : args.query_prefix].copy_(before)
    out[:, :, args.query_tokens - args.query_suffix :].copy_(after)
