"""What a zoo model is: how to build it, how to call it, and what reading its source says must be found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from t3compile.geometry import TokenGrid


@dataclass(frozen=True)
class ZooEntry:
    """One model.

    ``build`` and ``inputs`` run under a fixed seed; ``inputs`` gives forward's keyword arguments. ``grid_sites`` is the
    number of full self-attention calls over the token grid in one forward pass, read from the model's source, and
    ``grid`` their token grid (None without sites); ``more_grids`` are those of a model's other stages. ``hint`` is the
    ``--grid`` of models whose inputs hold no grid.
    ``expected`` says in one sentence why a model has no sites, or what is special about it.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Mapping[str, Any]]
    grid_sites: int
    grid: TokenGrid | None = None
    hint: str | None = None
    expected: str = ""
    more_grids: tuple[TokenGrid, ...] = ()

    def make(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model in eval mode with random float32 weights, no parameter left at zero, and its example inputs."""
        torch.manual_seed(0)
        model = self.build().float().eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                # Zero-initialised gates and projections would hide everything behind them.
                if not parameter.count_nonzero():
                    parameter.normal_(std=0.05, generator=generator)
        torch.manual_seed(2)
        return model, dict(self.inputs())
