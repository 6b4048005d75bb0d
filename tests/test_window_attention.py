"""t3::window_attention against an independent reference, against dense masks, and as a torch operator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import t3compile.ops.regrouped_attention as implementation
from t3compile.errors import PatternError
from t3compile.geometry import Splits, TokenGrid
from t3compile.ops import WINDOW_ATTENTION, WindowAttentionArgs
from t3compile.ops.reference import branch_mask, masked_attention, masked_sdpa, reference_window_attention
from t3compile.ops.regroup import boxes, group, ungroup
from t3compile.pattern import BRANCHES, Branch, WindowPattern

Triple = tuple[int, int, int]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    scores = torch.einsum("...id,...jd->...ij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("...ij,...jd->...id", scores.softmax(-1), v)


WHOLE = {
    "local": "b n (nt wt nh wh nw ww) d",
    "dilated": "b n (wt nt wh nh ww nw) d",
}
BY_WINDOW = "(b nt nh nw) n (wt wh ww) d"


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, grid: Triple, splits: Triple) -> Tensor:
    """The paper's layer on a divisible grid: tokens grouped with einops, dense attention per window, mean."""
    counts = dict(zip(("nt", "nh", "nw"), splits, strict=True))
    sizes = {f"w{axis}": length // counts[f"n{axis}"] for axis, length in zip("thw", grid, strict=True)}
    outputs = []
    for whole in WHOLE.values():
        windows = [rearrange(x, f"{whole} -> {BY_WINDOW}", **counts, **sizes) for x in (q, k, v)]
        out = attend(*windows)
        outputs.append(rearrange(out, f"{BY_WINDOW} -> {whole}", b=q.shape[0], **counts, **sizes))
    return (outputs[0] + outputs[1]) / 2


def random_qkv(
    tokens: int, *, batch: int = 1, heads: int = 2, depth: int = 8, value_depth: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """float64 q, k, v [B, N, S, D]; values that float16 holds exactly, so that casting them adds no error."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, tokens, d) for d in (depth, depth, value_depth)]
    q, k, v = (torch.randn(shape, generator=generator).to(torch.bfloat16).double() for shape in shapes)
    return q, k, v


def stream_qkv(args: WindowAttentionArgs, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same where queries and keys have different extra tokens."""
    q, k, v = random_qkv(max(args.tokens, args.query_tokens), **options)
    return q[:, :, : args.query_tokens], k[:, :, : args.tokens], v[:, :, : args.tokens]


@dataclass(frozen=True)
class MaskForm:
    """Dtype of a mask and on which of its four axes it is full (else 1); None for axes that it lacks."""

    dtype: torch.dtype
    batch: bool | None = False
    heads: bool | None = False
    queries: bool | None = False
    keys: bool = True


MASKS = {
    "bool-keys": MaskForm(torch.bool, batch=True),
    "bool-shared": MaskForm(torch.bool),
    "bool-flat": MaskForm(torch.bool, None, None, None),
    "bool-rows": MaskForm(torch.bool, batch=True, queries=True),
    "bool-queries": MaskForm(torch.bool, batch=True, queries=True, keys=False),
    "float-rows": MaskForm(torch.float64, batch=True, queries=True),
    "float-two-axes": MaskForm(torch.float64, None, None, queries=True),
    "float-heads": MaskForm(torch.float64, batch=True, heads=True),
    "float-heads-rows": MaskForm(torch.float64, heads=True, queries=True),
}


def masked_of(args: WindowAttentionArgs, form: MaskForm, *, batch: int = 2, heads: int = 2, seed: int = 0) -> Tensor:
    """A random mask that hides nothing among grid tokens and has one row for all grid queries.

    Every query sees some key; values are -inf or small, and float16 holds them exactly.
    """
    generator = torch.Generator().manual_seed(seed)
    is_full = (form.batch, form.heads, form.queries, form.keys)
    whole = (batch, heads, args.query_tokens, args.tokens)
    shape = [size if full else 1 for size, full in zip(whole, is_full, strict=True)]
    mask = torch.randint(-8, 9, shape, generator=generator).double() / 8
    mask = mask.masked_fill(torch.rand(shape, generator=generator) < 0.4, float("-inf"))
    queries = slice(args.query_prefix, args.query_prefix + args.grid.tokens) if form.queries else slice(0, 1)
    keys = slice(args.prefix, args.prefix + args.grid.tokens) if form.keys else slice(0, 1)
    mask[:, :, queries] = mask[:, :, queries][:, :, :1].clone()
    mask[:, :, queries, keys] = 0.0
    mask[..., keys.start] = mask[..., keys.start].clamp(min=-1.0)
    mask = mask.reshape(shape[sum(full is None for full in is_full) :])
    return mask > float("-inf") if form.dtype == torch.bool else mask.to(form.dtype)


def args_of(
    grid: Triple,
    splits: Triple,
    branches: tuple[Branch, ...] = BRANCHES,
    prefix: int = 0,
    suffix: int = 0,
    scale: float | None = None,
    **queries: int,
) -> WindowAttentionArgs:
    pattern = WindowPattern(Splits(*splits), branches)
    return WindowAttentionArgs(TokenGrid(*grid), pattern, prefix, suffix, scale, **queries)


def reference(q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, **options: Any) -> Tensor:
    options |= {"prefix": args.prefix, "suffix": args.suffix, "scale": args.scale}
    options |= {"query_prefix": args.query_prefix, "query_suffix": args.query_suffix}
    return reference_window_attention(q, k, v, grid=args.grid, pattern=args.pattern, **options)


def largest(x: Tensor) -> float:
    return float(x.double().abs().max())


def assert_as_good_as_plain(ours: Tensor, plain: list[Tensor], exact: Tensor) -> None:
    """At most twice the error of plain PyTorch in the same dtype, plus one rounding step of the output."""
    assert ours.dtype == plain[0].dtype != torch.float64
    allowed = 2 * max(largest(x.double() - exact) for x in plain) + torch.finfo(ours.dtype).eps * largest(exact)
    assert largest(ours.double() - exact) <= allowed


def float64_bound(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> float:
    """Rounding of two dot products and an exponential, to first order, for either side of a comparison."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    score = float((q.norm(dim=-1).max() * k.norm(dim=-1).max()) * abs(scale))
    steps = 2 * (q.shape[-1] + 2) * score + 2 * k.shape[-2] + 10
    return 2 * steps * torch.finfo(torch.float64).eps * largest(v)


GRID = (4, 6, 10)
DIVIDING: list[Triple] = [(4, 1, 1), (1, 3, 5), (1, 2, 10), (2, 3, 2), (4, 2, 5), (2, 1, 1), (4, 6, 10)]


@pytest.mark.parametrize("splits", DIVIDING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_attention_grouped_with_einops(splits: Triple, dtype: torch.dtype) -> None:
    q, k, v = random_qkv(math.prod(GRID), batch=2)
    exact = grouped_attention(q, k, v, GRID, splits)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    ours = WINDOW_ATTENTION(q, k, v, *args_of(GRID, splits).as_op_args())
    assert_as_good_as_plain(ours, [grouped_attention(q, k, v, GRID, splits)], exact)


CASES = [
    args_of((3, 5, 7), (3, 1, 1)),
    args_of((3, 5, 7), (1, 2, 3), prefix=3),
    args_of((3, 5, 7), (2, 3, 4), suffix=5, scale=0.7),
    args_of((5, 7, 11), (2, 5, 3), prefix=2, suffix=4, scale=0.25),
    args_of((1, 7, 11), (1, 3, 4), prefix=1),
    args_of((5, 4, 3), (5, 4, 3), prefix=2),
    args_of((5, 4, 3), (4, 3, 2), ("local",), suffix=1),
    args_of((5, 4, 3), (4, 3, 2), ("dilated",), prefix=1),
    args_of((4, 6, 10), (2, 3, 5), prefix=7),
    args_of((3, 5, 7), (1, 1, 1), prefix=3, suffix=2, scale=0.3),
]


@pytest.mark.parametrize("args", CASES, ids=lambda a: f"{a.grid}-{a.pattern}-{a.prefix}-{a.suffix}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_dense_attention_under_the_masks(args: WindowAttentionArgs, dtype: torch.dtype) -> None:
    q, k, v = random_qkv(args.grid.tokens + args.extra_tokens, batch=2, depth=8, value_depth=6)
    exact = reference(q, k, v, args)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    ours = WINDOW_ATTENTION(q, k, v, *args.as_op_args())
    assert ours.shape == exact.shape
    assert_as_good_as_plain(ours, [reference(q, k, v, args, attend=f) for f in (masked_attention, masked_sdpa)], exact)


@st.composite
def cases(draw: st.DrawFn) -> WindowAttentionArgs:
    sizes = [draw(st.integers(1, 6)) for _ in range(3)]
    counts = [draw(st.integers(1, size)) for size in sizes]
    branches = draw(st.sampled_from([BRANCHES, BRANCHES, ("local",), ("dilated",)]))
    prefix, suffix = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    scale = draw(st.sampled_from([None, 0.2, 1.0]))
    pattern = WindowPattern(Splits(*counts), branches)
    args = WindowAttentionArgs(TokenGrid(*sizes), pattern, prefix, suffix, scale)
    if draw(st.booleans()):
        return args
    return replace(args, query_prefix=draw(st.integers(0, 3)), query_suffix=draw(st.integers(0, 3)))


@given(cases(), st.integers(0, 2**16))
@settings(max_examples=150, deadline=None)
def test_any_pattern_on_any_grid_equals_dense_attention(args: WindowAttentionArgs, seed: int) -> None:
    q, k, v = stream_qkv(args, batch=2, depth=4, value_depth=3, seed=seed)
    ours = WINDOW_ATTENTION(q, k, v, *args.as_op_args())
    assert largest(ours - reference(q, k, v, args)) <= float64_bound(q, k, v, args.scale)


@given(cases(), st.sampled_from(sorted(MASKS)), st.integers(0, 2**16))
@settings(max_examples=200, deadline=None)
def test_any_mask_equals_dense_attention_under_it(args: WindowAttentionArgs, name: str, seed: int) -> None:
    q, k, v = stream_qkv(args, batch=2, depth=4, value_depth=3, seed=seed)
    mask = masked_of(args, MASKS[name], seed=seed)
    ours = WINDOW_ATTENTION(q, k, v, *args.as_op_args(), mask=mask)
    # The mask adds at most 1 to a score.
    assert largest(ours - reference(q, k, v, args, mask=mask)) <= 2 * float64_bound(q, k, v, args.scale)
    # In chunks of rows too: the mask is cut as the queries are.
    chunked = reference(q, k, v, args, mask=mask, chunk=5)
    assert largest(ours - chunked) <= 2 * float64_bound(q, k, v, args.scale)


def test_masks_hide_what_they_say_and_nothing_else() -> None:
    """So that the test above can fail: hidden keys do not matter, visible ones do."""
    args = args_of((2, 3, 4), (1, 3, 2), prefix=2, suffix=3)
    q, k, v = stream_qkv(args)
    mask = torch.ones(1, 1, 1, args.tokens, dtype=torch.bool)
    everything = WINDOW_ATTENTION(q, k, v, *args.as_op_args(), mask=mask)
    assert largest(everything - WINDOW_ATTENTION(q, k, v, *args.as_op_args())) <= float64_bound(q, k, v, None)
    mask[..., [0, -1]] = False
    masked = WINDOW_ATTENTION(q, k, v, *args.as_op_args(), mask=mask)
    assert float((masked - everything).abs().amin(dim=2).max()) > 1e-4
    for key, matters in ((0, False), (1, True), (args.tokens - 1, False), (args.tokens - 2, True)):
        changed = v.clone()
        changed[..., key, :] += 1.0
        again = WINDOW_ATTENTION(q, k, changed, *args.as_op_args(), mask=mask)
        assert bool(((again != masked).any(dim=-1)).all()) is matters
        assert torch.equal(again, masked) is not matters


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("splits", [(1, 3, 2), (1, 1, 1)])
def test_a_query_that_sees_no_key_gets_what_sdpa_gives_and_disturbs_no_other(
    dtype: torch.dtype, splits: Triple
) -> None:
    args = args_of((2, 3, 4), splits, prefix=2, suffix=1)
    q, k, v = (x.float() for x in stream_qkv(args))
    mask = torch.ones(1, 1, args.query_tokens, args.tokens, dtype=torch.bool)
    mask[:, :, 2:-1, [0, -1]] = False
    seeing = mask.clone()
    mask[:, :, 1] = False

    def run(visible: Tensor) -> Tensor:
        given = visible if dtype == torch.bool else torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
        out: Tensor = WINDOW_ATTENTION(q, k, v, *args.as_op_args(), mask=given)
        full = scaled_dot_product_attention(q, k, v, attn_mask=given)
        assert torch.equal(out[:, :, 1].isnan(), full[:, :, 1].isnan())
        blind = reference(q, k, v, args, mask=given)[:, :, 1]
        assert largest(out[:, :, 1] - full[:, :, 1]) <= 1e-6
        assert largest(out[:, :, 1] - blind) <= 1e-6
        return out

    others = [i for i in range(args.query_tokens) if i != 1]
    assert torch.equal(run(mask)[:, :, others], run(seeing)[:, :, others])


def test_all_extra_keys_may_be_hidden() -> None:
    args = args_of((2, 3, 4), (1, 3, 2), prefix=2, suffix=1, query_prefix=0, query_suffix=0)
    q, k, v = stream_qkv(args)
    mask = torch.zeros(1, 1, 1, args.tokens, dtype=torch.bool)
    mask[..., 2:-1] = True
    alone = WINDOW_ATTENTION(q, k[:, :, 2:-1], v[:, :, 2:-1], *args_of((2, 3, 4), (1, 3, 2)).as_op_args())
    ours = WINDOW_ATTENTION(q, k, v, *args.as_op_args(), mask=mask)
    assert largest(ours - alone) <= float64_bound(q, k, v, None)


@pytest.mark.parametrize(
    ("form", "leading"),
    [("bool-shared", (2, 6 * 6)), ("bool-keys", (4, 3 * 6)), ("float-heads", (12, 6)), ("float-rows", (4, 3 * 6))],
)
def test_masks_are_broadcast_over_windows(form: str, leading: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask per window: [branches * batch elements with their own mask, 1, 1, keys]."""
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def recorded(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((tuple(q.shape), tuple(options["attn_mask"].shape)))
        return scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr(implementation, "scaled_dot_product_attention", recorded)
    args = args_of((2, 6, 4), (1, 3, 2), suffix=5, query_suffix=0)
    q, k, v = stream_qkv(args, batch=2, heads=3)
    implementation.window_attention(q, k, v, args, masked_of(args, MASKS[form], heads=3))
    masks = leading[0] if form != "bool-shared" else 1
    assert seen == [((*leading, 8, 8), (masks, 1, 1, 8 + 5))]


@pytest.mark.parametrize("order", ["".join(letters) for letters in itertools.permutations("thw")])
@given(cases(), st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_tokens_in_any_order_equal_those_brought_to_frame_major(
    order: str, args: WindowAttentionArgs, seed: int
) -> None:
    """The op on a grid in sequence order, and the reference's order, against tokens moved there and back."""
    grid, pattern = args.grid, args.pattern
    letters = dict(zip("thw", grid.sizes, strict=True))
    in_sequence = replace(args, grid=grid.in_order(order), pattern=pattern.in_order(order))
    q, k, v = stream_qkv(args, batch=1, depth=4, value_depth=3, seed=seed)
    mask = masked_of(args, MASKS["float-rows"], batch=1, seed=seed)

    def moved(x: Tensor, start: int, source: str, target: str) -> Tensor:
        x = x.clone()
        middle = x[:, :, start : start + grid.tokens].clone()
        spaced = f"b n ({' '.join(source)}) d -> b n ({' '.join(target)}) d"
        x[:, :, start : start + grid.tokens] = rearrange(middle, spaced, **letters)
        return x

    starts = (args.query_prefix, args.prefix, args.prefix)
    frame_major = [moved(x, start, order, "thw") for x, start in zip((q, k, v), starts, strict=True)]
    windowed = reference(*frame_major, args, mask=moved(mask.mT, args.prefix, order, "thw").mT)
    expected = moved(windowed, args.query_prefix, "thw", order)
    bound = 2 * float64_bound(q, k, v, args.scale)
    assert largest(WINDOW_ATTENTION(q, k, v, *in_sequence.as_op_args(), mask=mask) - expected) <= bound
    assert largest(reference(q, k, v, args, mask=mask, order=order) - expected) <= bound


@given(cases())
@settings(max_examples=60, deadline=None)
def test_masks_are_the_windows_of_numpy(args: WindowAttentionArgs) -> None:
    """The dense truth itself: array_split for local windows, strides for dilated ones, the rest global."""
    tokens = np.arange(args.grid.tokens).reshape(args.grid.sizes)
    queries, keys = args.query_tokens, args.tokens
    for branch in args.pattern.branches:
        expected = np.zeros((queries, keys), dtype=bool)
        for window in numpy_windows(tokens, args.pattern.splits.counts, branch):
            members = window.ravel()
            expected[np.ix_(members + args.query_prefix, members + args.prefix)] = True
        expected[[*range(args.query_prefix), *range(queries - args.query_suffix, queries)], :] = True
        expected[:, [*range(args.prefix), *range(keys - args.suffix, keys)]] = True
        mask = branch_mask(
            args.grid,
            args.pattern,
            branch,
            prefix=args.prefix,
            suffix=args.suffix,
            query_prefix=args.query_prefix,
            query_suffix=args.query_suffix,
        )
        assert np.array_equal(mask.numpy(), expected)


def numpy_windows(tokens: np.ndarray, splits: Triple, branch: Branch) -> list[np.ndarray]:
    """All windows of a [T, H, W] array, windows in row-major order."""
    windows = [tokens]
    for axis, count in enumerate(splits):
        if branch == "local":
            windows = [part for w in windows for part in np.array_split(w, count, axis)]
        else:
            steps = [(slice(None),) * axis + (slice(p, None, count),) for p in range(count)]
            windows = [w[step] for w in windows for step in steps]
    return windows


@pytest.mark.parametrize("extra", [(0, 0), (3, 2)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_one_window_is_full_attention_bit_for_bit(extra: tuple[int, int], scale: float | None) -> None:
    args = args_of((3, 4, 5), (1, 1, 1), BRANCHES, *extra, scale)
    q, k, v = (x.float() for x in random_qkv(60 + sum(extra), batch=2, value_depth=6))
    ours = WINDOW_ATTENTION(q, k, v, *args.as_op_args())
    assert torch.equal(ours, scaled_dot_product_attention(q, k, v, scale=scale))


@pytest.fixture
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the queries of every scaled_dot_product_attention of the differentiable form."""
    calls: list[tuple[int, ...]] = []

    def counted(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append(tuple(q.shape))
        return scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr(implementation, "scaled_dot_product_attention", counted)
    return calls


@pytest.mark.parametrize(
    ("grid", "splits", "extra", "expected"),
    [
        # [branches, B*N*windows, window tokens, D]
        ((5, 4, 6), (5, 1, 1), 0, [(1, 6 * 5, 24, 8)]),
        ((5, 4, 6), (5, 4, 6), 0, [(1, 6 * 120, 1, 8)]),
        ((4, 4, 6), (2, 2, 3), 0, [(2, 6 * 12, 8, 8)]),
        ((4, 4, 6), (1, 2, 1), 0, [(2, 6 * 2, 48, 8)]),
        # 5 = 3 + 2: two sizes of window
        ((5, 4, 6), (2, 2, 1), 0, [(2, 6 * 2, 36, 8), (2, 6 * 2, 24, 8)]),
        # the queries outside the grid attend to everything
        ((5, 4, 6), (5, 1, 1), 3, [(1, 6 * 5, 24, 8), (2, 3, 3, 8)]),
    ],
)
def test_calls_of_attention(
    grid: Triple,
    splits: Triple,
    extra: int,
    expected: list[tuple[int, ...]],
    attention_calls: list[tuple[int, ...]],
) -> None:
    """Coinciding branches are computed once; different ones share one call per window size."""
    q, k, v = (x.float() for x in random_qkv(math.prod(grid) + extra, batch=2, heads=3))
    implementation.window_attention(q, k, v, args_of(grid, splits, prefix=extra))
    assert attention_calls == expected


@pytest.mark.parametrize("splits", [(1, 2, 3), (2, 3, 4), (1, 1, 1)])
def test_works_on_views_and_returns_the_strides_it_promises(splits: Triple) -> None:
    """q, k, v come out of a fused projection as strided views; downstream views rely on the output's strides."""
    args = args_of((3, 5, 7), splits, prefix=2)
    packed = torch.randn(2, 107, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    ours = WINDOW_ATTENTION(q, k, v, *args.as_op_args())
    assert torch.equal(ours, WINDOW_ATTENTION(*(x.contiguous() for x in (q, k, v)), *args.as_op_args()))
    assert ours.transpose(1, 2).is_contiguous()
    with FakeTensorMode() as mode:
        fake = WINDOW_ATTENTION(*(mode.from_tensor(x) for x in (q, k, v)), *args.as_op_args())
    assert (fake.shape, fake.stride(), fake.dtype) == (ours.shape, ours.stride(), ours.dtype)


OPERATOR_CASES = [args_of((2, 3, 4), (1, 2, 2)), args_of((2, 3, 4), (2, 1, 1), prefix=2, suffix=1, scale=0.4)]


@pytest.mark.parametrize("args", OPERATOR_CASES, ids=["uneven", "joint"])
def test_is_a_proper_operator(args: WindowAttentionArgs) -> None:
    q, k, v = random_qkv(args.grid.tokens + args.extra_tokens, depth=4, value_depth=3)
    qkv = [x.float().requires_grad_() for x in (q, k, v)]
    checks = torch.library.opcheck(WINDOW_ATTENTION, (*qkv, *args.as_op_args()))
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("form", "checks"),
    [
        ("bool-keys", ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")),
        ("float-rows", ("test_schema", "test_autograd_registration", "test_faketensor")),
    ],
)
def test_is_a_proper_operator_with_a_mask_and_query_streams(form: str, checks: tuple[str, ...]) -> None:
    args = args_of((2, 2, 3), (2, 1, 1), prefix=2, suffix=1, scale=0.4, query_prefix=1, query_suffix=3)
    qkv = [x.float().requires_grad_() for x in stream_qkv(args, depth=4, value_depth=3)]
    mask = masked_of(args, MASKS[form], batch=1)
    mask = mask.float() if mask.is_floating_point() else mask
    given = (*qkv, *args.as_op_args())
    results = torch.library.opcheck(WINDOW_ATTENTION, given, {"mask": mask}, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}
    by_position = WINDOW_ATTENTION(*given, mask)
    assert torch.equal(by_position, WINDOW_ATTENTION(*given, mask=mask))


def test_gradient_under_a_mask_is_that_of_the_reference() -> None:
    args = args_of((2, 3, 4), (1, 2, 2), prefix=2, suffix=1, query_prefix=1, query_suffix=0)
    for form in ("bool-keys", "float-rows"):
        mask = masked_of(args, MASKS[form], batch=2)
        qkv = [x.requires_grad_() for x in stream_qkv(args, batch=2)]
        weights = torch.randn(2, 2, args.query_tokens, 8, generator=torch.Generator().manual_seed(1))
        ours = (WINDOW_ATTENTION(*qkv, *args.as_op_args(), mask=mask) * weights).sum()
        exact = (reference(*qkv, args, mask=mask) * weights).sum()
        for a, b in zip(torch.autograd.grad(ours, qkv), torch.autograd.grad(exact, qkv), strict=True):
            assert largest(a - b) <= 1e-12 * (1 + largest(b))


def test_a_mask_that_wants_a_gradient_is_refused() -> None:
    args = args_of((2, 3, 4), (1, 2, 2), prefix=2)
    q, k, v = (x.requires_grad_() for x in stream_qkv(args))
    mask = torch.zeros(1, 1, 1, args.tokens, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"a mask has no gradient here: pass mask\.detach\(\)"):
        WINDOW_ATTENTION(q, k, v, *args.as_op_args(), mask=mask)


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 1, 1, 26), torch.bool, r"mask of shape \(1, 1, 1, 26\) does not broadcast to \(1, 2, 24, 27\)"),
        ((1, 1, 27, 27), torch.bool, r"does not broadcast to \(1, 2, 24, 27\)"),
        ((3, 1, 1, 27), torch.bool, "does not broadcast"),
        ((1, 1, 1, 1, 27), torch.bool, "does not broadcast"),
        ((), torch.bool, "does not broadcast"),
        ((1, 1, 1, 27), torch.int64, r"mask has dtype torch.int64, expected bool \(True: visible\) or a floating one"),
    ],
)
def test_masks_that_fit_nothing_are_refused(
    shape: tuple[int, ...], dtype: torch.dtype, message: str, fake: bool
) -> None:
    args = args_of((2, 3, 4), (1, 2, 2), prefix=3, query_prefix=0)
    q, k, v = stream_qkv(args)
    inputs = [q, k, v, torch.ones(shape, dtype=dtype)]
    if fake:
        mode = FakeTensorMode()
        inputs = [mode.from_tensor(x) for x in inputs]
    with pytest.raises(ValueError, match=message):
        WINDOW_ATTENTION(*inputs[:3], *args.as_op_args(), mask=inputs[3])


def test_wrong_number_of_queries_is_named() -> None:
    args = args_of((2, 3, 4), (1, 3, 2), prefix=3, query_prefix=0, query_suffix=2)
    x = torch.randn(1, 2, 27, 8)
    message = r"q has shape .*27, 8\), expected \[B, N, 26, D\].*query_prefix 0, query_suffix 2"
    with pytest.raises(ValueError, match=message):
        WINDOW_ATTENTION(x, x, x, *args.as_op_args())
    with pytest.raises(ValueError, match="query_prefix -1 and query_suffix 2 must not be negative"):
        replace(args, query_prefix=-1)


@pytest.mark.parametrize("args", [args_of((1, 3, 2), (1, 2, 2)), args_of((2, 1, 2), (2, 1, 1), prefix=1, scale=0.4)])
def test_gradcheck(args: WindowAttentionArgs) -> None:
    q, k, v = random_qkv(args.grid.tokens + args.extra_tokens, heads=1, depth=2, value_depth=1)
    qkv = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: WINDOW_ATTENTION(*x, *args.as_op_args()), qkv)


def test_a_second_derivative_is_refused() -> None:
    args = args_of((1, 3, 2), (1, 2, 2))
    qkv = [x.requires_grad_() for x in random_qkv(args.tokens)]
    loss = WINDOW_ATTENTION(*qkv, *args.as_op_args()).pow(2).sum()
    with pytest.raises(
        NotImplementedError, match=r"^t3::window_attention has no second derivative: leave out create_g"
    ):
        torch.autograd.grad(loss, qkv, create_graph=True)
    with torch.enable_grad():
        once = torch.autograd.grad(loss, qkv)
    expected = implementation.window_attention(*qkv, args).pow(2).sum()
    assert all(torch.equal(a, b) for a, b in zip(once, torch.autograd.grad(expected, qkv), strict=True))


def test_the_gradient_of_a_compiled_graph_is_that_of_the_op() -> None:
    args = args_of((1, 3, 2), (1, 2, 2))
    qkv = [x.requires_grad_() for x in random_qkv(args.tokens)]

    def loss(*qkv: Tensor) -> Tensor:
        return WINDOW_ATTENTION(*qkv, *args.as_op_args()).pow(2).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    ours, theirs = (torch.autograd.grad(f(*qkv), qkv) for f in (compiled, loss))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("args", CASES[1:5], ids=lambda a: f"{a.grid}-{a.pattern}")
def test_gradient_is_that_of_the_reference(args: WindowAttentionArgs) -> None:
    qkv = [x.requires_grad_() for x in random_qkv(args.grid.tokens + args.extra_tokens, batch=2, value_depth=6)]
    weights = torch.randn(2, 2, args.grid.tokens + args.extra_tokens, 6, generator=torch.Generator().manual_seed(1))

    def gradients(run: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype) for x in qkv]
        return list(torch.autograd.grad((run(*inputs) * weights.to(dtype)).sum(), inputs))

    exact = gradients(lambda *x: reference(*x, args), torch.float64)
    plain = [
        gradients(lambda *x, f=f: reference(*x, args, attend=f), torch.float32) for f in (masked_attention, masked_sdpa)
    ]
    ours = gradients(lambda *x: WINDOW_ATTENTION(*x, *args.as_op_args()), torch.float32)
    for i, gradient in enumerate(ours):
        assert_as_good_as_plain(gradient, [x[i] for x in plain], exact[i])


GROUPED = args_of((2, 3, 4), (1, 2, 2), prefix=2, suffix=1, scale=0.6)


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("form", [None, "bool-keys", "float-heads-rows"])
def test_grouped_heads_equal_repeated_ones(key_heads: int, form: str | None) -> None:
    q, k, v = stream_qkv(GROUPED, batch=2, heads=4, value_depth=6)
    k, v = k[:, :key_heads], v[:, :key_heads]
    mask = None if form is None else masked_of(GROUPED, MASKS[form], heads=4)
    repeated = [torch.stack([x[:, head * key_heads // 4] for head in range(4)], 1) for x in (k, v)]
    ours = WINDOW_ATTENTION(q, k, v, *GROUPED.as_op_args(), mask=mask)
    assert torch.equal(ours, WINDOW_ATTENTION(q, *repeated, *GROUPED.as_op_args(), mask=mask))
    exact = reference(q, k, v, GROUPED, mask=mask)
    assert torch.equal(exact, reference(q, *repeated, GROUPED, mask=mask))
    assert largest(ours - exact) <= 2 * float64_bound(q, k, v, GROUPED.scale)
    full = args_of((2, 3, 4), (1, 1, 1), prefix=2, suffix=1)
    dense = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert largest(WINDOW_ATTENTION(q, k, v, *full.as_op_args()) - dense) <= float64_bound(q, k, v, None)


def test_gradcheck_of_grouped_heads() -> None:
    args = args_of((1, 3, 2), (1, 2, 2), prefix=1)
    q, k, v = random_qkv(args.tokens, heads=4, depth=2, value_depth=1)
    qkv = [x.requires_grad_() for x in (q, k[:, :2].contiguous(), v[:, :2].contiguous())]
    assert torch.autograd.gradcheck(lambda *x: WINDOW_ATTENTION(*x, *args.as_op_args()), qkv)


def test_grouped_heads_make_a_proper_operator() -> None:
    q, k, v = (x.float().requires_grad_() for x in random_qkv(GROUPED.tokens, heads=4, depth=4, value_depth=3))
    given = (q, k.detach()[:, :2].requires_grad_(), v.detach()[:, :2].requires_grad_(), *GROUPED.as_op_args())
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    checks = torch.library.opcheck(WINDOW_ATTENTION, given, test_utils=kinds)
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 4), (1, 3), (1, 3)), r"must divide the heads of q, .*q \(1, 4\), k \(1, 3\), v \(1, 3\)"),
        (((1, 4), (1, 2), (1, 4)), "k and v the same heads"),
        (((1, 2), (1, 4), (1, 4)), "must divide the heads of q"),
        (((2, 4), (1, 4), (1, 4)), "must have one batch"),
    ],
)
def test_heads_that_form_no_groups_are_refused(shapes: tuple[Any, ...], message: str, fake: bool) -> None:
    inputs = [torch.zeros(*shape, GROUPED.tokens, 8) for shape in shapes]
    if fake:
        mode = FakeTensorMode()
        inputs = [mode.from_tensor(x) for x in inputs]
    with pytest.raises(ValueError, match=message):
        WINDOW_ATTENTION(*inputs, *GROUPED.as_op_args())


def test_depths_and_dtypes_that_differ_are_refused() -> None:
    q, k, v = (x.float() for x in random_qkv(GROUPED.tokens))
    with pytest.raises(ValueError, match="q has depth 8, k has 6; they must be the same"):
        WINDOW_ATTENTION(q, k[..., :6], v, *GROUPED.as_op_args())
    with pytest.raises(ValueError, match=r"one dtype, but have torch.float32, torch.float32 and torch.float16"):
        WINDOW_ATTENTION(q, k, v.half(), *GROUPED.as_op_args())


def test_gradient_where_only_one_input_needs_it() -> None:
    args = args_of((2, 3, 4), (1, 2, 2))
    q, k, v = random_qkv(24)
    v.requires_grad_()
    WINDOW_ATTENTION(q, k, v, *args.as_op_args()).sum().backward()
    expected = torch.autograd.grad(reference(q, k, v, args).sum(), v)[0]
    assert v.grad is not None
    assert largest(v.grad - expected) <= 48 * float64_bound(q, k, v.detach(), None)
    assert q.grad is None


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(("position", "name"), [(0, "q"), (1, "k"), (2, "v")])
def test_wrong_number_of_tokens_is_named(fake: bool, position: int, name: str) -> None:
    args = args_of((2, 3, 4), (1, 3, 2), prefix=3, suffix=1)
    shapes = [(1, 2, 28, 8)] * 3
    shapes[position] = (1, 2, 27, 8)
    inputs = [torch.randn(shape) for shape in shapes]
    if fake:
        mode = FakeTensorMode()
        inputs = [mode.from_tensor(x) for x in inputs]
    message = rf"{name} has shape \(1, 2, 27, 8\), expected \[B, N, 28, D\].*2x3x4, prefix 3, suffix 1"
    with pytest.raises(ValueError, match=message):
        WINDOW_ATTENTION(*inputs, *args.as_op_args())


def test_three_axes_are_refused() -> None:
    q = torch.randn(2, 24, 8)
    with pytest.raises(ValueError, match=r"q has shape \(2, 24, 8\)"):
        WINDOW_ATTENTION(q, q, q, *args_of((2, 3, 4), (1, 3, 2)).as_op_args())


@pytest.mark.parametrize(
    ("splits", "branches", "message"),
    [([1, 4, 1], "local", "axis h has 3"), ([1, 0, 1], "local", "h is 0"), ([1, 1, 2], "near", "'near' is unknown")],
)
def test_arguments_that_make_no_pattern_are_refused(splits: list[int], branches: str, message: str) -> None:
    q = torch.randn(1, 1, 24, 8)
    with pytest.raises(PatternError, match=message):
        WINDOW_ATTENTION(q, q, q, [2, 3, 4], splits, branches)


@given(cases())
@settings(max_examples=100, deadline=None)
def test_arguments_survive_the_operator_signature(args: WindowAttentionArgs) -> None:
    assert WindowAttentionArgs.from_op_args(*args.as_op_args()) == args
    attributes = args.as_attributes()
    assert ("scale" in attributes) == (args.scale is not None)
    assert WindowAttentionArgs.from_op_args(**attributes) == args


@given(cases(), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_group_and_ungroup_are_inverses(args: WindowAttentionArgs, folded: int, depth: int) -> None:
    grid, splits = args.grid, args.pattern.splits
    x = torch.arange(folded * grid.tokens * depth).reshape(folded, *grid.sizes, depth)
    for branch in BRANCHES:
        pieces = [group(x, grid, splits, branch, box) for box in boxes(grid, splits)]
        assert torch.equal(ungroup(pieces, grid, splits, branch), x.permute(1, 2, 3, 0, 4))


@given(cases())
@settings(max_examples=100, deadline=None)
def test_groups_are_the_windows_of_numpy(args: WindowAttentionArgs) -> None:
    grid, splits = args.grid, args.pattern.splits
    numbers = torch.arange(grid.tokens).reshape(1, *grid.sizes, 1)
    for branch in BRANCHES:
        expected = [w.ravel().tolist() for w in numpy_windows(numbers[0, ..., 0].numpy(), splits.counts, branch)]
        grouped: list[list[int]] = []
        for box in boxes(grid, splits):
            windows = group(numbers, grid, splits, branch, box)
            assert windows.shape == (1, *box.parts, *box.sizes, 1)
            grouped += windows.reshape(box.windows, box.window_tokens).tolist()
        assert sorted(grouped) == sorted(expected)


class _WidestTensor(TorchDispatchMode):
    """The largest number of axes among all results, and which calls ran."""

    def __init__(self) -> None:
        super().__init__()
        self.axes = 0
        self.calls: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.add(func.overloadpacket)
        leaves = out if isinstance(out, list | tuple) else [out]
        self.axes = max([self.axes, *(x.dim() for x in leaves if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("args", [*CASES, *OPERATOR_CASES], ids=lambda a: f"{a.grid}-{a.pattern}-{a.prefix}-{a.suffix}")
def test_no_tensor_has_more_than_eight_axes_and_nothing_is_gathered(args: WindowAttentionArgs) -> None:
    q, k, v = (x.float() for x in random_qkv(args.grid.tokens + args.extra_tokens, batch=2))
    with _WidestTensor() as seen:
        implementation.window_attention(q, k, v, args)
    assert seen.calls, "the mode saw nothing"
    assert seen.axes <= 8
    aten = torch.ops.aten
    assert not seen.calls & {aten.index, aten.gather, aten.index_select, aten.scatter, aten.masked_fill, aten.where}
    mask = masked_of(args, MASKS["float-heads-rows"]).float()
    with _WidestTensor() as seen:
        implementation.window_attention(q, k, v, args, mask)
    assert seen.axes <= 8
    assert not seen.calls & {aten.index, aten.gather, aten.index_select, aten.scatter, aten.masked_fill, aten.where}


def test_autocast_computes_in_its_dtype_like_sdpa() -> None:
    """Norms under autocast give float32 queries and keys beside values in half."""
    args = args_of((2, 3, 4), (1, 3, 2), prefix=1)
    q, k, v = (torch.randn(1, 2, args.tokens, 8, requires_grad=True) for _ in range(3))
    mask = torch.zeros(1, 1, 1, args.tokens)
    with torch.autocast("cpu", torch.bfloat16):
        out = WINDOW_ATTENTION(q, k, v.bfloat16(), *args.as_op_args(), mask=mask)
        kept = WINDOW_ATTENTION(*(x.detach().double() for x in (q, k, v)), *args.as_op_args())
    halves = [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(out, WINDOW_ATTENTION(*halves, *args.as_op_args(), mask=mask.bfloat16()))
    assert (out.dtype, kept.dtype) == (torch.bfloat16, torch.float64)
    out.float().sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32
