"""Window attention on CPUs and in torch's graphs: the same numbers, and no copy, call or memory that is not needed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from t3compile.ops import WINDOW_ATTENTION, WindowAttentionArgs, cpu_attention
from t3compile.ops.cpu_attention import cpu_window_attention
from t3compile.ops.lowered_attention import lowered_window_attention
from t3compile.ops.regroup import boxes, group
from t3compile.ops.window_views import WindowSteps, as_attention_input, merged_step
from t3compile.pattern import BRANCHES, Branch
from tests.test_window_attention import (
    MASKS,
    Triple,
    args_of,
    cases,
    float64_bound,
    largest,
    masked_of,
    reference,
    stream_qkv,
)

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention_for_cpu
COPIES = (aten.copy_, aten.clone, aten.cat, aten.stack, aten._unsafe_view)
MAKES_NOTHING = (aten.as_strided, aten.view, aten.transpose, aten.slice, aten.select, aten.unsqueeze, aten.permute)

QKV = tuple[Tensor, Tensor, Tensor]
Run = Callable[[Tensor, Tensor, Tensor, WindowAttentionArgs], Tensor]


class Recorded(TorchDispatchMode):
    """Which calls ran, the largest tensor that one made, and the most bytes that were alive at once, inputs aside."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()
        self.axes = self.most_elements = self.peak_bytes = 0
        self._inputs = {x.untyped_storage()._cdata for x in inputs}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket] += 1
        for x in pytree.tree_leaves(out):
            storage = x.untyped_storage()
            self.axes = max(self.axes, x.dim())
            if storage._cdata not in self._inputs:
                self.most_elements = max(self.most_elements, x.numel())
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(nbytes for _, nbytes in self._alive.values()))
        return out

    @property
    def copies(self) -> int:
        return sum(self.calls[call] for call in COPIES)


