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

# The two runtimes order the same sums differently; each may err as much against float64 as torch does.
_FACTOR = 2.0


@dataclass(frozen=True)
class OnnxComparison:
    """Largest error of onnxruntime and of torch against the float64 run of the same graph."""

    error: float
    torch_error: float
    magnitude: float
    rounding: float

    @property
    def allowed(self) -> float:
        return _FACTOR * self.torch_error + self.rounding

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "allowed": self.allowed, "passed": self.passed}


def compare_onnx(path: Path, program: Program, inputs: Mapping[str, Tensor]) -> OnnxComparison:
    """Run ``path`` in onnxruntime on ``inputs`` (by placeholder name) and the program in torch and in float64."""
    ours = OnnxEngine(path)(**inputs)
    plain = execute(program, inputs)
    exact = execute(program, inputs, float64=True)
    outputs = ours if isinstance(ours, tuple) else (ours,)
    error = torch_error = magnitude = rounding = 0.0
    for a, b, c in zip(outputs, plain, exact, strict=True):
        assert isinstance(a, Tensor)
        error = max(error, _largest(a.double() - c))
        torch_error = max(torch_error, _largest(b.double() - c))
        magnitude = max(magnitude, _largest(c))
        rounding = max(rounding, torch.finfo(b.dtype).eps * _largest(c))
    return OnnxComparison(error, torch_error, magnitude, rounding)


def _largest(x: Tensor) -> float:
    return float(x.abs().max())
