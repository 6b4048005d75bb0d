"""Tables of positions: every raster is read back, whatever makes the table, and nothing else is a raster."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from t3compile.passes.read_raster import Raster, find_raster, read_raster

SIZES = st.lists(st.integers(2, 7), min_size=2, max_size=3).map(tuple)


def coordinates(sizes: tuple[int, ...]) -> Tensor:
    axes = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    return torch.stack(axes, -1).flatten(0, -2).float()  # [S, axes]


def rotary(positions: Tensor, width: int = 6, theta: float = 10_000.0) -> Tensor:
    angles = [positions[:, i : i + 1] * theta ** (-torch.arange(width) / width) for i in range(positions.shape[1])]
    return torch.cat(angles, 1)


MAKERS = {
    "ids": lambda p: p.long(),
    "shifted": lambda p: p + torch.tensor([5.0, 100.0, 65_536.0])[: p.shape[1]],
    "centred": lambda p: p - (p.amax(0) / 2).floor(),
    "fractional": lambda p: p * 0.37,
    "cos_sin": lambda p: torch.cat([rotary(p).cos(), rotary(p).sin()], 1),
    "complex": lambda p: torch.polar(torch.ones_like(rotary(p)), rotary(p)),
    "with_constant_columns": lambda p: torch.cat([torch.ones(len(p), 2), p, torch.zeros(len(p), 1)], 1),
    "spans": lambda p: torch.stack([p, p + 1], -1).flatten(1),
}


@settings(max_examples=40, deadline=None)
@given(SIZES, st.sampled_from(sorted(MAKERS)))
def test_every_raster_is_read_back(sizes: tuple[int, ...], maker: str) -> None:
    assert read_raster(MAKERS[maker](coordinates(sizes))) == sizes


@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(0, 9), st.integers(0, 9))
def test_a_raster_among_other_tokens_is_found_where_it_is(sizes: tuple[int, ...], before: int, after: int) -> None:
    grid = coordinates(sizes)
    count = grid.shape[1]
    left = torch.arange(before).float()[:, None].expand(before, count)
    right = torch.arange(after).float()[:, None].expand(after, count) + 1000
    table = torch.cat([left, grid + 200, right])
    assert find_raster(table) == Raster(before, sizes)


def test_unequal_steps_of_time() -> None:
    """The first latent frame stands for one frame, the others for several."""
    frames = torch.tensor([0.0, 1.0, 9.0, 17.0])
    table = coordinates((4, 3, 5))
    table[:, 0] = frames[table[:, 0].long()]
    assert read_raster(table) == (4, 3, 5)


@pytest.mark.parametrize(
    "table",
    [
        torch.arange(24).float()[:, None],
        torch.arange(24).float()[:, None].expand(24, 3),
        torch.zeros(24, 3),
        torch.randn(24, 3, generator=torch.Generator().manual_seed(0)),
        coordinates((3, 8))[torch.randperm(24, generator=torch.Generator().manual_seed(0))],
        coordinates((3, 8)).flip(1).T.reshape(24, 2),
        torch.cat([coordinates((3, 8))[:-1], torch.tensor([[9.0, 9.0]])]),
        torch.cat([coordinates((3, 8)), coordinates((3, 8)).prod(1, keepdim=True)], 1),
        torch.ones(24, 3, dtype=torch.bool),
        torch.zeros(1, 3),
        torch.zeros(24, 0),
    ],
)
def test_what_is_no_raster(table: Tensor) -> None:
    assert read_raster(table) is None


def test_more_than_three_axes_are_no_token_grid() -> None:
    assert find_raster(coordinates((2, 3, 4, 5))) is None
