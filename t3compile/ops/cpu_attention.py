"""Window attention on CPUs: a few windows at a time, so that regrouped tokens stay in cache.

torch's CPU SDPA takes any strides but one step between the tokens of a window. Where a window's tokens stand at one
step in memory (frame by frame, rows of a grid, every n-th token of the last axis) q, k and v are read where they are,
and where the windows follow each other too the output is the result: no copy at all. Elsewhere tokens are copied into a
scratch that a chunk of windows and heads fills and the next chunk uses again, and outputs are written straight to
their places; the second branch averages into the first's. So memory is that of full attention plus the scratch,
and copies cost cache bandwidth, not the memory's.

In-place code on plain tensors: below autograd, and never traced. ops/regrouped_attention.py is what is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from t3compile.ops.regroup import Box, boxes
from t3compile.ops.regrouped_attention import around_grid, extra_key_mask, window_attention
from t3compile.ops.window_arguments import WindowAttentionArgs
from t3compile.pattern import Branch

# What q, k, v and the output of a chunk take: with more they fall out of the caches, with less calls dominate.
SCRATCH_BYTES_PER_THREAD = 4 << 20


@dataclass(frozen=True)
class WindowAxes:
    """Where the windows of a box stand: per axis (t, h, w) how many parts of how many tokens, steps in tokens."""

    parts: tuple[int, ...]
    sizes: tuple[int, ...]
    part_steps: tuple[int, ...]
    token_steps: tuple[int, ...]
    first: int

    @classmethod
    def of(cls, args: WindowAttentionArgs, branch: Branch, box: Box) -> WindowAxes:
        """Both index laws are a start and a step: no run of parts needs a gather, a pad or a cat."""
        _, height, width = args.grid.sizes
        part_steps, token_steps, first = [], [], 0
        for pitch, length, n, run in zip(
            (height * width, width, 1), args.grid.sizes, args.pattern.splits.counts, box.runs, strict=True
        ):
            if branch == "local":
                start = run.first_part * run.size + (length % n if run.first_part else 0)
                part_step, token_step = run.size, 1
            else:
                start, part_step, token_step = run.first_part, 1, n
            part_steps.append(part_step * pitch)
            token_steps.append(token_step * pitch)
            first += start * pitch
        return cls(box.parts, box.sizes, tuple(part_steps), tuple(token_steps), first)

    def view(self, x: Tensor, start: int) -> Tensor:
        """[B, N, S, D] whose grid begins at token ``start`` -> [B, p_t, p_h, p_w, N, s_t, s_h, s_w, D], no copy."""
        batch, heads, _, depth = x.shape
        batch_step, head_step, token, depth_step = x.stride()
        shape = (batch, *self.parts, heads, *self.sizes, depth)
        steps = (
            batch_step,
            *(step * token for step in self.part_steps),
            head_step,
            *(step * token for step in self.token_steps),
            depth_step,
        )
        return x.as_strided(shape, steps, x.storage_offset() + (start + self.first) * token)


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
    out = None
    for i, branch in enumerate(args.pattern.computed_branches(args.grid)):
        if i == 0:
            out = _attend_in_place(q, k, v, args, branch)
            if out is not None:
                continue
            out = q.new_empty((q.shape[0], args.query_tokens, q.shape[1], v.shape[3])).transpose(1, 2)
        assert out is not None
        _attend_in_chunks(q, k, v, args, branch, mask, out, averages=i > 0)
    assert out is not None
    if args.extra_queries:
        _write_extra_queries(q, k, v, args, mask, out)
    return out


def merged_step(sizes: Sequence[int], steps: Sequence[int]) -> int | None:
    """The step of the axes taken as one, outermost first, or None where they are none."""
    merged: int | None = None
    length = 1
    for size, step in zip(reversed(sizes), reversed(steps), strict=True):
        if size == 1:
            continue
        if merged is None:
            merged = step
        elif step != merged * length:
            return None
        length *= size
    return 0 if merged is None else merged


def _as_batch(windows: Tensor, leading: int) -> Tensor | None:
    """[leading axes, N, s_t, s_h, s_w, D] -> [windows, N, window tokens, D] where that is a view SDPA reads as is."""
    sizes, steps = windows.shape, windows.stride()
    batch = merged_step(sizes[:leading], steps[:leading])
    token = merged_step(sizes[leading + 1 : -1], steps[leading + 1 : -1])
    if batch is None or token is None or (steps[-1] != 1 and sizes[-1] > 1):
        return None
    shape = (sizes[:leading].numel(), sizes[leading], sizes[leading + 1 : -1].numel(), sizes[-1])
    return windows.as_strided(shape, (batch, steps[leading], token, 1))


def _attend_in_place(q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, branch: Branch) -> Tensor | None:
    """One call on q, k and v as they are, whose output is the branch's; None where it takes a copy."""
    if args.extra_tokens or args.extra_queries or q.shape[3] != v.shape[3]:
        return None
    box, *others = boxes(args.grid, args.pattern.splits)
    axes = WindowAxes.of(args, branch, box)
    # The output has q's order of axes: it is in place where windows, then tokens, then heads follow each other.
    whole = (args.grid.tokens, 1)
    if others or merged_step((*axes.parts, *axes.sizes), (*axes.part_steps, *axes.token_steps)) not in (whole[1], 0):
        return None
    queries, keys, values = (_as_batch(axes.view(x, 0), leading=4) for x in (q, k, v))
    if queries is None or keys is None or values is None or not _is_tokens_first(queries):
        return None
    out = scaled_dot_product_attention(queries, keys, values, scale=args.scale, enable_gqa=_is_gqa(q, k))
    return out.transpose(1, 2).reshape(q.shape[0], args.grid.tokens, q.shape[1], -1).transpose(1, 2)


