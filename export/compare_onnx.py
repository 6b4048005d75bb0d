"""Compare an exported ONNX file in onnxruntime with the torch program it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t3compile.execute import execute
from t3compile.export.onnx_engine import OnnxEngine
from t3compile.program import Program
from t3compile.verification import allowed_error, worst


@dataclass(frozen=True)
class OnnxComparison:
    """Largest error of onnxruntime against the float64 run of the same graph, and what is allowed.

    ``plain_error`` is the larger of torch's own error and the change of the float64 result when the inputs move by
    one rounding step: a model that magnifies rounding does so in every runtime.
    """

    error: float
    plain_error: float
    magnitude: float
    rounding: float

    @property
    def allowed(self) -> float:
        return allowed_error(self.plain_error, self.rounding, self.magnitude)

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "allowed": self.allowed, "passed": self.passed}


def compare_onnx(path: Path, program: Program, inputs: Mapping[str, Tensor]) -> OnnxComparison:
    """Run ``path`` in onnxruntime on ``inputs`` (by placeholder name), the program in torch and, twice, in float64."""
    ours = OnnxEngine(path)(**inputs)
    plain = execute(program, inputs)
    exact = execute(program, inputs, float64=True)
    moved = execute(program, _moved(inputs), float64=True)
    outputs = ours if isinstance(ours, tuple) else (ours,)
    error = plain_error = magnitude = rounding = 0.0
    for a, b, c, d in zip(outputs, plain, exact, moved, strict=True):
        assert isinstance(a, Tensor)
        error = worst(error, _largest(a.double() - c))
        plain_error = max(plain_error, _largest(b.double() - c), _largest(d - c))
        magnitude = max(magnitude, _largest(c))
        rounding = max(rounding, torch.finfo(b.dtype).eps * _largest(c))
    return OnnxComparison(error, plain_error, magnitude, rounding)


def _moved(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating inputs up or down by one rounding step of their dtype, at random, in float64."""
    generator = torch.Generator().manual_seed(0)
    moved = dict(inputs)
    for name, x in inputs.items():
        if x.is_floating_point():
            signs = torch.randint(0, 2, x.shape, generator=generator).double() * 2 - 1
            moved[name] = x.double() * (1 + torch.finfo(x.dtype).eps * signs)
    return moved


def _largest(x: Tensor) -> float:
    return float(x.abs().max())