def token_major(tokens: int, *, batch: int = 1, heads: int = 2, depth: int = 8) -> QKV:
    """q, k and v [B, N, S, D] as models have them: views of [B, S, N, D]."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, tokens, heads, depth, generator=generator).transpose(1, 2) for _ in range(3))
    return q, k, v


def recorded(run: Run, qkv: QKV, args: WindowAttentionArgs) -> tuple[Tensor, Recorded]:
    with torch.no_grad(), Recorded(*qkv) as seen:
        out = run(*qkv, args)
    assert seen.calls, "the mode saw nothing"
    return out, seen


BOTH = pytest.mark.parametrize("run", [cpu_window_attention, lowered_window_attention], ids=["cpu", "lowered"])
GRID = (4, 6, 10)


@BOTH
@pytest.mark.parametrize(
    ("splits", "branches"),
    [((4, 1, 1), BRANCHES), ((2, 1, 1), ("local",)), ((4, 3, 1), ("local",))],
    ids=["frames", "stretches", "rows"],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_where_windows_follow_each_other_nothing_is_copied(
    run: Run, splits: Triple, branches: tuple[Branch, ...], batch: int
) -> None:
    qkv = token_major(240, batch=batch)
    out, seen = recorded(run, qkv, args_of(GRID, splits, branches))
    assert seen.calls[FLASH] == 1
    assert seen.copies == 0
    made = {call for call in seen.calls if call not in (FLASH, *MAKES_NOTHING)}
    assert not made
    # The output and the logarithms that the fused kernel keeps for a backward pass.
    assert seen.peak_bytes == out.numel() * 4 + out.numel() // out.shape[3] * 4
    assert out.transpose(1, 2).is_contiguous()


def test_a_fused_projection_is_read_in_place() -> None:
    packed = torch.randn(2, 240, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    out, seen = recorded(cpu_window_attention, (q, k, v), args_of(GRID, (4, 1, 1)))
    assert (seen.calls[FLASH], seen.copies) == (1, 0)
    assert out.transpose(1, 2).is_contiguous()


def test_other_layouts_do_take_copies() -> None:
    """So that the tests above can fail."""
    q, k, v = (x.contiguous() for x in token_major(240))
    assert recorded(cpu_window_attention, (q, k, v), args_of(GRID, (4, 1, 1)))[1].copies > 0
    assert recorded(cpu_window_attention, token_major(240), args_of(GRID, (2, 1, 1)))[1].copies > 0
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in token_major(240))
    out, seen = recorded(cpu_window_attention, (q, k, v), args_of(GRID, (4, 1, 1)))
    assert seen.copies > 0
    assert torch.equal(out, cpu_window_attention(*token_major(240), args_of(GRID, (4, 1, 1))))


def test_tokens_at_one_step_are_read_in_place_and_only_outputs_are_written() -> None:
    _, seen = recorded(cpu_window_attention, token_major(240), args_of(GRID, (1, 1, 5), ("dilated",)))
    assert seen.calls[FLASH] == 1
    assert seen.copies == 1


@pytest.mark.parametrize(
    ("splits", "copies"),
    [
        # q, k, v and the output of the first branch; the second's is averaged with it in place.
        ((2, 3, 2), 4 + 3),
        # The local branch is a view, and its output stays where it is.
        ((2, 1, 1), 0 + 3),
        # The dilated one is a view.
        ((1, 1, 5), 4 + 0),
    ],
)
def test_the_second_branch_is_averaged_in_place(splits: Triple, copies: int) -> None:
    out, seen = recorded(cpu_window_attention, token_major(240), args_of(GRID, splits))
    assert (seen.calls[FLASH], seen.copies) == (2, copies)
    assert seen.calls[aten.add_] == seen.calls[aten.mul] == 1
    assert largest(out - reference(*token_major(240), args_of(GRID, splits))) < 1e-5


@pytest.mark.parametrize("splits", [(2, 3, 2), (1, 3, 5), (3, 4, 3), (2, 1, 1)])
def test_memory_is_that_of_full_attention_and_a_chunk(splits: Triple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the pattern, uneven ones too; and no tensor is larger than the output."""
    qkv = token_major(240, heads=4, depth=32)
    args = args_of(GRID, splits)
    window = 4 * 32 * 4 * args.pattern.largest_window_tokens(args.grid)  # q, k, v and output of one head
    budget = max(window, 16 << 10)
    monkeypatch.setattr(cpu_attention, "CHUNK_BYTES_PER_THREAD", budget // torch.get_num_threads())
    out, seen = recorded(cpu_window_attention, qkv, args)
    full = out.numel() * 4
    # The fused kernel keeps one float32 beside each row of its output.
    assert seen.peak_bytes <= full + budget * (1 + 1 / (4 * 32))
    assert seen.most_elements == out.numel()
    assert seen.calls[FLASH] > 4
    _, at_once = recorded(lowered_window_attention, qkv, args)
    assert at_once.peak_bytes > 3 * full, "all windows at once take more"


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 20_000, 1 << 30])
@pytest.mark.parametrize("splits", [(2, 3, 2), (3, 4, 3), (1, 1, 5)])
def test_chunks_change_no_bit(chunk_bytes: int, splits: Triple, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = token_major(240, batch=2, heads=4)
    args = args_of(GRID, splits)
    expected = lowered_window_attention(*qkv, args)
    monkeypatch.setattr(cpu_attention, "CHUNK_BYTES_PER_THREAD", chunk_bytes)
    out, seen = recorded(cpu_window_attention, qkv, args)
    assert torch.equal(out, expected)
    if chunk_bytes == 1:
        assert seen.calls[FLASH] == 2 * 2 * 4 * args.pattern.splits.windows  # branches, batch, heads, windows


_counts = st.integers(1, 12)


@settings(deadline=None)
@given(st.tuples(_counts, _counts, _counts), _counts, st.integers(1, 200), st.sampled_from([1, 2, 3, 4, 16]))
def test_chunks_hold_every_window_once_and_what_fits(parts: Triple, heads: int, fit: int, threads: int) -> None:
    seen = torch.zeros(*parts, heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        patch.setattr(cpu_attention, "CHUNK_BYTES_PER_THREAD", 1000 * fit)
        for chunk in cpu_attention._chunks(parts, heads, 1000 * threads):
            windows = chunk.of(seen)
            windows += 1
            assert windows.numel() <= fit
    assert torch.all(seen == 1)


@pytest.mark.parametrize(
    ("parts", "heads", "fit", "of_each"),
    [
        ((1, 8, 40), 1, 3, {2}),
        ((1, 8, 40), 1, 5, {4}),
        ((1, 2, 3), 12, 3, {2}),
        ((1, 2, 3), 12, 5, {4}),
        ((1, 2, 3), 12, 40, {36}),
        ((1, 1, 3), 5, 3, {2, 1}),
        ((7, 1, 1), 12, 1, {1}),
    ],
)
def test_threads_get_equal_shares_of_a_chunk_where_that_fits(
    parts: Triple, heads: int, fit: int, of_each: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three windows of one query block each, one of two threads computes two while the other waits."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cpu_attention, "CHUNK_BYTES_PER_THREAD", 500 * fit)
    seen = torch.zeros(*parts, heads)
    assert {chunk.of(seen).numel() for chunk in cpu_attention._chunks(parts, heads, 1000)} == of_each


@given(cases(), st.sampled_from([None, *sorted(MASKS)]), st.sampled_from([1, 2]), st.sampled_from([1, 600, 1 << 22]))
@settings(max_examples=150, deadline=None)
def test_both_equal_dense_attention(
    args: WindowAttentionArgs, name: str | None, key_heads: int, chunk_bytes: int
) -> None:
    """Uneven windows, extra queries and keys, grouped heads, masks, depths that differ; chunks of any size."""
    mask = None if name is None else masked_of(args, MASKS[name], heads=4)
    for value_depth in (3, 4, 6):
        q, k, v = stream_qkv(args, batch=2, heads=4, depth=4, value_depth=value_depth)
        k, v = k[:, :key_heads], v[:, :key_heads]
        exact = reference(q, k, v, args, mask=mask)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_attention, "CHUNK_BYTES_PER_THREAD", chunk_bytes)
            on_cpu = cpu_window_attention(q, k, v, args, mask)
        lowered = lowered_window_attention(q, k, v, args, mask)
        for out in (on_cpu, lowered):
            assert largest(out - exact) <= 2 * float64_bound(q, k, v, args.scale)
            assert out.transpose(1, 2).is_contiguous()
        # Where depths differ, columns of zeros let the CPU's fused kernel run, which sums in another order.
        assert value_depth != 4 or torch.equal(on_cpu, lowered)


@given(cases(), st.sampled_from([None, *sorted(MASKS)]), st.sampled_from([(4, 1), (4, 2), (6, 6), (6, 3), (5, 5)]))
@settings(max_examples=60, deadline=None)
def test_groups_of_heads_change_no_bit(args: WindowAttentionArgs, name: str | None, heads: tuple[int, int]) -> None:
    of_queries, of_keys = heads
    mask = None if name is None else masked_of(args, MASKS[name], heads=of_queries)
    q, k, v = stream_qkv(args, batch=2, heads=of_queries, depth=4, value_depth=4)
    k, v = k[:, :of_keys], v[:, :of_keys]
    whole = lowered_window_attention(q, k, v, args, mask)
    for groups in (2, 3, 6):
        assert torch.equal(lowered_window_attention(q, k, v, args, mask, head_groups=groups), whole)


@pytest.mark.parametrize(
    ("splits", "heads", "groups", "calls"),
    [((2, 3, 2), 4, 6, 2 * 4), ((2, 3, 2), 12, 6, 2 * 6), ((2, 3, 2), 7, 6, 2), ((4, 1, 1), 12, 6, 1)],
    ids=["a group each", "six groups", "no divisor", "a view"],
)
def test_heads_are_taken_in_equal_groups_where_tokens_are_copied(
    splits: Triple, heads: int, groups: int, calls: int
) -> None:
    qkv = token_major(240, heads=heads)

    def in_groups(*inputs: Any) -> Tensor:
        return lowered_window_attention(*inputs, head_groups=groups)

    _, seen = recorded(in_groups, qkv, args_of(GRID, splits))
    assert seen.calls[FLASH] == calls
    _, at_once = recorded(lowered_window_attention, qkv, args_of(GRID, splits))
    assert seen.peak_bytes <= at_once.peak_bytes * (0.6 if calls > 2 else 1)


def test_depths_that_differ_stay_fused() -> None:
    """torch's own SDPA would make all scores of a window."""
    args = args_of(GRID, (2, 3, 2))
    for value_depth in (4, 12):
        q, k, v = token_major(240)
        v = torch.randn(1, 2, 240, value_depth)
        out, seen = recorded(cpu_window_attention, (q, k, v), args)
        assert seen.calls[FLASH] == 2
        assert seen.calls[aten.bmm] == seen.calls[aten._softmax] == 0
        assert out.shape == (1, 2, 240, value_depth)


def test_the_op_runs_in_chunks_and_its_gradient_in_differentiable_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[tuple[int, ...]] = []
    whole = cpu_attention._attend

    def counted(q: Tensor, *rest: Any) -> Tensor:
        chunks.append(tuple(q.shape))
        return whole(q, *rest)

    monkeypatch.setattr(cpu_attention, "_attend", counted)
    args = args_of(GRID, (2, 3, 2))
    q, k, v = (x.double().requires_grad_() for x in token_major(240))
    out = WINDOW_ATTENTION(q, k, v, *args.as_op_args())
    assert chunks == 2 * [(12, 2, 20, 8)]
    ours = torch.autograd.grad(out.pow(2).sum(), (q, k, v))
    theirs = torch.autograd.grad(reference(q, k, v, args).pow(2).sum(), (q, k, v))
    assert len(chunks) == 2
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_rounded_as_in_the_lowered_form(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in token_major(240, heads=3, depth=32))
    for splits in ((4, 1, 1), (2, 3, 2), (3, 4, 3)):
        out = cpu_window_attention(q, k, v, args_of(GRID, splits))
        assert out.dtype == dtype
        assert torch.equal(out, lowered_window_attention(q, k, v, args_of(GRID, splits)))


@given(cases(), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_views_are_the_windows_of_regrouping(args: WindowAttentionArgs, start: int) -> None:
    """Steps and starts against the slices and concatenations that regroup elsewhere."""
    grid, splits = args.grid, args.pattern.splits
    x = torch.arange(2 * (start + grid.tokens) * 3 * 2).reshape(2, start + grid.tokens, 3, 2).transpose(1, 2)
    in_grid = x[:, :, start:].transpose(1, 2).flatten(2).unflatten(1, grid.sizes)
    for branch in BRANCHES:
        for box in boxes(grid, splits):
            expected = group(in_grid, grid, splits, branch, box).unflatten(7, (3, 2)).movedim(7, 4)
            windows = WindowSteps.of(args, branch, box).view(x, start)
            assert torch.equal(windows, expected)
            merged = as_attention_input(windows, leading=4)
            if merged is not None:
                assert torch.equal(merged, expected.reshape(2 * box.windows, 3, box.window_tokens, 2))


@pytest.mark.parametrize(
    ("sizes", "steps", "merged"),
    [((4, 6), (6, 1), 1), ((4, 1, 6), (12, 7, 2), 2), ((4, 6), (7, 1), None), ((1, 1), (5, 3), 0), ((2, 3), (0, 0), 0)],
)
def test_axes_merge_where_one_step_leads_through_them(sizes: Triple, steps: Triple, merged: int | None) -> None:
    assert merged_step(sizes, steps) == merged
    base = torch.arange(200)
    view = base.as_strided(sizes, steps)
    if merged is not None:
        assert torch.equal(base.as_strided((math.prod(sizes),), (merged,)), view.reshape(-1))


@pytest.mark.parametrize(("splits", "calls"), [((4, 1, 1), 1), ((2, 3, 2), 2), ((3, 6, 2), 4)])
def test_the_lowered_form_stacks_nothing(splits: Triple, calls: int) -> None:
    """A call per branch and window size; q, k, v and the output are copied once a branch; at most eight axes."""
    _, seen = recorded(lowered_window_attention, token_major(240), args_of(GRID, splits))
    assert seen.calls[FLASH] == calls
    assert seen.axes <= 8
    if splits == (2, 3, 2):
        assert seen.calls[aten.clone] == 2 * 4
        assert seen.calls[aten.cat] == seen.calls[aten.stack] == 0
