"""The paper's formulation, which speed is measured against: the op's result, and no less work than the paper does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import t3compile.ops.paper_attention as implementation
from t3compile.ops.paper_attention import paper_window_attention
from t3compile.ops.reference import masked_attention, masked_sdpa
from t3compile.pattern import BRANCHES, Branch
from tests.test_window_attention import (
    DIVIDING,
    GRID,
    MASKS,
    Triple,
    args_of,
    assert_as_good_as_plain,
    cases,
    float64_bound,
    largest,
    masked_of,
    random_qkv,
    reference,
    stream_qkv,
)


@given(cases(), st.sampled_from([None, *sorted(MASKS)]), st.integers(0, 2**16))
@settings(max_examples=100, deadline=None)
def test_equals_dense_attention_under_the_masks(args: Any, name: str | None, seed: int) -> None:
    q, k, v = stream_qkv(args, batch=2, depth=4, value_depth=3, seed=seed)
    mask = None if name is None else masked_of(args, MASKS[name], seed=seed)
    exact = reference(q, k, v, args, mask=mask)
    assert largest(paper_window_attention(q, k, v, args, mask) - exact) <= 2 * float64_bound(q, k, v, args.scale)


@pytest.mark.parametrize("splits", [*DIVIDING, (1, 1, 1)])
@pytest.mark.parametrize("branches", [BRANCHES, ("local",), ("dilated",)])
def test_equals_the_reference_where_splits_divide(splits: Triple, branches: tuple[Branch, ...]) -> None:
    args = replace(args_of(GRID, splits, branches), scale=0.3)
    q, k, v = random_qkv(args.tokens, batch=2, heads=4, value_depth=6)
    exact = reference(q, k, v, args)
    assert largest(paper_window_attention(q, k, v, args) - exact) <= float64_bound(q, k, v, 0.3)
    grouped_k, grouped_v = k[:, ::2], v[:, ::2]
    exact = reference(q, grouped_k, grouped_v, args)
    assert largest(paper_window_attention(q, grouped_k, grouped_v, args) - exact) <= float64_bound(q, k, v, 0.3)


@pytest.mark.parametrize("splits", [(4, 1, 1), (2, 3, 5)])
def test_is_as_good_as_plain_torch_in_half(splits: Triple) -> None:
    args = args_of(GRID, splits)
    q, k, v = random_qkv(args.tokens, heads=4)
    exact = reference(q, k, v, args)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    plain = [reference(q, k, v, args, attend=f) for f in (masked_attention, masked_sdpa)]
    assert_as_good_as_plain(paper_window_attention(q, k, v, args), plain, exact)


@pytest.mark.parametrize(
    ("splits", "expected"),
    [((4, 1, 1), 2 * [(8, 3, 60, 8)]), ((2, 3, 5), 2 * [(60, 3, 8, 8)])],
)
def test_branches_are_not_merged(splits: Triple, expected: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of attention per branch, [B*windows, N, window tokens, D], also where both are one partition."""
    seen: list[tuple[int, ...]] = []

    def counted(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append(tuple(q.shape))
        assert all(x.transpose(1, 2).is_contiguous() for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr(implementation, "scaled_dot_product_attention", counted)
    q, k, v = random_qkv(240, batch=2, heads=3)
    paper_window_attention(q, k, v, args_of(GRID, splits))
    assert seen == expected


def test_what_the_paper_takes_costs_only_the_copies_that_it_makes() -> None:
    """Frame by frame every partition of tokens that stand in memory in order is a view."""
    x = torch.randn(2, 240, 3, 8).transpose(1, 2)
    for branch in BRANCHES:
        args = args_of(GRID, (4, 1, 1))
        windows = implementation._by_window(x, args.grid, args.pattern.splits, branch)
        assert windows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        args = args_of(GRID, (2, 3, 5))
        windows = implementation._by_window(x, args.grid, args.pattern.splits, branch)
        assert windows.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        assert torch.equal(implementation._by_token(windows, args.grid, args.pattern.splits, branch), x.transpose(1, 2))
