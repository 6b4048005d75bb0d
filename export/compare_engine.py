"""Compare an exported file, run in its runtime, with the torch program it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from t3compile.execute import execute
from t3compile.program import Program
from t3compile.verification import Check, CheckKind, derived_check


@dataclass(frozen=True)
class Distance:
    """How far an output is from that of the weights as they were: a figure, which nothing allows or forbids.

    ``error`` is the largest absolute difference from the float64 run, ``magnitude`` the reference's largest absolute
    value, ``relative`` the root mean square of the differences over that of the reference.
    """

    name: str
    error: float
    magnitude: float
    relative: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_engine(
    engine: Callable[..., Any], program: Program, inputs: Mapping[str, Tensor], kind: CheckKind
) -> tuple[Check, ...]:
    """One check per output: the engine on ``inputs`` (by placeholder name) against the float64 run of the graph.

    What is allowed comes from torch's own error, or from the change of the float64 result when the inputs move by one
    rounding step, if that is larger: a model that magnifies rounding does so in every runtime.
    """
    return compare_outputs(engine(**inputs), program, inputs, kind)


def measure_distance(ours: Any, program: Program, inputs: Mapping[str, Tensor]) -> tuple[Distance, ...]:
    """One distance per floating output of an engine: from the float64 run of the program."""
    exact = execute(program, inputs, float64=True)
    outputs = ours if isinstance(ours, tuple) else (ours,)
    return tuple(
        _distance(f"output {i}", _real(a.cpu()), _real(b))
        for i, (a, b) in enumerate(zip(outputs, exact, strict=True))
        if a.is_floating_point() or a.is_complex()
    )


def _distance(name: str, ours: Tensor, exact: Tensor) -> Distance:
    difference, reference = ours.double() - exact.double(), exact.double()
    relative = float(difference.square().mean().sqrt() / reference.square().mean().sqrt())
    return Distance(name, float(difference.abs().max()), float(reference.abs().max()), relative)


def compare_outputs(ours: Any, program: Program, inputs: Mapping[str, Tensor], kind: CheckKind) -> tuple[Check, ...]:
    """compare_engine for what the engine returned."""
    plain = execute(program, inputs)
    exact = execute(program, inputs, float64=True)
    moved = execute(program, _moved(inputs), float64=True)
    outputs = ours if isinstance(ours, tuple) else (ours,)
    return tuple(
        derived_check(kind, f"output {i}", _real(a.cpu()), (_real(b), _real(d)), _real(c))
        for i, (a, b, c, d) in enumerate(zip(outputs, plain, exact, moved, strict=True))
    )


def _real(x: Tensor) -> Tensor:
    """Complex [...] as real [..., 2], the form in an ONNX file."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _moved(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating inputs up or down by one rounding step of their dtype, at random, in float64."""
    generator = torch.Generator().manual_seed(0)
    moved = dict(inputs)
    for name, x in inputs.items():
        if x.is_floating_point() or x.is_complex():
            parts = _real(x)
            signs = torch.randint(0, 2, parts.shape, generator=generator).double() * 2 - 1
            wide = parts.double() * (1 + torch.finfo(x.dtype).eps * signs)
            moved[name] = torch.view_as_complex(wide) if x.is_complex() else wide
    return moved
