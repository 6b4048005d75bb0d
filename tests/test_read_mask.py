"""What is proven of attention masks, for masks as real models build them, and for those nothing may be proven of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from t3compile.errors import GridError
from t3compile.passes.bound_values import ValueBounds
from t3compile.passes.read_mask import GridPlace, MaskReader, MaskReading, binary_inputs, read_mask
from t3compile.program import Program, trace

BATCH, HEADS, GRID, TEXT, DIM = 2, 2, 6, 4, 4

Make = Callable[..., Tensor]


class Masked(nn.Module):
    """One attention over GRID + TEXT tokens in either order, under the mask that `make` builds."""

    def __init__(self, make: Make, tokens: int) -> None:
        super().__init__()
        self.make = make
        self.qkv = nn.Linear(DIM, 3 * DIM * HEADS)
        self.tokens = tokens

    def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], self.tokens, 3 * HEADS, DIM).transpose(1, 2).chunk(3, dim=1)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.make(x, **masks))


def traced(make: Make, masks: Mapping[str, Tensor], tokens: int = GRID + TEXT, batch: int = BATCH) -> Program:
    torch.manual_seed(0)
    return trace(Masked(make, tokens), (torch.randn(batch, tokens, DIM),), dict(masks))


def mask_node(program: Program) -> fx.Node:
    (call,) = (n for n in program.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default)
    node = call.args[3]
    assert isinstance(node, fx.Node)
    return node


def read(make: Make, masks: Mapping[str, Tensor], prefix: int = 0, tokens: int = GRID + TEXT) -> MaskReading:
    program = traced(make, masks, tokens)
    suffix = tokens - GRID - prefix
    return MaskReader(program).read(
        mask_node(program),
        (BATCH, HEADS, tokens, tokens),
        GridPlace(prefix, suffix, prefix, suffix, GRID),
    )


TEXT_MASK = {"text_mask": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])}
BOOL_MASK = {"text_mask": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()}
FLOAT_MASK = {"text_mask": torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])}


def padded_ones(x: Tensor, text_mask: Tensor) -> Tensor:
    return nn.functional.pad(text_mask, (GRID, 0), value=1).bool()[:, None, None, :]


def cat_ones(x: Tensor, text_mask: Tensor) -> Tensor:
    ones = torch.ones(x.shape[0], GRID, dtype=text_mask.dtype, device=x.device)
    return torch.cat([ones, text_mask], dim=1).bool().unsqueeze(1).unsqueeze(1)


def cat_additive(x: Tensor, text_mask: Tensor) -> Tensor:
    mask = torch.cat([x.new_ones(x.shape[0], GRID), text_mask.to(x.dtype)], dim=1)
    return ((1.0 - mask) * torch.finfo(x.dtype).min).view(x.shape[0], 1, 1, -1)


def cat_times_ten_thousand(x: Tensor, text_mask: Tensor) -> Tensor:
    bias = (1 - text_mask.to(x.dtype)) * -10000.0
    mask = torch.cat([torch.zeros(x.shape[0], GRID), bias], dim=-1)
    return mask[:, None, None, :].expand(-1, HEADS, mask.shape[-1], -1)


def filled_minus_infinity(x: Tensor, text_mask: Tensor) -> Tensor:
    mask = torch.zeros(x.shape[0], 1, 1, GRID + TEXT)
    hidden = torch.cat([torch.zeros(x.shape[0], GRID, dtype=torch.bool), text_mask == 0], dim=1)
    return mask.masked_fill(hidden[:, None, None], float("-inf")).repeat(1, HEADS, GRID + TEXT, 1)


def written_into_zeros(x: Tensor, text_mask: Tensor) -> Tensor:
    mask = torch.zeros(x.shape[0], GRID + TEXT, dtype=torch.bool)
    mask[:, :GRID] = True
    mask[:, GRID:] = text_mask.bool()
    return mask[:, None, None, :]


def rows_and_columns(x: Tensor, text_mask: Tensor) -> Tensor:
    keys = (
        nn.functional.pad(text_mask, (GRID, 0), value=1).bool().view(x.shape[0], 1, 1, -1).repeat(1, 1, GRID + TEXT, 1)
    )
    return keys & keys.transpose(2, 3)


def outer_product(x: Tensor, text_mask: Tensor) -> Tensor:
    keys = nn.functional.pad(text_mask.float(), (GRID, 0), value=1.0)
    return (keys[:, :, None] * keys[:, None, :]).unsqueeze(1) > 0.5


def where_infinite(x: Tensor, text_mask: Tensor) -> Tensor:
    keys = nn.functional.pad(text_mask, (GRID, 0), value=1) != 0
    return torch.where(keys, 0.0, float("-inf"))[:, None, None]


VISIBLE = {
    "padded": (padded_ones, TEXT_MASK),
    "padded-bool": (padded_ones, BOOL_MASK),
    "cat": (cat_ones, TEXT_MASK),
    "cat-bool": (cat_ones, BOOL_MASK),
    "cat-float": (cat_ones, FLOAT_MASK),
    "additive": (cat_additive, TEXT_MASK),
    "additive-bool": (cat_additive, BOOL_MASK),
    "ten-thousand": (cat_times_ten_thousand, FLOAT_MASK),
    "masked-fill": (filled_minus_infinity, TEXT_MASK),
    "in-place": (written_into_zeros, TEXT_MASK),
    "rows-and-columns": (rows_and_columns, TEXT_MASK),
    "outer-product": (outer_product, TEXT_MASK),
    "where": (where_infinite, TEXT_MASK),
}


@pytest.mark.parametrize("name", VISIBLE)
def test_a_text_mask_leaves_the_grid_alone(name: str) -> None:
    make, masks = VISIBLE[name]
    reading = read(make, masks)
    assert (reading.hides_grid, reading.same_rows, reading.has_effect) == (False, True, True)
    assert reading.assumed == ()
    assert f"keys {GRID}..{GRID + TEXT - 1} may be hidden" in reading.detail
    assert "'text_mask'" in reading.detail


@pytest.mark.parametrize("name", VISIBLE)
def test_the_same_mask_hides_the_grid_when_it_stands_elsewhere(name: str) -> None:
    """Read as if the grid were the last tokens."""
    make, masks = VISIBLE[name]
    reading = read(make, masks, prefix=TEXT)
    assert reading.hides_grid
    assert "grid keys" in reading.detail


@pytest.mark.parametrize("first", [True, False])
def test_prefix_and_suffix(first: bool) -> None:
    def make(x: Tensor, text_mask: Tensor) -> Tensor:
        ones = torch.ones(x.shape[0], GRID, dtype=torch.bool)
        parts = [text_mask.bool(), ones] if first else [ones, text_mask.bool()]
        return torch.cat(parts, dim=1)[:, None, None]

    assert not read(make, TEXT_MASK, prefix=TEXT if first else 0).hides_grid
    assert read(make, TEXT_MASK, prefix=0 if first else TEXT).hides_grid


def of_lengths(x: Tensor, text_mask: Tensor) -> Tensor:
    """Grid first, then as many text tokens as the mask has ones."""
    lengths = GRID + text_mask.sum(dim=1, dtype=torch.int)
    return (torch.arange(GRID + TEXT)[None] < lengths[:, None])[:, None, None]


@pytest.mark.parametrize("masks", [TEXT_MASK, FLOAT_MASK], ids=["integer", "floating"])
def test_lengths_need_an_assumption_and_say_so(masks: Mapping[str, Tensor]) -> None:
    reading = read(of_lengths, masks)
    assert (reading.hides_grid, reading.same_rows, reading.has_effect) == (False, True, True)
    assert reading.assumed == ("text_mask",)


def test_lengths_of_a_bool_mask_need_none() -> None:
    reading = read(of_lengths, BOOL_MASK)
    assert not reading.hides_grid
    assert reading.assumed == ()


def test_without_a_one_in_the_example_nothing_is_assumed() -> None:
    zeros = {"text_mask": torch.zeros(BATCH, TEXT, dtype=torch.int64)}
    assert read(of_lengths, zeros).hides_grid


def test_only_needed_inputs_are_assumed() -> None:
    def make(x: Tensor, text_mask: Tensor, other: Tensor) -> Tensor:
        return of_lengths(x, text_mask) | other.bool()[:, None, None]

    other = torch.ones(BATCH, GRID + TEXT, dtype=torch.int64)
    reading = read(make, {**TEXT_MASK, "other": other})
    assert not reading.hides_grid
    assert reading.assumed == ("text_mask",)


def from_an_input(x: Tensor, text_mask: Tensor) -> Tensor:
    return text_mask.bool()[:, None, None]


def from_the_tokens(x: Tensor) -> Tensor:
    return (x.abs().sum(-1) >= 0)[:, None, None]


def equal_to_itself(x: Tensor) -> Tensor:
    return (x == x).all(-1)[:, None, None]


def causal(x: Tensor) -> Tensor:
    return torch.ones(GRID + TEXT, GRID + TEXT, dtype=torch.bool).tril()


def causal_by_comparison(x: Tensor) -> Tensor:
    place = torch.arange(GRID + TEXT)
    return place[:, None] >= place[None]


def blocks(x: Tensor) -> Tensor:
    part = torch.arange(GRID + TEXT) // 3
    return torch.where(part[:, None] == part[None], 0.0, float("-inf"))


def weighted(x: Tensor) -> Tensor:
    distance = torch.arange(GRID + TEXT)
    return -(distance[:, None] - distance[None]).abs().to(x.dtype)


def slightly_weighted(x: Tensor, text_mask: Tensor) -> Tensor:
    return torch.zeros(GRID + TEXT, GRID + TEXT) + 1e-30


def multiplied_by_infinity(x: Tensor, text_mask: Tensor) -> Tensor:
    """0 * inf is NaN, which hides everything."""
    keys = nn.functional.pad(text_mask.to(x.dtype), (GRID, 0), value=1.0)
    return ((1.0 - keys) * float("-inf"))[:, None, None]


def wrapped_around(x: Tensor, text_mask: Tensor) -> Tensor:
    """The largest number plus one is the smallest: no bound of a sum of unbounded numbers holds."""
    count = text_mask.clamp(min=0).sum(dim=1) + 1
    return (count > 0)[:, None, None, None]


GRID_HIDING = {
    "input": (from_an_input, {"text_mask": torch.ones(BATCH, GRID + TEXT)}),
    "tokens": (from_the_tokens, {}),
    "nan": (equal_to_itself, {}),
    "causal": (causal, {}),
    "causal-by-comparison": (causal_by_comparison, {}),
    "blocks": (blocks, {}),
    "weighted": (weighted, {}),
    "slightly-weighted": (slightly_weighted, TEXT_MASK),
    "zero-times-infinity": (multiplied_by_infinity, TEXT_MASK),
    "overflow": (wrapped_around, {"text_mask": torch.tensor([[1, 2], [3, 4]])}),
}


@pytest.mark.parametrize("name", GRID_HIDING)
def test_must_not_prove(name: str) -> None:
    make, masks = GRID_HIDING[name]
    reading = read(make, masks)
    assert reading.hides_grid
    assert reading.has_effect
    assert not reading.allows_windows


def test_constant_masks_are_said_to_hide_for_certain() -> None:
    assert read(causal, {}).detail == "grid keys 1..5 may be hidden".replace("may be", "are")


def test_rows_that_differ_outside_of_the_grid() -> None:
    def make(x: Tensor, text_mask: Tensor) -> Tensor:
        mask = torch.ones(GRID + TEXT, GRID + TEXT, dtype=torch.bool)
        mask[0, GRID] = False
        return mask

    reading = read(make, TEXT_MASK)
    assert (reading.hides_grid, reading.same_rows) == (False, False)
    assert reading.detail == f"keys {GRID} are hidden, not alike for all grid queries"


def test_rows_that_an_input_makes_different() -> None:
    def make(x: Tensor, text_mask: Tensor) -> Tensor:
        keys = nn.functional.pad(text_mask, (GRID, 0), value=1).bool()
        rows = nn.functional.pad(text_mask, (0, GRID), value=1).bool()
        return (keys[:, None, :] | rows[:, :, None])[:, None]

    reading = read(make, TEXT_MASK)
    assert (reading.hides_grid, reading.same_rows) == (False, False)


def test_text_rows_may_be_hidden_from_everything() -> None:
    def make(x: Tensor, text_mask: Tensor) -> Tensor:
        return nn.functional.pad(text_mask, (GRID, 0), value=1).bool()[:, None, :, None].expand(-1, 1, -1, GRID + TEXT)

    reading = read(make, TEXT_MASK)
    assert (reading.hides_grid, reading.same_rows, reading.has_effect) == (False, True, True)
    assert "from queries outside of the grid only by input 'text_mask'" in reading.detail


@pytest.mark.parametrize("value", [True, 0.0, -0.0])
def test_masks_without_effect(value: float) -> None:
    def make(x: Tensor, text_mask: Tensor) -> Tensor:
        return torch.full((GRID + TEXT, GRID + TEXT), value)

    reading = read(make, TEXT_MASK)
    assert (reading.hides_grid, reading.same_rows, reading.has_effect) == (False, True, False)
    assert reading.detail == "the mask hides nothing"


def test_separate_query_and_key_counts() -> None:
    class Cross(nn.Module):
        def forward(self, q: Tensor, k: Tensor, text_mask: Tensor) -> Tensor:
            mask = nn.functional.pad(text_mask, (GRID, 0), value=True)[:, None, None]
            return nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    inputs = (torch.randn(BATCH, HEADS, GRID, DIM), torch.randn(BATCH, HEADS, GRID + TEXT, DIM), BOOL_MASK["text_mask"])
    program = trace(Cross(), inputs)
    bounds = ValueBounds(program)
    sizes: dict[str, Any] = {"query_prefix": 0, "query_suffix": 0, "prefix": 0, "suffix": TEXT, "grid_tokens": GRID}
    reading = read_mask(bounds, mask_node(program), (BATCH, HEADS, GRID, GRID + TEXT), GridPlace(**sizes))
    assert reading.allows_windows
    with pytest.raises(GridError, match=r"does not fit 0 \+ 6 \+ 1 queries"):
        read_mask(
            bounds, mask_node(program), (BATCH, HEADS, GRID, GRID + TEXT), GridPlace(**sizes | {"query_suffix": 1})
        )


def test_binary_inputs() -> None:
    def make(x: Tensor, text_mask: Tensor, ids: Tensor, zeros: Tensor, unused: Tensor) -> Tensor:
        return cat_additive(x, text_mask) + ids.sum() + zeros.sum()

    masks = {
        **TEXT_MASK,
        "ids": torch.arange(3),
        "zeros": torch.zeros(3),
        "unused": torch.ones(3),
    }
    program = traced(make, masks)
    assert binary_inputs(program) == {"text_mask": (0.0, 1.0)}
    program.exported.example_inputs = None
    assert binary_inputs(program) == {}
    assert binary_inputs(traced(cat_additive, BOOL_MASK)) == {}


def test_a_video_of_a_hundred_thousand_tokens_is_read_at_once() -> None:
    """[1, 1, S, S] with S = 130,000 in full would be 135 GB of numbers."""
    tokens = 130_000

    class Large(nn.Module):
        def forward(self, q: Tensor, text_mask: Tensor) -> Tensor:
            mask = nn.functional.pad(text_mask, (tokens - TEXT, 0), value=True).view(1, 1, 1, tokens)
            rows = mask.expand(1, 1, tokens, tokens)
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=rows & rows.transpose(2, 3))

    with torch.device("meta"):
        program = trace(Large(), (torch.empty(1, 1, tokens, 1), torch.empty(1, TEXT, dtype=torch.bool)))
    sizes = {"query_prefix": 0, "query_suffix": TEXT, "prefix": 0, "suffix": TEXT, "grid_tokens": tokens - TEXT}
    reading = read_mask(ValueBounds(program), mask_node(program), (1, 1, tokens, tokens), GridPlace(**sizes))
    assert (reading.hides_grid, reading.same_rows, reading.has_effect) == (False, True, True)


def test_too_large_to_prove() -> None:
    tokens = 5000

    class Distances(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            place = torch.arange(tokens)
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=place[:, None] >= place[None])

    with torch.device("meta"):
        program = trace(Distances(), (torch.empty(1, 1, tokens, 1),))
    sizes = {"query_prefix": 0, "query_suffix": 0, "prefix": 0, "suffix": 0, "grid_tokens": tokens}
    reading = read_mask(ValueBounds(program), mask_node(program), (1, 1, tokens, tokens), GridPlace(**sizes))
    assert reading.hides_grid
    assert "too large to prove" in reading.detail
