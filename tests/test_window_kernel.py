"""The Triton kernel, run by its interpreter on the CPU: every variant equals the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t3compile.geometry import Splits, TokenGrid
from t3compile.ops import WindowAttentionArgs
from t3compile.ops.launch_kernel import describe_launches, empty_output
from t3compile.ops.reference import masked_attention, masked_sdpa
from t3compile.ops.window_launch import Layout, Tile, WindowLaunch
from t3compile.pattern import BRANCHES, WindowPattern
from tests.interpreted import SMALL_TILE, among_nans, fresh_seed, mask_among_nans, run_interpreted
from tests.test_window_attention import (
    MASKS,
    Triple,
    args_of,
    assert_as_good_as_plain,
    cases,
    masked_of,
    random_qkv,
    reference,
)

pytest.importorskip("triton")


@dataclass(frozen=True)
class Case:
    """A call of the kernel: its arguments, the shapes and dtype of its tensors, its mask and its tile."""

    args: WindowAttentionArgs
    dtype: torch.dtype = torch.float32
    batch: int = 1
    heads: int = 1
    key_heads: int = 1
    depth: int = 16
    value_depth: int = 16
    tokens_first: bool = False
    mask: str | None = None
    tile: Tile = SMALL_TILE


def check(case: Case) -> None:
    args, seed = case.args, fresh_seed()
    q, k, v = random_qkv(
        max(args.tokens, args.query_tokens),
        batch=case.batch,
        heads=case.heads,
        depth=case.depth,
        value_depth=case.value_depth,
        seed=seed,
    )
    q, k, v = q[:, :, : args.query_tokens], k[:, : case.key_heads, : args.tokens], v[:, : case.key_heads, : args.tokens]
    mask = None
    if case.mask is not None:
        mask = masked_of(args, MASKS[case.mask], batch=case.batch, heads=case.heads, seed=seed)
        if mask.is_floating_point() and mask.shape[-2] > 1:
            # One number at every key of a row counts for nothing.
            mask[..., args.query_prefix : args.query_prefix + args.grid.tokens, :] += 0.5
    exact = reference(q, k, v, args, mask=mask)
    q, k, v = (x.to(case.dtype) for x in (q, k, v))
    if mask is not None and mask.is_floating_point():
        mask = mask.to(case.dtype)
    plain = [reference(q, k, v, args, mask=mask, attend=f) for f in (masked_attention, masked_sdpa)]
    given = tuple(among_nans(x, tokens_first=case.tokens_first) for x in (q, k, v))
    ours = run_interpreted(*given, args, None if mask is None else mask_among_nans(mask, args), tile=case.tile)
    assert_as_good_as_plain(ours, plain, exact)


JOINT = args_of((2, 3, 5), (1, 2, 2), prefix=2, suffix=3, scale=0.6)
TWO_TILES = args_of((2, 4, 8), (2, 1, 1))

CASES = {
    "even": Case(args_of((2, 4, 6), (1, 2, 3)), batch=2),
    "even tokens first": Case(args_of((2, 4, 6), (2, 1, 3)), batch=2, heads=2, key_heads=2, tokens_first=True),
    "even float16": Case(args_of((2, 4, 6), (1, 2, 3)), torch.float16, heads=2, key_heads=2, tokens_first=True),
    "even bfloat16": Case(args_of((2, 4, 6), (1, 2, 3)), torch.bfloat16, heads=2, key_heads=2),
    "whole tiles": Case(args_of((2, 4, 8), (2, 2, 1)), torch.float16),
    "several tiles": Case(TWO_TILES),
    "more keys than queries in a tile": Case(TWO_TILES, tile=Tile(16, 32, 4, 1)),
    "more queries than keys in a tile": Case(TWO_TILES, tile=Tile(64, 16, 4, 1)),
    "uneven": Case(args_of((3, 5, 7), (2, 2, 1))),
    "uneven on one axis": Case(args_of((2, 4, 7), (1, 2, 3)), torch.float16, tokens_first=True),
    "idle tiles": Case(args_of((1, 1, 33), (1, 1, 2))),
    "local": Case(args_of((2, 5, 4), (1, 2, 2), ("local",))),
    "dilated": Case(args_of((2, 5, 4), (1, 2, 2), ("dilated",)), torch.float16),
    "joint": Case(JOINT, batch=2, heads=2, key_heads=2),
    "joint tokens first": Case(JOINT, torch.float16, batch=2, tokens_first=True),
    "prefix": Case(args_of((2, 4, 4), (1, 2, 2), prefix=3)),
    "suffix": Case(args_of((2, 4, 4), (1, 2, 2), suffix=5), torch.float16),
    "even joint": Case(args_of((2, 4, 4), (2, 2, 1), prefix=3, suffix=1), heads=2, key_heads=2),
    "several tiles outside the grid": Case(args_of((1, 2, 4), (1, 2, 1), prefix=18, suffix=17)),
    "keys outside only": Case(replace(JOINT, query_prefix=0, query_suffix=0)),
    "queries outside only": Case(args_of((2, 2, 4), (1, 2, 2), query_prefix=4, query_suffix=1), batch=2),
    "whole tiles and queries outside": Case(args_of((2, 4, 4), (2, 1, 1), query_prefix=2, query_suffix=3)),
    "own queries": Case(replace(JOINT, query_prefix=0, query_suffix=19), torch.float16),
    "one branch, joint": Case(args_of((2, 3, 4), (1, 2, 3), ("dilated",), prefix=2, suffix=1)),
    "grouped heads": Case(args_of((1, 4, 4), (1, 2, 2)), batch=2, heads=4, key_heads=2),
    "one key head": Case(replace(JOINT, scale=None), torch.float16, heads=3, key_heads=1, tokens_first=True),
    "depth 40": Case(args_of((2, 3, 4), (1, 2, 2)), depth=40, value_depth=40),
    "depth 72 and 24": Case(JOINT, torch.float16, depth=72, value_depth=24, tokens_first=True),
    "depth 96 and 128": Case(args_of((2, 3, 4), (2, 1, 1)), depth=96, value_depth=128),
    "depth 20 and 33": Case(args_of((2, 3, 4), (2, 1, 2)), depth=20, value_depth=33),
    "scale": Case(args_of((2, 4, 4), (1, 2, 2), scale=1.5)),
    "negative scale": Case(args_of((2, 4, 4), (1, 2, 2), prefix=1, scale=-0.4)),
    "no scale": Case(args_of((2, 4, 4), (1, 2, 2), scale=0.0)),
    "one frame": Case(args_of((1, 5, 5), (1, 2, 2), prefix=1)),
    "windows of one token": Case(args_of((2, 2, 2), (2, 2, 2), suffix=2)),
    "windows of one token alone": Case(args_of((1, 2, 2), (1, 2, 2))),
    "windows of one and two tokens": Case(args_of((1, 1, 3), (1, 1, 2))),
    **{f"mask {form}": Case(JOINT, batch=2, mask=form) for form in sorted(MASKS)},
    "mask of heads": Case(JOINT, batch=2, heads=2, key_heads=2, mask="float-heads"),
    "mask, float16": Case(JOINT, torch.float16, batch=2, mask="float-rows", tokens_first=True),
    "mask, own queries": Case(replace(JOINT, query_prefix=1, query_suffix=0), mask="float-rows"),
    "mask, no queries outside": Case(replace(JOINT, query_prefix=0, query_suffix=0), batch=2, mask="float-rows"),
    "mask, no keys outside": Case(args_of((2, 2, 4), (1, 2, 2), query_prefix=3), batch=2, mask="bool-rows"),
    "mask, nothing outside": Case(args_of((2, 2, 4), (1, 2, 2)), batch=2, mask="bool-keys"),
    "mask, grouped heads": Case(JOINT, heads=4, key_heads=2, mask="float-heads-rows"),
    "mask, one branch": Case(args_of((2, 3, 4), (1, 2, 3), ("local",), prefix=2), mask="bool-rows"),
    "mask, negative scale": Case(replace(JOINT, scale=-0.5), mask="bool-keys", batch=2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_reference(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("name", ["joint", "mask float-rows", "depth 72 and 24"])
def test_equals_the_reference_with_wide_addresses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WindowLaunch, "needs_64_bits", True)
    check(CASES[name])


@given(cases(), st.booleans(), st.sampled_from([torch.float32, torch.float16]))
@settings(max_examples=8, deadline=None)
def test_any_pattern_on_any_grid_equals_the_reference(
    args: WindowAttentionArgs, tokens_first: bool, dtype: torch.dtype
) -> None:
    check(Case(args, dtype, tokens_first=tokens_first))


def test_a_query_that_sees_no_key_gives_zero() -> None:
    """Before the first and after the last key that it is offered."""
    seed = fresh_seed()
    q, k, v = (x.float() for x in random_qkv(JOINT.tokens, depth=16, value_depth=16, heads=1, seed=seed))
    mask = torch.ones(1, 1, JOINT.tokens, JOINT.tokens, dtype=torch.bool)
    mask[..., 0, :] = mask[..., -1, :] = False
    for given_mask in (mask, torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))):
        out = run_interpreted(q, k, v, JOINT, given_mask)
        assert torch.equal(out[:, :, [0, -1]], torch.zeros(1, 1, 2, 16))
        assert_as_good_as_plain(
            out, [reference(q, k, v, JOINT, mask=mask)], reference(*(x.double() for x in (q, k, v)), JOINT, mask=mask)
        )


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_the_least_float_hides_a_key_but_not_all_of_them() -> None:
    """A query all of whose keys are masked by a finite number still sees them, as in torch's SDPA."""
    seed = fresh_seed()
    q, k, v = random_qkv(JOINT.tokens, depth=16, value_depth=16, heads=1, seed=seed)
    mask = torch.zeros(1, 1, JOINT.tokens, JOINT.tokens)
    mask[..., 0, :] = mask[..., 2:-3, -3:] = torch.finfo(torch.float32).min
    exact = reference(q, k, v, JOINT, mask=mask.double())
    q, k, v = (x.float() for x in (q, k, v))
    # float32 absorbs the scores of the first query, float64 does not: it is compared with the mean of the values.
    exact[:, :, 0] = v.double().mean(2)
    plain = reference(q, k, v, JOINT, mask=mask, attend=masked_sdpa)
    assert_as_good_as_plain(run_interpreted(q, k, v, JOINT, mask), [plain], exact)


