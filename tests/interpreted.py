"""Run the kernel on CPU tensors by triton's interpreter, with every value that it must not touch poisoned."""

from __future__ import annotations

import os
import random

import torch
from torch import Tensor

from t3compile.ops import WindowAttentionArgs
from t3compile.ops.launch_kernel import describe_launches, launch_branch
from t3compile.ops.load_kernel import interpreted_kernel
from t3compile.ops.window_launch import Tile

NAN = float("nan")
SEED_VARIABLE = "T3COMPILE_TEST_SEED"
_RIM = 37
SMALL_TILE = Tile(16, 16, 4, 1)


def fresh_seed() -> int:
    """A new seed for every test, printed so that a failure can be repeated with T3COMPILE_TEST_SEED."""
    given = os.environ.get(SEED_VARIABLE)
    seed = random.SystemRandom().randrange(2**31) if given is None else int(given)
    print(f"{SEED_VARIABLE}={seed}")  # noqa: T201
    return seed


def among_nans(x: Tensor, *, tokens_first: bool) -> Tensor:
    """The same [B, N, S, D] as a slice of a larger tensor of NaNs, heads or tokens outside."""
    x = x.transpose(1, 2) if tokens_first else x
    first, second, third, depth = x.shape
    room = x.new_full((first, second + 2, third + 1, depth + 3), NAN)
    room[:, 1:-1, 1:, 2:-1] = x
    inside = room[:, 1:-1, 1:, 2:-1]
    return inside.transpose(1, 2) if tokens_first else inside


def mask_among_nans(mask: Tensor, args: WindowAttentionArgs) -> Tensor:
    """A floating mask with NaN wherever the op's contract leaves nothing to read; a bool one as it is.

    Of the grid's queries only the first one's row counts, and of that only one of the grid's keys.
    """
    if mask.dtype == torch.bool:
        return mask
    poisoned = mask.clone()
    rows, keys = poisoned.shape[-2] > 1, poisoned.shape[-1] > 1
    grid = args.grid.tokens
    if rows:
        poisoned[..., args.query_prefix + 1 : args.query_prefix + grid, :] = NAN
    if keys:
        row = slice(args.query_prefix, args.query_prefix + 1) if rows else slice(None)
        # A row that all queries share also counts for those outside the grid.
        if rows or args.extra_queries == 0:
            poisoned[..., row, args.prefix + 1 : args.prefix + grid] = NAN
    return poisoned


def run_interpreted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    args: WindowAttentionArgs,
    mask: Tensor | None = None,
    *,
    tile: Tile = SMALL_TILE,
) -> Tensor:
    """Window attention by the kernel, launch after launch as on a GPU; fails where it writes outside the output."""
    batch, heads, tokens, _ = q.shape
    count = batch * tokens * heads * v.shape[3]
    memory = q.new_full((count + 2 * _RIM,), NAN)
    out = memory[_RIM:-_RIM].view(batch, tokens, heads, v.shape[3]).transpose(1, 2)
    for launch in describe_launches(q, k, v, args, mask):
        launch_branch(interpreted_kernel(), launch, tile, (q, k, v), mask, out, upcast=q.dtype == torch.bfloat16)
    assert memory[:_RIM].isnan().all() and memory[-_RIM:].isnan().all(), "the kernel wrote outside its output"
    return out
