"""From a program or an ONNX file to a TensorRT engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from t3compile.errors import ExportError
from t3compile.files import check_writable, scratch_folder
from t3compile.pipeline import export_onnx_report
from t3compile.program import Program
from t3compile.progress import SILENT, Progress

if TYPE_CHECKING:
    from t3compile.export.build_engine import EngineReport
    from t3compile.export.build_network import BuildSettings


def build_engine(
    source: Program | str | Path,
    path: str | Path,
    *,
    precision: Literal["float32", "float16", "bfloat16"] | None = None,
    attention: Literal["auto", "plugin", "native"] = "auto",
    settings: BuildSettings | None = None,
    progress: Progress = SILENT,
) -> EngineReport:
    """Build a TensorRT engine at ``path`` from a program, rewritten or not, or from an exported ONNX file.

    A program is exported first, in ``precision``; for a file that must be the precision it computes in (None: as it
    is), as TensorRT's networks are strongly typed. See export.build_engine for the rest. Needs TensorRT 10.13, 10.15
    or newer and an NVIDIA GPU: EngineError names what is missing before any work. ExportError for a program without
    weights in the engine, which could not be refitted: its ONNX file would not be kept.
    """
    from t3compile.export.build_engine import PURPOSE
    from t3compile.export.build_engine import build_engine as build_from_onnx
    from t3compile.export.tensorrt_api import load_tensorrt_and_device

    path = Path(path)
    if isinstance(source, Program):
        check_refittable(settings)
    check_writable(path)
    load_tensorrt_and_device(PURPOSE)
    if not isinstance(source, Program):
        return build_from_onnx(
            Path(source), path, precision=precision, attention=attention, settings=settings, progress=progress
        )
    with scratch_folder(path.parent, path.name) as folder:
        onnx = folder / f"{path.stem}.onnx"
        report = export_onnx_report(source, onnx, precision=precision, check=False, progress=progress)
        built = build_from_onnx(onnx, path, attention=attention, settings=settings, progress=progress)
    return built.with_notes(report.notes)


def check_refittable(settings: BuildSettings | None) -> None:
    """Raise ExportError where a program's engine would be without weights: no ONNX file is kept to take them from."""
    if settings is not None and settings.strip_weights:
        raise ExportError(
            "an engine without weights takes them from its ONNX file: export the model with 't3compile export' and "
            "build from that file"
        )