def test_the_output_does_not_depend_on_the_tile() -> None:
    seed = fresh_seed()
    q, k, v = (x.float() for x in random_qkv(JOINT.tokens, depth=16, value_depth=16, seed=seed))
    small, large = (run_interpreted(q, k, v, JOINT, tile=Tile(m, n, 4, 1)) for m, n in ((16, 16), (32, 64)))
    assert (small - large).abs().max() <= 8 * torch.finfo(torch.float32).eps * v.abs().max()


def _launch(grid: Triple, splits: Triple, **options: int) -> WindowLaunch:
    args = args_of(grid, splits, **options)
    layout = Layout.tokens_first(12, args.tokens, 128)
    return WindowLaunch(args, "local", False, 2, 12, 12, 128, 128, "bfloat16", *([layout] * 4))


def test_programs_cover_every_tile_once() -> None:
    launch = _launch((21, 30, 52), (2, 4, 3), prefix=5, suffix=226)
    window = 11 * 8 * 18
    assert launch.programs(Tile(128, 32, 8, 2)) == 2 * 12 * (24 * -(-window // 128) + 2)
    assert launch.constants(Tile(128, 32, 8, 2))["EXTRA_PROGRAMS"] == 2 * 12 * 2


def test_addresses_are_wide_where_32_bits_do_not_hold_them() -> None:
    launch = _launch((21, 136, 240), (7, 8, 6))
    assert not launch.needs_64_bits
    # 1,398,102 tokens are the most that 12 heads of 128 leave within 31 bits.
    assert not _launch((1, 1, 1398102), (1, 1, 7)).needs_64_bits
    assert _launch((1, 1, 1398103), (1, 1, 7)).needs_64_bits


def test_launches_are_described_alike_whatever_the_unused_strides() -> None:
    args = args_of((2, 3, 4), (1, 3, 2))
    q = torch.zeros(1, 2, 24, 16)
    packed = torch.zeros(1, 24, 3, 2, 16).unbind(2)[0].transpose(1, 2)
    (launch, second) = describe_launches(q, q, q, args)
    assert launch.q == Layout(0, 24 * 16, 16)
    assert (launch.averages, second.averages) == (False, True)
    assert [x.branch for x in (launch, second)] == list(BRANCHES)
    assert describe_launches(packed, q, q, args)[0].q == Layout(0, 16, 96)
    mask = torch.zeros(24)
    masked = describe_launches(q, q, q, args, mask)[0].mask
    assert masked is not None
    assert (masked.dtype, masked.batch, masked.head, masked.query, masked.key) == ("float32", 0, 0, 0, 1)
    assert empty_output(q, q).transpose(1, 2).is_contiguous()
    coinciding = WindowAttentionArgs(TokenGrid(2, 3, 4), WindowPattern(Splits(2, 1, 4)))
    assert len(describe_launches(q, q, q, coinciding)) == 1


def test_a_wrong_step_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is sharp: windows cut along the wrong axes fail it."""
    honest = WindowLaunch.constants

    def mutated(self: WindowLaunch, tile: Tile, *, upcast: bool = False) -> dict[str, object]:
        constants = honest(self, tile, upcast=upcast)
        return {**constants, "N_H": constants["N_W"], "N_W": constants["N_H"]}

    check(CASES["even"])
    monkeypatch.setattr(WindowLaunch, "constants", mutated)
    with pytest.raises(AssertionError):
        check(CASES["even"])
