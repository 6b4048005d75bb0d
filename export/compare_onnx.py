"""Compare an exported ONNX file in onnxruntime with the torch program it came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from t3compile.export.compare_engine import compare_engine
from t3compile.export.onnx_engine import OnnxEngine
from t3compile.program import Program
from t3compile.progress import SILENT, Progress
from t3compile.verification import Check


def compare_onnx(
    path: Path, program: Program, inputs: Mapping[str, Tensor], progress: Progress = SILENT
) -> tuple[Check, ...]:
    """compare_engine for the file in onnxruntime on the CPU."""
    return compare_engine(OnnxEngine(path), program, inputs, "onnx", progress)
