"""The window attention kernel in Triton: one source for the torch op, the interpreter and ahead-of-time PTX.

Flash-style: online softmax in float32, no score leaves the chip. Tokens of a window are addressed in the original
layout by index arithmetic, so q, k, v and the output are never permuted. A program computes one tile of queries of one
window, or of the queries outside the grid, which see all keys. The laws of the windows are those of geometry.py.
WindowLaunch (window_launch.py) gives all constants; its docstring names the pointer arguments.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _part(part, LENGTH: tl.constexpr, PARTS: tl.constexpr, IS_DILATED: tl.constexpr):
    """First index, step and size of one part of an axis."""
    SHORTER: tl.constexpr = LENGTH // PARTS
    LONGER: tl.constexpr = LENGTH % PARTS
    if LONGER == 0:
        size = SHORTER
    else:
        size = SHORTER + (part < LONGER).to(tl.int32)
    if IS_DILATED:
        start = part
        step = PARTS
    else:
        start = part * SHORTER + tl.minimum(part, LONGER)
        step = 1
    return start, step, size


@triton.jit
def _attend(
    q,
    k_ptr,
    v_ptr,
    mask_ptr,
    mask_at_grid,
    keys,
    grid_keys,
    start_t,
    start_h,
    start_w,
    step_t,
    step_h,
    step_w,
    size_h,
    size_w,
    H: tl.constexpr,
    W: tl.constexpr,
    GRID: tl.constexpr,
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    K_TOKEN: tl.constexpr,
    V_TOKEN: tl.constexpr,
    MASK_KEY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    IS_BOOL_MASK: tl.constexpr,
    SEES_ALL: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Softmax attention of a tile of queries [BLOCK_M, BLOCK_D]; returns [BLOCK_M, BLOCK_DV] in float32.

    The first ``grid_keys`` of the ``keys`` are those of the queries' window, the others stand outside the grid; with
    SEES_ALL they are all keys in sequence order. ``mask_ptr`` points at the queries' rows of the mask.
    """
    depth = tl.arange(0, BLOCK_D)
    value_depth = tl.arange(0, BLOCK_DV)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.full([BLOCK_M], 0.0, tl.float32)
    acc = tl.full([BLOCK_M, BLOCK_DV], 0.0, tl.float32)
    for first in tl.range(0, keys, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        is_key = j < keys
        if SEES_ALL:
            token = j
        else:
            in_frame = j // size_w
            t = start_t + (in_frame // size_h) * step_t
            h = start_h + (in_frame % size_h) * step_h
            w = start_w + (j % size_w) * step_w
            extra = j - grid_keys
            # Past the window come the keys before the grid, then those behind it.
            outside = tl.where(extra < PREFIX, extra, extra + GRID)
            token = tl.where(j < grid_keys, PREFIX + (t * H + h) * W + w, outside)
        if WIDE:
            token = token.to(tl.int64)
        k_at = k_ptr + token[None, :] * K_TOKEN + depth[:, None]
        if D == BLOCK_D:
            k = tl.load(k_at, mask=is_key[None, :], other=0.0)
        else:
            k = tl.load(k_at, mask=is_key[None, :] & (depth < D)[:, None], other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * SCALE_LOG2
        if HAS_MASK:
            row = mask_ptr + token[None, :] * MASK_KEY
            if IS_BOOL_MASK:
                shown = tl.load(row, mask=is_key[None, :], other=0) != 0
                if not SEES_ALL:
                    shown = shown | (j < grid_keys)[None, :]
                scores = tl.where(shown, scores, float("-inf"))
            else:
                bias = tl.load(row, mask=is_key[None, :], other=0.0).to(tl.float32)
                if not SEES_ALL:
                    bias = tl.where((j < grid_keys)[None, :], 0.0, bias - mask_at_grid)
                scores += bias * 1.4426950408889634
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.reduce(scores, 1, tl.standard._elementwise_max))
        if HAS_MASK:
            # A row that has seen no key yet: -inf minus -inf is no number.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        else:
            shift = new_max
        weights = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.reduce(weights, 1, tl.standard._sum_combine)
        row_max = new_max
        v_at = v_ptr + token[:, None] * V_TOKEN + value_depth[None, :]
        if DV == BLOCK_DV:
            v = tl.load(v_at, mask=is_key[:, None], other=0.0)
        else:
            v = tl.load(v_at, mask=is_key[:, None] & (value_depth < DV)[None, :], other=0.0)
        if UPCAST:
            v = v.to(tl.float32)
        acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    if HAS_MASK:
        # A query that sees no key gives 0, as torch's SDPA does.
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    return acc / row_sum[:, None]


@triton.jit
def window_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    other_ptr,
    out_ptr,
    SCALE_LOG2: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES_PER_KEY_HEAD: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    N_T: tl.constexpr,
    N_H: tl.constexpr,
    N_W: tl.constexpr,
    IS_DILATED: tl.constexpr,
    PREFIX: tl.constexpr,
    SUFFIX: tl.constexpr,
    QUERY_PREFIX: tl.constexpr,
    QUERY_SUFFIX: tl.constexpr,
    Q_BATCH: tl.constexpr,
    Q_HEAD: tl.constexpr,
    Q_TOKEN: tl.constexpr,
    K_BATCH: tl.constexpr,
    K_HEAD: tl.constexpr,
    K_TOKEN: tl.constexpr,
    V_BATCH: tl.constexpr,
    V_HEAD: tl.constexpr,
    V_TOKEN: tl.constexpr,
    OUT_BATCH: tl.constexpr,
    OUT_HEAD: tl.constexpr,
    OUT_TOKEN: tl.constexpr,
    MASK_BATCH: tl.constexpr,
    MASK_HEAD: tl.constexpr,
    MASK_QUERY: tl.constexpr,
    MASK_KEY: tl.constexpr,
    IS_BOOL_MASK: tl.constexpr,
    TILES_PER_WINDOW: tl.constexpr,
    TILES_PER_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of queries; ``mask_ptr`` and ``other_ptr`` (the other branch's output) may be None."""
    GRID: tl.constexpr = T * H * W
    EXTRA: tl.constexpr = PREFIX + SUFFIX
    EXTRA_QUERIES: tl.constexpr = QUERY_PREFIX + QUERY_SUFFIX
    HAS_MASK: tl.constexpr = mask_ptr is not None
    AVERAGES: tl.constexpr = other_ptr is not None
    program = tl.program_id(0)
    tile = program % TILES_PER_HEAD
    head = (program // TILES_PER_HEAD) % HEADS
    batch = (program // (TILES_PER_HEAD * HEADS)).to(tl.int64)
    key_head = (head // QUERIES_PER_KEY_HEAD).to(tl.int64)
    head = head.to(tl.int64)
    window = tile // TILES_PER_WINDOW
    in_grid = window < N_T * N_H * N_W

    start_t, step_t, size_t = _part(window // (N_H * N_W), T, N_T, IS_DILATED)
    start_h, step_h, size_h = _part((window // N_W) % N_H, H, N_H, IS_DILATED)
    start_w, step_w, size_w = _part(window % N_W, W, N_W, IS_DILATED)
    if EXTRA_QUERIES > 0:
        grid_keys = tl.where(in_grid, size_t * size_h * size_w, 0)
    else:
        grid_keys = size_t * size_h * size_w

    i = (tile % TILES_PER_WINDOW) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_frame = i // size_w
    t = start_t + (in_frame // size_h) * step_t
    h = start_h + (in_frame % size_h) * step_h
    w = start_w + (i % size_w) * step_w
    token = QUERY_PREFIX + (t * H + h) * W + w
    is_query = i < grid_keys
    if EXTRA_QUERIES > 0:
        extra = (tile - N_T * N_H * N_W * TILES_PER_WINDOW) * BLOCK_M + tl.arange(0, BLOCK_M)
        is_query = tl.where(in_grid, is_query, extra < EXTRA_QUERIES)
        token = tl.where(in_grid, token, tl.where(extra < QUERY_PREFIX, extra, extra + GRID))
    if WIDE:
        token = token.to(tl.int64)

    depth = tl.arange(0, BLOCK_D)
    value_depth = tl.arange(0, BLOCK_DV)
    is_out = is_query[:, None] & (value_depth < DV)[None, :]
    q_at = q_ptr + batch * Q_BATCH + head * Q_HEAD + token[:, None] * Q_TOKEN + depth[None, :]
    q = tl.load(q_at, mask=is_query[:, None] & (depth < D)[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    k_ptr += batch * K_BATCH + key_head * K_HEAD
    v_ptr += batch * V_BATCH + key_head * V_HEAD
    out_at = batch * OUT_BATCH + head * OUT_HEAD + token[:, None] * OUT_TOKEN + value_depth[None, :]
    mask_at_grid = 0.0
    rows_at = mask_ptr
    if HAS_MASK:
        # All grid queries have the same row.
        mask_ptr += batch * MASK_BATCH + head * MASK_HEAD
        rows_at = mask_ptr + QUERY_PREFIX * MASK_QUERY
        if not IS_BOOL_MASK:
            mask_at_grid = tl.load(rows_at + PREFIX * MASK_KEY).to(tl.float32)

    if in_grid:
        # A tile behind the end of a smaller window has nothing to do.
        if (tile % TILES_PER_WINDOW) * BLOCK_M < grid_keys:
            out = _attend(
                q, k_ptr, v_ptr, rows_at, mask_at_grid, grid_keys + EXTRA, grid_keys,
                start_t, start_h, start_w, step_t, step_h, step_w, size_h, size_w,
                H, W, GRID, PREFIX, D, DV, K_TOKEN, V_TOKEN, MASK_KEY, HAS_MASK and EXTRA > 0, IS_BOOL_MASK,
                False, SCALE_LOG2, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, WIDE, UPCAST,
            )  # fmt: skip
            if AVERAGES:
                out = 0.5 * (out + tl.load(other_ptr + out_at, mask=is_out, other=0.0).to(tl.float32))
            tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=is_out)
    if EXTRA_QUERIES > 0:
        if not in_grid:
            if AVERAGES:
                # Both branches are the same here.
                tl.store(out_ptr + out_at, tl.load(other_ptr + out_at, mask=is_out), mask=is_out)
            else:
                if HAS_MASK:
                    query_rows = mask_ptr + tl.where(is_query, token, 0)[:, None] * MASK_QUERY
                else:
                    query_rows = mask_ptr
                out = _attend(
                    q, k_ptr, v_ptr, query_rows, mask_at_grid, GRID + EXTRA, 0,
                    0, 0, 0, 1, 1, 1, 1, 1,
                    H, W, GRID, PREFIX, D, DV, K_TOKEN, V_TOKEN, MASK_KEY, HAS_MASK, IS_BOOL_MASK,
                    True, SCALE_LOG2, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, WIDE, UPCAST,
                )  # fmt: skip
                tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=is_out)
