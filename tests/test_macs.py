"""MACs of graphs beside torch's own FLOP counter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from t3compile.macs import graph_macs


class Call(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def _tensors(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(shape) for shape in shapes)


CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "linear": (torch.nn.functional.linear, _tensors((2, 5, 6), (7, 6))),
    "matmul": (torch.matmul, _tensors((2, 3, 5, 6), (2, 3, 6, 4))),
    "mm": (torch.mm, _tensors((5, 6), (6, 4))),
    "bmm": (torch.bmm, _tensors((3, 5, 6), (3, 6, 4))),
    "addmm": (torch.addmm, _tensors((4,), (5, 6), (6, 4))),
    "baddbmm": (torch.baddbmm, _tensors((3, 5, 4), (3, 5, 6), (3, 6, 4))),
    "conv": (torch.nn.functional.conv3d, _tensors((1, 4, 3, 8, 8), (6, 4, 1, 2, 2))),
    "attention": (torch.nn.functional.scaled_dot_product_attention, _tensors((1, 3, 5, 6), (1, 3, 9, 6), (1, 3, 9, 4))),
    "einsum": (lambda q, k: torch.einsum("bqhd, bkhd -> bhqk", q, k), _tensors((2, 5, 3, 6), (2, 7, 3, 6))),
    "einsum with an ellipsis": (lambda a, b: torch.einsum("...ij,jk->...ik", a, b), _tensors((2, 3, 5, 6), (6, 4))),
    "einsum over broadcast axes": (
        lambda a, b: torch.einsum("...ij,...jk->...ik", a, b),
        _tensors((2, 3, 5, 6), (3, 6, 4)),
    ),
    "einsum that only moves axes": (lambda a: torch.einsum("ij->ji", a), _tensors((5, 6))),
}


@pytest.mark.parametrize("name", CASES)
def test_macs_are_half_the_flops(name: str) -> None:
    function, inputs = CASES[name]
    exported = torch.export.export(Call(function), inputs)
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    assert graph_macs(exported.graph) * 2 == counter.get_total_flops()
    assert (counter.get_total_flops() > 0) == (name != "einsum that only moves axes")
