"""Program -> AOTInductor package: compiled code and weights in one .pt2 archive that torch alone loads."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t3compile.errors import ExportError, first_line
from t3compile.export.engine_inputs import program_inputs, program_output_names
from t3compile.export.processor import instruction_sets
from t3compile.files import staged_outputs
from t3compile.inputs import frozen_arguments, substitute_inputs
from t3compile.ops import WINDOW_ATTENTION
from t3compile.program import Program, copy_exported, quiet_torch

# The entry of a package's metadata that t3compile reads back, as JSON.
AOTI_PROPERTY = "t3compile"
# The package, the linked library and the object file of the weights are on the disk at once.
_COPIES_OF_WEIGHTS = 3


def check_compiler() -> str:
    """The C++ compiler that torch uses; ExportError when there is none that runs."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler: str = get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ExportError(
            "no C++ compiler was found, and AOTInductor compiles the model with one: install g++ (apt install g++), or "
            "name another in the environment variable CXX"
        ) from None
    return compiler


def write_aoti(program: Program, path: Path) -> None:
    """Compile for this machine's CPU and write ``path``, beside first, then renamed.

    The program must be free of t3 operators, so that the package runs without t3compile. Inputs keep the strides of
    the trace, except that what repeats elements in memory becomes contiguous. ExportError where there is no C++
    compiler, or where torch cannot compile the graph. Nothing is left in torch's cache.
    """
    if any(node.target is WINDOW_ATTENTION for node in program.graph.nodes):
        raise ExportError("the program holds t3::window_attention, which an AOTInductor package cannot: lower it first")
    check_compiler()
    example = _example_tensors(program)
    exported = copy_exported(program.with_weights())
    exported.example_inputs = substitute_inputs(program, example)
    with staged_outputs(path, needed_bytes=_COPIES_OF_WEIGHTS * program.weight_bytes) as stage:
        # torch insists on the suffix; the staged name must be the final one.
        target = stage / f"{path.name}.pt2"
        _compile(exported, target, {AOTI_PROPERTY: json.dumps(_metadata(program, example))})
        target.rename(stage / path.name)


def _compile(exported: Any, target: Path, metadata: Mapping[str, str]) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.utils import fresh_cache

    # Compiling once gains nothing from precompiled headers.
    options = {"aot_inductor.metadata": dict(metadata), "aot_inductor.precompile_headers": False}
    with tempfile.TemporaryDirectory(dir=target.parent) as cache, quiet_torch(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # A cache of its own: it holds the weights too, and goes when the block ends.
            with fresh_cache(dir=cache), torch.no_grad():
                aoti_compile_and_package(exported, package_path=str(target), inductor_configs=options)
        except Exception as error:
            raise ExportError(
                f"torch cannot compile the program: {type(error).__name__}: {first_line(error)}"
            ) from error


def _example_tensors(program: Program) -> dict[str, Tensor]:
    """Zeros of every input's traced shape, dtype and strides: compiled code reads them by these strides."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    return {spec.name: _zeros(values[spec.name]) for spec in program_inputs(program)}


def _zeros(traced: Tensor) -> Tensor:
    if any(stride == 0 and length > 1 for stride, length in zip(traced.stride(), traced.shape, strict=True)):
        return torch.zeros(traced.shape, dtype=traced.dtype)
    return torch.empty_strided(traced.shape, traced.stride(), dtype=traced.dtype).zero_()


def _metadata(program: Program, example: Mapping[str, Tensor]) -> dict[str, Any]:
    inputs = [
        {
            "name": spec.name,
            "shape": list(spec.shape),
            "dtype": spec.dtype,
            "strides": list(example[spec.name].stride()),
        }
        for spec in program_inputs(program)
    ]
    return {
        "inputs": inputs,
        "outputs": list(program_output_names(program)),
        "frozen": frozen_arguments(program),
        "plan": None if program.plan is None else program.plan.to_json(),
        "torch": torch.__version__,
        "processor": list(instruction_sets()),
    }
