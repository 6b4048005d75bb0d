"""Compare an exported ONNX file in onnxruntime with the torch program it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from t3compile.export.compare_engine import Distance, compare_engine, compare_outputs, measure_distance
from t3compile.export.onnx_engine import OnnxEngine
from t3compile.export.rounded_weights import Round, RoundedWeights
from t3compile.program import Program
from t3compile.verification import Check


@dataclass(frozen=True)
class RoundedComparison:
    """Checks against the program with the same rounded weights (None: not comparable), distances from the program."""

    checks: tuple[Check, ...] | None
    distances: tuple[Distance, ...]


def compare_onnx(path: Path, program: Program, inputs: Mapping[str, Tensor]) -> tuple[Check, ...]:
    """compare_engine for the file in onnxruntime on the CPU."""
    return compare_engine(OnnxEngine(path), program, inputs, "onnx")


def compare_rounded(
    path: Path, program: Program, rounded: Mapping[str, Round], inputs: Mapping[str, Tensor], *, exact_products: bool
) -> RoundedComparison:
    """The file with rounded weights beside the program with the same, and its distance from the program as it was.

    Where products are rounded too, not ``exact_products``, there is nothing to check against, and distances remain.
    """
    ours = OnnxEngine(path)(**inputs)
    distances = measure_distance(ours, program, inputs)
    if not exact_products:
        return RoundedComparison(None, distances)
    same = replace(program, weights=RoundedWeights(program.weights, rounded))
    return RoundedComparison(compare_outputs(ours, same, inputs, "onnx"), distances)
