"""The window attention kernel in Triton: one source for the torch op, the interpreter and ahead-of-time PTX.

Flash-style: online softmax in float32, no score leaves the chip. Tokens of a window are addressed in the original
layout by index arithmetic, so q, k, v and the output are never permuted. A program computes one tile of queries of one
window, or of the queries outside the grid, which see all keys, window by window. The laws of the windows are those of
geometry.py; no division has a divisor that is only known at run time. WindowLaunch (window_launch.py) gives all
constants; its docstring names the pointer arguments.
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
        size = tl.where(part < LONGER, SHORTER + 1, SHORTER)
    if IS_DILATED:
        start = part
        step = PARTS
    else:
        start = part * SHORTER + tl.minimum(part, LONGER)
        step = 1
    return start, step, size


@triton.jit
def _divided(x, size, LENGTH: tl.constexpr, PARTS: tl.constexpr):
    """Quotient and remainder of x by the size of a part, which is one of two constants."""
    SHORTER: tl.constexpr = LENGTH // PARTS
    if LENGTH % PARTS == 0:
        quotient = x // SHORTER
    else:
        quotient = tl.where(size == SHORTER, x // SHORTER, x // (SHORTER + 1))
    return quotient, x - quotient * size


@triton.jit
def _window_token(
    j,
    window,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    N_T: tl.constexpr,
    N_H: tl.constexpr,
    N_W: tl.constexpr,
    IS_DILATED: tl.constexpr,
):
    """Index in the grid of the token that stands at place j of a window, and the number of tokens of the window."""
    start_t, step_t, size_t = _part(window // (N_H * N_W), T, N_T, IS_DILATED)
    start_h, step_h, size_h = _part((window // N_W) % N_H, H, N_H, IS_DILATED)
    start_w, step_w, size_w = _part(window % N_W, W, N_W, IS_DILATED)
    row, in_row = _divided(j, size_w, W, N_W)
    frame, in_frame = _divided(row, size_h, H, N_H)
    first = (start_t * H + start_h) * W + start_w
    token = first + frame * (step_t * H * W) + in_frame * (step_h * W) + in_row * step_w
    return token, size_t * size_h * size_w


@triton.jit
def _attend_window(
    row_max,
    row_sum,
    acc,
    q,
    k_ptr,
    v_ptr,
    rows_ptr,
    mask_at_grid,
    sees_window,
    window,
    extra_keys,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    N_T: tl.constexpr,
    N_H: tl.constexpr,
    N_W: tl.constexpr,
    IS_DILATED: tl.constexpr,
    PREFIX: tl.constexpr,
    SUFFIX: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    K_TOKEN: tl.constexpr,
    V_TOKEN: tl.constexpr,
    MASK_KEY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    IS_BOOL_MASK: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One step of the online softmax per BLOCK_N keys: those of a window, then ``extra_keys`` outside the grid.

    ``rows_ptr`` points at the mask's rows of the queries. With ``sees_window`` it hides no key of the window, and what
    it adds to the others counts against ``mask_at_grid``.
    """
    EXTRA: tl.constexpr = PREFIX + SUFFIX
    LOG2_E: tl.constexpr = 1.4426950408889634
    # The scale is applied within the exponent, where the order of the scores is that of their products.
    IS_LATE: tl.constexpr = (SCALE_LOG2 > 0) and (not HAS_MASK or IS_BOOL_MASK)
    IS_EVEN: tl.constexpr = (T % N_T == 0) and (H % N_H == 0) and (W % N_W == 0)
    IS_WHOLE: tl.constexpr = IS_EVEN and EXTRA == 0 and ((T * H * W) // (N_T * N_H * N_W)) % BLOCK_N == 0
    depth = tl.arange(0, BLOCK_D)
    value_depth = tl.arange(0, BLOCK_DV)
    _, window_keys = _window_token(0, window, T, H, W, N_T, N_H, N_W, IS_DILATED)
    keys = window_keys + extra_keys
    for first in tl.range(0, keys, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        is_key = j < keys
        token, _ = _window_token(j, window, T, H, W, N_T, N_H, N_W, IS_DILATED)
        token += PREFIX
        if EXTRA > 0:
            # Past the window come the keys before the grid, then those behind it.
            outside = j - window_keys
            outside = tl.where(outside < PREFIX, outside, outside + T * H * W)
            token = tl.where(j < window_keys, token, outside)
        if WIDE:
            token = token.to(tl.int64)
        k_at = k_ptr + token[:, None] * K_TOKEN + depth[None, :]
        v_at = v_ptr + token[:, None] * V_TOKEN + value_depth[None, :]
        if IS_WHOLE and D == BLOCK_D:
            k = tl.load(k_at)
        elif D == BLOCK_D:
            k = tl.load(k_at, mask=is_key[:, None], other=0.0)
        else:
            k = tl.load(k_at, mask=is_key[:, None] & (depth < D)[None, :], other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if not IS_LATE:
            scores *= SCALE_LOG2 / LOG2_E
        if not IS_WHOLE:
            scores = tl.where(is_key[None, :], scores, float("-inf"))
        if HAS_MASK:
            open_keys = tl.where(sees_window, window_keys, 0)
            is_closed = is_key & (j >= open_keys)
            shown_at = rows_ptr + token[None, :] * MASK_KEY
            if IS_BOOL_MASK:
                shown = tl.load(shown_at, mask=is_closed[None, :], other=1)
                scores = tl.where(shown != 0, scores, float("-inf"))
            else:
                bias = tl.load(shown_at, mask=is_closed[None, :], other=0.0).to(tl.float32)
                scores += tl.where(is_closed[None, :], bias - mask_at_grid, 0.0)
        new_max = tl.maximum(row_max, tl.reduce(scores, 1, tl.standard._elementwise_max))
        if HAS_MASK:
            # A row that has seen no key yet: -inf minus -inf is no number.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        else:
            shift = new_max
        if IS_LATE:
            weights = tl.exp2(scores * SCALE_LOG2 - (shift * SCALE_LOG2)[:, None])
            rescale = tl.exp2((row_max - shift) * SCALE_LOG2)
        else:
            # The difference first: a mask of the least float times a factor would be -inf.
            weights = tl.exp2((scores - shift[:, None]) * LOG2_E)
            rescale = tl.exp2((row_max - shift) * LOG2_E)
        row_sum = row_sum * rescale + tl.reduce(weights, 1, tl.standard._sum_combine)
        row_max = new_max
        if IS_WHOLE and DV == BLOCK_DV:
            v = tl.load(v_at)
        elif DV == BLOCK_DV:
            v = tl.load(v_at, mask=is_key[:, None], other=0.0)
        else:
            v = tl.load(v_at, mask=is_key[:, None] & (value_depth < DV)[None, :], other=0.0)
        if UPCAST:
            v = v.to(tl.float32)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return row_max, row_sum, acc


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
    EXTRA_TILES: tl.constexpr,
    EXTRA_PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of queries; ``mask_ptr`` and ``other_ptr`` (the other branch's output) may be None."""
    EXTRA: tl.constexpr = PREFIX + SUFFIX
    EXTRA_QUERIES: tl.constexpr = QUERY_PREFIX + QUERY_SUFFIX
    WINDOWS: tl.constexpr = N_T * N_H * N_W
    WINDOW_TILES: tl.constexpr = WINDOWS * TILES_PER_WINDOW
    # Among grid tokens a mask hides nothing.
    HAS_MASK: tl.constexpr = (mask_ptr is not None) and (EXTRA + EXTRA_QUERIES > 0)
    AVERAGES: tl.constexpr = other_ptr is not None
    program = tl.program_id(0)
    if EXTRA_QUERIES > 0:
        # First those that take longest: the queries that see all keys.
        in_grid = program >= EXTRA_PROGRAMS
        tile = tl.where(in_grid, (program - EXTRA_PROGRAMS) % WINDOW_TILES, program % EXTRA_TILES)
        batch_head = tl.where(in_grid, (program - EXTRA_PROGRAMS) // WINDOW_TILES, program // EXTRA_TILES)
        window = tl.where(in_grid, tile // TILES_PER_WINDOW, 0)
        i = tl.where(in_grid, tile % TILES_PER_WINDOW, tile) * BLOCK_M + tl.arange(0, BLOCK_M)
    else:
        in_grid = True
        tile = program % WINDOW_TILES
        batch_head = program // WINDOW_TILES
        window = tile // TILES_PER_WINDOW
        i = (tile % TILES_PER_WINDOW) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = batch_head % HEADS
    key_head = (head // QUERIES_PER_KEY_HEAD).to(tl.int64)
    batch = (batch_head // HEADS).to(tl.int64)
    head = head.to(tl.int64)

    token, window_tokens = _window_token(i, window, T, H, W, N_T, N_H, N_W, IS_DILATED)
    token += QUERY_PREFIX
    is_query = i < window_tokens
    first_window = window
    last_window = window
    if EXTRA_QUERIES > 0:
        is_query = tl.where(in_grid, is_query, i < EXTRA_QUERIES)
        token = tl.where(in_grid, token, tl.where(i < QUERY_PREFIX, i, i + T * H * W))
        # Both branches are the same for the queries outside the grid: nothing is left to compute for the second.
        last_window = tl.where(in_grid, window, -1 if AVERAGES else WINDOWS - 1)
    if WIDE:
        token = token.to(tl.int64)

    depth = tl.arange(0, BLOCK_D)
    value_depth = tl.arange(0, BLOCK_DV)
    q_at = q_ptr + batch * Q_BATCH + head * Q_HEAD + token[:, None] * Q_TOKEN + depth[None, :]
    q = tl.load(q_at, mask=is_query[:, None] & (depth < D)[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    k_ptr += batch * K_BATCH + key_head * K_HEAD
    v_ptr += batch * V_BATCH + key_head * V_HEAD
    mask_at_grid = 0.0
    rows_ptr = mask_ptr
    if HAS_MASK:
        # All grid queries have the same row.
        rows_ptr += batch * MASK_BATCH + head * MASK_HEAD
        if not IS_BOOL_MASK:
            mask_at_grid = tl.load(rows_ptr + QUERY_PREFIX * MASK_QUERY + PREFIX * MASK_KEY).to(tl.float32)
            mask_at_grid = tl.where(in_grid, mask_at_grid, 0.0)
        if EXTRA_QUERIES > 0 and MASK_QUERY != 0:
            row = tl.where(in_grid, QUERY_PREFIX, tl.where(is_query, token, QUERY_PREFIX))
            rows_ptr += row[:, None] * MASK_QUERY
        else:
            rows_ptr += QUERY_PREFIX * MASK_QUERY

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.full([BLOCK_M], 0.0, tl.float32)
    acc = tl.full([BLOCK_M, BLOCK_DV], 0.0, tl.float32)
    if EXTRA_QUERIES > 0:
        for seen in tl.range(first_window, last_window + 1):
            extra_keys = tl.where(seen == last_window, EXTRA, 0)
            row_max, row_sum, acc = _attend_window(
                row_max, row_sum, acc, q, k_ptr, v_ptr, rows_ptr, mask_at_grid, in_grid, seen, extra_keys,
                T, H, W, N_T, N_H, N_W, IS_DILATED, PREFIX, SUFFIX, D, DV, K_TOKEN, V_TOKEN, MASK_KEY, HAS_MASK,
                IS_BOOL_MASK, SCALE_LOG2, BLOCK_N, BLOCK_D, BLOCK_DV, WIDE, UPCAST,
            )  # fmt: skip
    else:
        row_max, row_sum, acc = _attend_window(
            row_max, row_sum, acc, q, k_ptr, v_ptr, rows_ptr, mask_at_grid, in_grid, window, EXTRA,
            T, H, W, N_T, N_H, N_W, IS_DILATED, PREFIX, SUFFIX, D, DV, K_TOKEN, V_TOKEN, MASK_KEY, HAS_MASK,
            IS_BOOL_MASK, SCALE_LOG2, BLOCK_N, BLOCK_D, BLOCK_DV, WIDE, UPCAST,
        )  # fmt: skip
    # A query that sees no key gives 0, as torch's SDPA does.
    out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    out_at = batch * OUT_BATCH + head * OUT_HEAD + token[:, None] * OUT_TOKEN + value_depth[None, :]
    is_out = is_query[:, None] & (value_depth < DV)[None, :]
    if AVERAGES:
        other = tl.load(other_ptr + out_at, mask=is_out, other=0.0).to(tl.float32)
        out = tl.where(in_grid, 0.5 * (out + other), other)
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=is_out)
