"""build_kernels: from a preset, plan, ONNX file or model to a folder of PTX."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from t3compile.errors import ModelFileError
from t3compile.export.assemble_ptx import ARCHITECTURES
from t3compile.export.kernel_set import KernelSet, build_kernel_set, check_folder
from t3compile.export.kernel_sources import (
    GivenNumbers,
    KernelSource,
    keys_of_onnx,
    keys_of_plan,
    keys_of_preset,
    keys_of_program,
)
from t3compile.loading.recognize import MODEL_KINDS
from t3compile.pipeline import load_program
from t3compile.plan import Plan
from t3compile.presets import PRESETS, preset_named
from t3compile.program import Program
from t3compile.progress import SILENT, Progress


def build_kernels(
    source: str | Path | Program,
    output: str | Path,
    *,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    batch: int | None = None,
    heads: int | None = None,
    head_dim: int | None = None,
    architectures: Sequence[int] | None = None,
    assemble: bool = True,
    progress: Progress = SILENT,
) -> KernelSet:
    """Compile the window attention kernels of a source to PTX, without a GPU, and write the folder ``output``.

    ``source`` is a preset's name, an exported .onnx, a plan's .json, or a rewritten model (a Program or its file). The
    numbers complete presets (default: bfloat16, batch 1, the preset's model) and plans (``heads`` and ``head_dim``
    are needed); an .onnx and a model have their own. ``architectures``: compute capabilities that ptxas has to
    assemble each kernel for (default: 80, 86, 89, 90, 100, 120); without ``assemble`` the gates that need ptxas do not
    run, and the result says so. Needs triton. KernelError names the pattern, tile and gate that fails.
    """
    folder = Path(output)
    check_folder(folder)
    given = GivenNumbers(dtype, batch, heads, head_dim)
    kernels = build_kernel_set(
        _kernel_source(source, given),
        architectures=ARCHITECTURES if architectures is None else tuple(architectures),
        assemble=assemble,
        progress=progress,
    )
    progress(f"writing {folder}")
    kernels.write(folder)
    return kernels


def check_source(source: str | Path) -> None:
    """Raise ModelFileError, which names all that a source can be, where this is no preset, file, folder or factory."""
    known = [preset.name for preset in PRESETS]
    if source not in known and ":" not in str(source) and not os.path.lexists(source):
        raise ModelFileError(
            f"there is no '{source}'; give a preset ({', '.join(known)}), an exported .onnx, a plan's .json, or a "
            f"model: {MODEL_KINDS}"
        )


def _kernel_source(source: str | Path | Program, given: GivenNumbers) -> KernelSource:
    if isinstance(source, Program):
        return keys_of_program(source, "the program", given)
    if source in [preset.name for preset in PRESETS]:
        return keys_of_preset(preset_named(str(source)), given)
    path = Path(source)
    if path.suffix == ".json":
        return keys_of_plan(Plan.read(path), str(path), given)
    if path.suffix == ".onnx":
        return keys_of_onnx(path, given)
    check_source(source)
    return keys_of_program(load_program(path), str(path), given)
