"""The kernel on a GPU: real sizes, dispatch, the backward pass, torch.compile and CUDA graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import t3compile
from t3compile.ops import WINDOW_ATTENTION, WindowAttentionArgs, launch_kernel
from t3compile.ops.reference import masked_attention, masked_sdpa, reference_window_attention
from t3compile.ops.regrouped_attention import window_attention
from t3compile.ops.tiles import candidate_tiles
from t3compile.pattern import WindowPattern
from t3compile.presets import PRESETS, Preset
from tests.interpreted import fresh_seed
from tests.test_window_attention import MASKS, args_of, assert_as_good_as_plain, masked_of

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SAMPLED_ROWS = 32
UNEVEN = args_of((5, 17, 30), (2, 3, 4), prefix=3, suffix=77)


def random_on(
    device: str,
    args: WindowAttentionArgs,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    heads: int = 2,
    key_heads: int = 2,
    depth: int = 128,
    value_depth: int = 128,
    tokens_first: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, N, S, D] of values that every dtype holds exactly."""
    generator = torch.Generator(device).manual_seed(fresh_seed())

    def random(n: int, tokens: int, d: int) -> Tensor:
        shape = (batch, tokens, n, d) if tokens_first else (batch, n, tokens, d)
        x = torch.randn(shape, generator=generator, device=device).bfloat16().to(dtype)
        return x.transpose(1, 2) if tokens_first else x

    return (
        random(heads, args.query_tokens, depth),
        random(key_heads, args.tokens, depth),
        random(key_heads, args.tokens, value_depth),
    )


def reference_at(rows: Tensor, q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, **options: Any) -> Tensor:
    with torch.device(q.device):
        return reference_window_attention(
            q,
            k,
            v,
            grid=args.grid,
            pattern=args.pattern,
            prefix=args.prefix,
            suffix=args.suffix,
            query_prefix=args.query_prefix,
            query_suffix=args.query_suffix,
            scale=args.scale,
            rows=rows,
            **options,
        )


def sampled_rows(args: WindowAttentionArgs, device: str) -> Tensor:
    """Positions of queries: the ends, those around the grid's ends, and some at random."""
    ends = {0, args.query_prefix, args.query_prefix + args.grid.tokens - 1, args.query_tokens - 1}
    generator = torch.Generator().manual_seed(fresh_seed())
    some = torch.randint(args.query_tokens, (SAMPLED_ROWS,), generator=generator).tolist()
    return torch.tensor(sorted(ends | set(some)), device=device)


def check(
    args: WindowAttentionArgs, dtype: torch.dtype, device: str = "cuda", mask: Tensor | None = None, **options: Any
) -> None:
    """The op equals the float64 reference at sampled rows, as well as plain torch does."""
    q, k, v = random_on(device, args, dtype, **options)
    rows = sampled_rows(args, device)
    own_mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    with t3compile.record_paths() as record:
        ours = WINDOW_ATTENTION(q, k, v, *args.as_op_args(), mask=own_mask)[:, :, rows]
    assert record.calls("kernel") == (device == "cuda"), str(record)
    exact = reference_at(rows, q.double(), k.double(), v.double(), args, mask=mask)
    plain = [
        reference_at(rows, q, k, v, args, mask=own_mask, attend=attend) for attend in (masked_attention, masked_sdpa)
    ]
    assert_as_good_as_plain(ours, plain, exact)


@pytest.mark.parametrize(
    ("preset", "pattern"),
    [(preset, pattern) for preset in PRESETS for pattern in preset.schedule.patterns],
    ids=lambda x: x.name if isinstance(x, Preset) else str(x),
)
def test_the_presets_at_their_real_grids(preset: Preset, pattern: WindowPattern) -> None:
    check(WindowAttentionArgs(preset.grid, pattern), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [32, 40, 64, 72, 96, 128, 192, 256])
def test_depths_and_dtypes(depth: int, dtype: torch.dtype) -> None:
    check(UNEVEN, dtype, depth=depth, value_depth=depth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("args", "options"),
    [
        (UNEVEN, {"tokens_first": False, "batch": 2}),
        (UNEVEN, {"heads": 6, "key_heads": 2}),
        (UNEVEN, {"depth": 64, "value_depth": 128}),
        (replace(UNEVEN, query_prefix=0, query_suffix=0), {}),
        (replace(UNEVEN, query_prefix=300, query_suffix=1, scale=0.3), {}),
        (args_of((4, 16, 32), (2, 2, 4)), {}),
        (args_of((4, 16, 32), (2, 2, 4), ("dilated",), prefix=8), {}),
        (args_of((4, 16, 33), (2, 2, 33), ("local",)), {"depth": 16, "value_depth": 16}),
    ],
    ids=["heads first", "grouped", "depths", "keys outside", "queries outside", "even", "dilated", "small windows"],
)
def test_variants(args: WindowAttentionArgs, options: dict[str, Any], dtype: torch.dtype) -> None:
    check(args, dtype, **options)