def _is_tokens_first(x: Tensor) -> bool:
    """Whether [windows, N, s, D] stands in memory as [windows, s, N, D], gaps aside."""
    batch, head, token, depth = x.stride()
    return x.shape[1] == 1 or (token >= head * x.shape[1] and batch >= token and head >= depth)


def _is_gqa(q: Tensor, k: Tensor) -> bool:
    return q.shape[1] != k.shape[1]


@dataclass(frozen=True)
class _Chunk:
    """Which windows and which heads of the keys."""

    t: slice
    h: slice
    w: slice
    heads: slice


def _slices(length: int, at_most: int) -> list[slice]:
    """As few slices as there must be, of sizes as equal as can be."""
    count = -(-length // max(1, at_most))
    bounds = [length * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def _chunks(parts: tuple[int, ...], key_heads: int, bytes_per_head: int, budget: int) -> Iterator[_Chunk]:
    """Heads of one window, all of them if they fit; then as many windows as fit, neighbours along w first."""
    heads = min(key_heads, max(1, budget // bytes_per_head))
    windows = max(1, budget // (bytes_per_head * heads))
    p_t, p_h, p_w = parts
    along_w = min(p_w, windows)
    along_h = min(p_h, max(1, windows // p_w))
    along_t = min(p_t, max(1, windows // (p_w * p_h)))
    for t in _slices(p_t, along_t):
        for h in _slices(p_h, along_h):
            for w in _slices(p_w, along_w):
                for head in _slices(key_heads, heads):
                    yield _Chunk(t, h, w, head)


class _Scratch:
    """One buffer for the windows of q, k or v of a chunk, grown once and used by every chunk after."""

    def __init__(self, like: Tensor, depth: int) -> None:
        self.buffer, self.is_padded = like.new_empty((0, depth)), like.shape[3] < depth

    def fill(self, windows: Tensor, extra: Tensor | None) -> Tensor:
        """[c_t, c_h, c_w, N, s_t, s_h, s_w, D] and keys outside the grid [N, E, D] -> [windows, N, tokens, depth]."""
        *parts, heads, s_t, s_h, s_w, depth = windows.shape
        tokens = s_t * s_h * s_w
        count = parts[0] * parts[1] * parts[2]
        total = tokens + (0 if extra is None else extra.shape[1])
        rows = count * heads * total
        if self.buffer.shape[0] < rows:
            make = self.buffer.new_zeros if self.is_padded else self.buffer.new_empty
            self.buffer = make((rows, self.buffer.shape[1]))
        filled = self.buffer[:rows].view(count, total, heads, -1).transpose(1, 2)
        places = filled[:, :, :tokens, :depth]
        places.unflatten(2, (s_t, s_h, s_w)).unflatten(0, parts).copy_(windows)
        if extra is not None:
            filled[:, :, tokens:, :depth].copy_(extra)
        return filled


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
    """Write one branch to the grid's tokens of ``out``, or average it with what they hold."""
    depth, value_depth = q.shape[3], v.shape[3]
    # torch's fused SDPA wants one depth; columns of zeros change nothing under the scale that is given.
    padded = max(depth, value_depth)
    scale = depth**-0.5 if args.scale is None and padded > depth else args.scale
    group = q.shape[1] // k.shape[1]
    extra_k, extra_v = (around_grid(x, 2, args.prefix, args.suffix) for x in (k, v))
    extra_mask = None if mask is None else extra_key_mask(mask, args)
    scratch = [_Scratch(x, padded) for x in (q, k, v)]
    for box in boxes(args.grid, args.pattern.splits):
        axes = WindowAxes.of(args, branch, box)
        places = (args.query_prefix, args.prefix, args.prefix, args.query_prefix)
        views = [axes.view(x, start) for x, start in zip((q, k, v, out), places, strict=True)]
        keys = box.window_tokens + args.extra_tokens
        bytes_per_head = 2 * padded * (group * box.window_tokens + keys) * q.element_size()
        budget = SCRATCH_BYTES_PER_THREAD * torch.get_num_threads()
        for element in range(q.shape[0]):
            visible = None if extra_mask is None else _visible(extra_mask, element, box.window_tokens, q.dtype)
            for chunk in _chunks(box.parts, k.shape[1], bytes_per_head, budget):
                query_heads = slice(chunk.heads.start * group, chunk.heads.stop * group)
                of_heads = (query_heads, chunk.heads, chunk.heads, query_heads)
                q_w, k_w, v_w, out_w = (
                    x[element, chunk.t, chunk.h, chunk.w, heads] for x, heads in zip(views, of_heads, strict=True)
                )
                extras = (None, *(None if x is None else x[element, chunk.heads] for x in (extra_k, extra_v)))
                q_w, k_w, v_w = (
                    _windows_of(x, extra, buffer)
                    for x, extra, buffer in zip((q_w, k_w, v_w), extras, scratch, strict=True)
                )
                of_chunk = visible if visible is None or visible.shape[1] == 1 else visible[:, query_heads]
                result = scaled_dot_product_attention(
                    q_w, k_w, v_w, attn_mask=of_chunk, scale=scale, enable_gqa=group > 1
                )
                result = result[..., :value_depth].unflatten(2, box.sizes).unflatten(0, out_w.shape[:3])
                if averages:
                    torch.mul(result.add_(out_w), 0.5, out=out_w)
                else:
                    out_w.copy_(result)


def _windows_of(windows: Tensor, extra: Tensor | None, scratch: _Scratch) -> Tensor:
    """[windows, N, tokens, D] as SDPA takes it: a view where that is one, else copied."""
    if extra is None and windows.shape[-1] == scratch.buffer.shape[1]:
        in_place = _as_batch(windows, leading=3)
        if in_place is not None:
            return in_place
    return scratch.fill(windows, extra)


def _visible(extra_mask: Tensor, element: int, window_tokens: int, dtype: torch.dtype) -> Tensor:
    """The mask of a window's keys and those outside the grid, [1, 1 or N, 1, window tokens + E]."""
    of_element = extra_mask[element : element + 1] if extra_mask.shape[0] > 1 else extra_mask
    shape = (1, of_element.shape[1], 1, window_tokens)
    inside = of_element.new_ones(shape) if of_element.dtype == torch.bool else of_element.new_zeros(shape)
    return torch.cat([inside, of_element], dim=3)


def _write_extra_queries(
    q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, mask: Tensor | None, out: Tensor
) -> None:
    """Queries outside the grid attend to all keys that their mask shows."""
    around = (args.query_prefix, args.query_suffix)
    extra_q = around_grid(q, 2, *around)
    assert extra_q is not None
    if mask is not None and mask.shape[2] != 1:
        mask = around_grid(mask, 2, *around)
    result = scaled_dot_product_attention(extra_q, k, v, attn_mask=mask, scale=args.scale, enable_gqa=_is_gqa(q, k))
    before, after = result.split(around, dim=2)
    out[:, :, : args.query_prefix].copy_(before)
    out[:, :, args.query_tokens - args.query_suffix :].copy_(after)
