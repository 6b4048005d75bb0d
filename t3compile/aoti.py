"""Program -> AOTInductor package, written and compared with torch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from t3compile.files import check_writable
from t3compile.inputs import named_inputs
from t3compile.ops.lowered_attention import HEAD_GROUPS, lowered_window_attention
from t3compile.passes.lower_window_attention import LowerWindowAttention
from t3compile.pipeline import ExportReport, in_precision, too_large_to_compare
from t3compile.program import Program
from t3compile.progress import SILENT, Progress


def export_aoti(
    program: Program,
    path: str | Path,
    *,
    precision: Literal["float32", "float16"] | None = None,
    check: bool | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Write an AOTInductor package; see export_aoti_report."""
    return Path(export_aoti_report(program, path, precision=precision, check=check, progress=progress).path)


def export_aoti_report(
    program: Program,
    path: str | Path,
    *,
    precision: Literal["float32", "float16"] | None = None,
    check: bool | None = None,
    progress: Progress = SILENT,
) -> ExportReport:
    """Compile a program, rewritten or not, for this machine's CPU; torch alone loads and runs the package.

    ``precision`` is that of pipeline.export_onnx_report. ``check`` loads the package, which runs its code, and compares
    it with torch; None does so unless the model is too large. ExportError where there is no C++ compiler.
    """
    from t3compile.export.write_aoti import check_compiler, write_aoti

    path = Path(path)
    check_writable(path)
    check_compiler()
    in_groups = partial(lowered_window_attention, head_groups=HEAD_GROUPS)
    program = LowerWindowAttention(in_groups)(in_precision(program, precision)).program
    progress(f"compiling {path.name}")
    write_aoti(program, path)
    report = ExportReport(str(path), (), None, "switched off")
    if check is False:
        return report
    if check is None and (reason := too_large_to_compare(program)):
        return replace(report, not_compared=reason)
    from t3compile.export.aoti_engine import AotiEngine
    from t3compile.export.compare_engine import compare_engine

    progress("comparing the package with torch")
    comparison = compare_engine(AotiEngine(path, trust_code=True), program, named_inputs(program), "aoti", progress)
    return replace(report, comparison=comparison, not_compared="")
