"""Compare an exported ONNX file in onnxruntime with the torch program it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from t3compile.execute import run_work
from t3compile.export.compare_engine import (
    Distance,
    compare_engine,
    compare_outputs,
    comparison_work,
    measure_distance,
)
from t3compile.export.onnx_engine import OnnxEngine
from t3compile.export.rounded_weights import Round, RoundedWeights
from t3compile.macs import graph_macs
from t3compile.program import Program
from t3compile.progress import SILENT, Progress
from t3compile.verification import Check


@dataclass(frozen=True)
class RoundedComparison:
    """Checks against the program with the same rounded weights (None: not comparable), distances from the program."""

    checks: tuple[Check, ...] | None
    distances: tuple[Distance, ...]


def compare_onnx(
    path: Path, program: Program, inputs: Mapping[str, Tensor], progress: Progress = SILENT
) -> tuple[Check, ...]:
    """compare_engine for the file in onnxruntime on the CPU."""

    def call_once(**given: Tensor) -> Any:
        # The engine keeps the memory of a call as long as it lives, and torch's runs follow.
        return OnnxEngine(path)(**given)

    return compare_engine(call_once, program, inputs, "onnx", progress)


def compare_rounded(
    path: Path,
    program: Program,
    rounded: Mapping[str, Round],
    inputs: Mapping[str, Tensor],
    *,
    exact_products: bool,
    progress: Progress = SILENT,
) -> RoundedComparison:
    """The file with rounded weights beside the program with the same, and its distance from the program as it was.

    Where products are rounded too, not ``exact_products``, there is nothing to check against, and distances remain.
    """
    macs = graph_macs(program.graph)
    work = macs + run_work(program, float64=True) + (comparison_work(program) if exact_products else 0)
    with progress.measure(work, "MACs") as advance:
        ours = OnnxEngine(path)(**inputs)
        advance(macs)
        distances = measure_distance(ours, program, inputs, advance)
        if not exact_products:
            return RoundedComparison(None, distances)
        same = replace(program, weights=RoundedWeights(program.weights, rounded))
        return RoundedComparison(compare_outputs(ours, same, inputs, "onnx", advance), distances)