@pytest.mark.parametrize("form", sorted(MASKS))
def test_masks(form: str) -> None:
    mask = masked_of(UNEVEN, MASKS[form], batch=2, heads=2).cuda()
    check(UNEVEN, torch.float16, mask=mask, batch=2)


def test_addresses_beyond_31_bits() -> None:
    """1.5e6 tokens of 12 heads of 128: 2.3e9 elements in a tensor."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    args = args_of((46, 136, 240), (23, 8, 6))
    q, k, v = random_on("cuda", args, torch.bfloat16, heads=12, key_heads=12)
    assert launch_kernel.describe_launches(q, k, v, args)[0].needs_64_bits
    rows = torch.tensor([0, args.tokens - 1], device="cuda")
    ours = WINDOW_ATTENTION(q, k, v, *args.as_op_args())[:, -1:, rows]
    q, k, v = (x[:, -1:] for x in (q, k, v))
    exact = reference_at(rows, q.double(), k.double(), v.double(), args)
    assert_as_good_as_plain(ours, [reference_at(rows, q, k, v, args, attend=masked_sdpa)], exact)


def test_the_gradient_is_that_of_regrouped_tokens() -> None:
    inputs = [x.requires_grad_() for x in random_on("cuda", UNEVEN, torch.float32, heads=4, key_heads=2, depth=64)]
    generator = torch.Generator("cuda").manual_seed(fresh_seed())
    weights = torch.randn(1, 4, UNEVEN.query_tokens, 128, generator=generator, device="cuda")
    with t3compile.record_paths() as record:
        ours = WINDOW_ATTENTION(*inputs, *UNEVEN.as_op_args())
    assert record.calls("kernel") == 1
    theirs = window_attention(*inputs, UNEVEN)
    torch.testing.assert_close(ours, theirs)
    # Not linear in the output: what the kernel gave counts in the gradients.
    gradients = [torch.autograd.grad((out.pow(2) * weights).sum(), inputs) for out in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_by_inductor_in_one_graph() -> None:
    q, k, v = random_on("cuda", UNEVEN, torch.float16)

    def layer(q: Tensor) -> Tensor:
        return WINDOW_ATTENTION(q * 0.5, k, v, *UNEVEN.as_op_args()).transpose(1, 2).flatten(2) + 1

    with t3compile.record_paths() as record:
        compiled = torch.compile(layer, fullgraph=True)(q)
    assert record.calls("kernel") == 1
    torch.testing.assert_close(compiled, layer(q))


def test_replayed_by_a_cuda_graph() -> None:
    q, k, v = random_on("cuda", UNEVEN, torch.float16)
    WINDOW_ATTENTION(q, k, v, *UNEVEN.as_op_args())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        WINDOW_ATTENTION(q, k, v, *UNEVEN.as_op_args())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = WINDOW_ATTENTION(q, k, v, *UNEVEN.as_op_args())
    q.copy_(random_on("cuda", UNEVEN, torch.float16)[0])
    graph.replay()
    assert torch.equal(out, WINDOW_ATTENTION(q, k, v, *UNEVEN.as_op_args()))


def test_the_fastest_tile_is_found_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch_kernel.AUTOTUNE_VARIABLE, "1")
    monkeypatch.setattr(launch_kernel, "_tiles", {})
    check(UNEVEN, torch.float16)
    tiles = candidate_tiles(torch.cuda.get_device_capability(), "float16", 128, 128)
    assert len(launch_kernel._tiles) == 2
    assert set(launch_kernel._tiles.values()) <= set(tiles)


def test_what_the_kernel_does_not_take_is_regrouped() -> None:
    q, k, v = random_on("cuda", UNEVEN, torch.float64)
    with t3compile.record_paths() as record:
        out = WINDOW_ATTENTION(q, k, v, *UNEVEN.as_op_args())
    (taken,) = record.counts
    assert taken.choice.reason == "float64 is none of the kernel's dtypes (float16, bfloat16, float32)"
    torch.testing.assert_close(out, window_attention(q, k, v, UNEVEN))
