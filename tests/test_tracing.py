"""Tracing by a chain of strategies: which one wins, what it freezes, and that the model is left as it was."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import t3compile
from t3compile.errors import TraceError
from t3compile.execute import execute
from t3compile.inputs import named_inputs
from t3compile.program import Program

X = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])

NON_STRICT = "torch.export, non-strict"
WARMED = "torch.export, non-strict, after one eager call"
STRICT = "torch.export, strict"
VALUES = "torch.export, non-strict, with real values beside"
MAKE_FX = "make_fx on real values"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(4, 4)


class SlicesText(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        longest = int(mask.sum(dim=1).max().item())
        return self.linear(x[:, :longest])


class GathersText(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        places = torch.nonzero(mask.flatten(), as_tuple=False).flatten()
        return self.linear(x.flatten(0, 1).index_select(0, places))


class IndexesByMask(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x[mask.bool()])


class ReadsAll(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out = self.linear(x)
        return out if mask.all() else out * mask.unsqueeze(-1)


class NumpyTable(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(6))

    def forward(self, x: Tensor) -> Tensor:
        table = np.sin(self.positions.numpy()[:, None] / np.array([1.0, 10.0, 100.0, 1000.0]))
        return self.linear(x) + torch.from_numpy(table).float()


class FillsCache(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(24.0).view(6, 4).sin()
        return self.linear(x) + self.table


class Lists(Net):
    def forward(self, parts: list[Tensor], scale: float = 1.0) -> list[Tensor]:
        return [self.linear(part) * scale for part in parts]


class Cache:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.bias = torch.ones(4)


class TakesCache(Net):
    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        assert cache is not None
        assert not cache.seen
        cache.seen.append(x)
        return self.linear(x) + cache.bias


@dataclasses.dataclass
class Output:
    sample: Tensor
    name: str = "sample"


@dataclasses.dataclass
class Condition:
    text: Tensor
    scale: float


class Dataclasses(Net):
    def forward(self, x: Tensor, condition: Condition) -> Output:
        return Output(self.linear(x) * condition.scale + condition.text)


class ReadsTimestep(Net):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        if timestep.item() > 500:
            return self.linear(x)
        return x


class WritesBuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return self.linear(x) + self.steps


class OtherInExport(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2 if torch.compiler.is_compiling() else 1)


class Random(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * random.random()


def run(program: Program) -> list[Tensor]:
    return execute(program, named_inputs(program))


def eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return module(*args, **kwargs)


def state(module: nn.Module) -> tuple[dict[str, Tensor], bool, set[str]]:
    return {name: x.clone() for name, x in module.state_dict().items()}, module.training, set(vars(module))


@pytest.mark.parametrize(
    ("module", "args", "traced_by", "frozen"),
    [
        (Lists(), ([X, X + 1], 2.0), NON_STRICT, ()),
        (SlicesText(), (X, MASK), VALUES, ("mask",)),
        (GathersText(), (X, MASK), VALUES, ("mask",)),
        (IndexesByMask(), (X, MASK), VALUES, ("mask",)),
        (ReadsAll(), (X, MASK), VALUES, ("mask",)),
        (ReadsTimestep(), (X, torch.tensor([700.0])), VALUES, ("timestep",)),
        (NumpyTable(), (X,), STRICT, ()),
        (FillsCache(), (X,), NON_STRICT, ()),
        (WritesBuffer(), (X,), NON_STRICT, ()),
        (OtherInExport(), (X,), MAKE_FX, ()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_strategies(module: nn.Module, args: tuple[Any, ...], traced_by: str, frozen: tuple[str, ...]) -> None:
    module.train()
    before = state(module)
    program = t3compile.trace(module, args)
    after = state(module)
    print(program.traced_by, program.notes, program.graph)
    assert all(torch.equal(after[0][name], x) for name, x in before[0].items())
    assert after[1:] == before[1:]
    assert program.traced_by == traced_by
