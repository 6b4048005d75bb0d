"""A program as the file that a runtime loads; what cannot run here says so before any work."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from t3compile.aoti import export_aoti
from t3compile.benchmark.messages import LoadRequest
from t3compile.benchmark.names import Device, RuntimeName
from t3compile.building import build_engine
from t3compile.errors import EngineError, MissingExtraError
from t3compile.export.write_aoti import check_compiler
from t3compile.inputs import named_inputs
from t3compile.pipeline import export_onnx
from t3compile.program import Program

_SUFFIX: dict[RuntimeName, str] = {"torch": ".pt2", "compile": ".pt2", "ort": ".onnx", "aoti": ".aoti", "trt": ".plan"}


def check_runtime(runtime: RuntimeName, device: Device) -> None:
    """Raise T3CompileError where a runtime cannot be measured on this machine and device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise EngineError("torch sees no CUDA device on this machine: measure with --device cpu")
    if runtime in ("compile", "aoti") and device == "cpu":
        check_compiler()
    if runtime == "aoti" and device == "cuda":
        raise EngineError("AOTInductor packages are compiled for the CPU: measure them with --device cpu")
    if runtime == "ort" and find_spec("onnxruntime") is None:
        raise MissingExtraError("onnxruntime", "cpu" if device == "cpu" else "gpu", "measuring onnxruntime")
    if runtime == "trt":
        from t3compile.export.build_engine import PURPOSE
        from t3compile.export.tensorrt_api import load_tensorrt_and_device

        load_tensorrt_and_device(PURPOSE)


def write_target(
    program: Program, name: str, folder: Path, runtime: RuntimeName, device: Device, inputs: Path | None
) -> LoadRequest:
    """Write a program for a runtime into ``folder``, once for runtimes that load the same file.

    Weights that lie in safetensors files are referred to where the file can. Raises T3CompileError.
    """
    path = folder / f"{name}{_SUFFIX[runtime]}"
    extents = program.external_weights()
    weights: tuple[str, ...] = ()
    match runtime:
        case "torch" | "compile":
            weights = tuple(sorted({str(extent.file.path.parent) for extent in extents.values()}))
            if not path.exists():
                program.save(path, external=bool(extents))
        case "ort":
            # The form that its measured rule chooses, for every variant; the rule is for CPUs.
            form: Literal["auto", "attention"] = "auto" if device == "cpu" else "attention"
            export_onnx(program, path, form=form, share_weights=bool(extents), check=False)
        case "aoti":
            export_aoti(program, path, check=False)
        case "trt":
            build_engine(program, path)
    return LoadRequest(name, str(path), runtime, device, None if inputs is None else str(inputs), weights)


def write_inputs(program: Program, path: Path) -> Path:
    """The program's example inputs, by the names that every runtime knows them by; InputsError without any."""
    torch.save({name: tensor.contiguous() for name, tensor in named_inputs(program).items()}, path)
    return path
