"""Model file -> model repository of Triton Inference Server: config.pbtxt and the model under its version.

Written by the server's documented model configuration; no server has loaded such a repository here.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from t3compile.errors import EngineError, ExportError, OutputError
from t3compile.export.engine_inputs import EngineInput
from t3compile.export.engine_manifest import (
    MANIFEST_SUFFIX,
    EngineManifest,
    check_engine_hash,
    manifest_path,
    read_manifest,
)
from t3compile.export.onnx_file import check_onnx_file, external_tensors
from t3compile.export.triton_config import DATA_TYPES, InstanceKind, ServedTensor, ServerConfig
from t3compile.files import staged_folder
from t3compile.loading.recognize import TENSORRT_MAGIC

Device = Literal["auto", "cpu", "gpu"]
Accelerator = Literal["cuda", "tensorrt"]

ONNX_FILE = "model.onnx"
PLAN_FILE = "model.plan"

_KINDS: dict[Device, InstanceKind] = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}
# Types of a TensorRT engine's inputs and outputs that the server's backend knows.
_TENSORRT_TYPES = ("float32", "float16", "bfloat16", "int8", "uint8", "int32", "int64", "bool")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
_PRECISION_MODES = {ir.DataType.FLOAT16: "FP16", ir.DataType.BFLOAT16: "BF16"}


@dataclass(frozen=True)
class Deployment:
    """A model in a repository: its folder and version, the configuration, and whether its files are hard links."""

    path: Path
    version: int
    config: ServerConfig
    linked: bool

    def to_json(self) -> dict[str, Any]:
        config = self.config
        tensors = {
            side: [{"name": one.name, "data_type": one.data_type, "dims": list(one.dims)} for one in given]
            for side, given in (("inputs", config.inputs), ("outputs", config.outputs))
        }
        return {
            "path": str(self.path),
            "version": self.version,
            "backend": config.backend,
            "file": config.file_name,
            "kind": config.kind,
            "instances": config.instances,
            "accelerator": config.accelerator or None,
            **tensors,
            "notes": list(config.notes),
            "linked": self.linked,
        }


@dataclass(frozen=True)
class _Source:
    """What a model file brings: its tensors, where its files go in the version's folder, and an engine's manifest."""

    inputs: tuple[ServedTensor, ...]
    outputs: tuple[ServedTensor, ...]
    files: tuple[tuple[Path, str], ...]
    notes: tuple[str, ...]
    precision_mode: str = ""
    engine: EngineManifest | None = None

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path, _ in self.files)


def deploy_triton_server(
    model: str | Path,
    repository: str | Path,
    *,
    name: str | None = None,
    version: int = 1,
    instances: int = 1,
    device: Device = "auto",
    accelerator: Accelerator | None = None,
    link: bool = False,
    force: bool = False,
) -> Deployment:
    """Write ``repository``/``name``/config.pbtxt and ``repository``/``name``/``version``/model.onnx or model.plan.

    ``model`` is an ONNX file (onnxruntime backend; its external data goes along under its own name) or a TensorRT
    engine with its manifest ``model``.manifest.json beside it (tensorrt backend), told by content. ``name`` defaults
    to the file's stem. ``device`` "auto" lets the server take a GPU where it has one; an engine always needs one.
    ``accelerator`` is the execution provider of ONNX Runtime on a GPU: "cuda", the default, or "tensorrt". Files are
    copies, or with ``link`` hard links where the file system allows (the onnx package refuses weights in a file that
    has several links, the model's own too). A model of that name is
    replaced only with ``force``, and its other versions stay, if lower.

    Raises EngineError for a file that is neither or not what its manifest describes, ExportError for what the server
    cannot serve, OutputError where the repository cannot be written or holds the model.
    """
    model, repository = Path(model), Path(repository)
    name = model.stem if name is None else name
    _check_options(name, version, instances, device)
    if os.path.lexists(repository) and not repository.is_dir():
        raise OutputError(f"cannot write '{repository}': it is in the way; give a folder, or a name that is free")
    if _is_tensorrt_engine(model):
        source = _read_tensorrt_engine(model)
        config = _tensorrt_config(source, name, instances, device, accelerator)
    else:
        source = _read_onnx(model)
        config = _onnxruntime_config(source, name, instances, device, accelerator)
    target = repository / name
    _check_versions(target, version, force)
    if source.engine is not None:
        # After all that takes no time.
        check_engine_hash(model, source.engine)
    linked = _write(source, config, target, version, link)
    return Deployment(target, version, config, linked)


def _check_options(name: str, version: int, instances: int, device: Device) -> None:
    if not _NAME.fullmatch(name):
        raise ExportError(
            f"'{name}' cannot be a model's name: give --name with letters, digits, '_', '-' or '.', a letter or digit "
            "first, at most 200"
        )
    if device not in _KINDS:
        raise ExportError(f"device '{device}' is unknown; known: {', '.join(_KINDS)}")
    for what, value in (("version", version), ("instances", instances)):
        if value < 1:
            raise ExportError(f"{what} is {value}, expected 1 or more")


# --- what a model file takes and gives -----------------------------------------------------------


def _is_tensorrt_engine(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) in TENSORRT_MAGIC


def _read_onnx(path: Path) -> _Source:
    check_onnx_file(path)
    model = ir.load(path)
    graph = model.graph
    given = [value for value in graph.inputs if value.name not in graph.initializers]
    folder = path.resolve().parent
    files = {ONNX_FILE: path.resolve()}
    for tensor in external_tensors(model):
        location = os.path.normpath(str(tensor.location))
        if ".." in Path(str(tensor.location)).parts:
            raise EngineError(f"'{path}' refers to external data as '{tensor.location}', not by a plain path below it")
        if location == ONNX_FILE:
            raise ExportError(
                f"'{path}' keeps its weights in a file named '{ONNX_FILE}', the model's own name in a repository: "
                "export it again under another name"
            )
        files[location] = (folder / location).resolve()
    scalars = [value.name for value in given if value.shape is not None and len(value.shape) == 0]
    notes = tuple(f"'{name}' is a scalar: requests send it with shape [1]" for name in scalars)
    dtypes = {value.dtype for value in graph.initializers.values()}
    # The lower one: TensorRT must be allowed to compute in it at all.
    modes = [mode for dtype, mode in _PRECISION_MODES.items() if dtype in dtypes]
    return _Source(
        inputs=tuple(_onnx_tensor(value, "input") for value in given),
        outputs=tuple(_onnx_tensor(value, "output") for value in graph.outputs),
        files=tuple((source, name) for name, source in files.items()),
        notes=notes,
        precision_mode=modes[0] if modes else "",
    )


def _onnx_tensor(value: ir.Value, side: str) -> ServedTensor:
    if not isinstance(value.type, ir.TensorType):
        raise ExportError(f"{side} '{value.name}' is {value.type}, and Triton Inference Server serves tensors alone")
    if value.shape is None:
        raise ExportError(f"{side} '{value.name}' has no shape in the ONNX file, and the server needs its rank")
    dims = tuple(dim if isinstance(dim, int) else -1 for dim in value.shape)
    # The backend gives a tensor of one element to a scalar input, and a configuration must have dims.
    return _served(str(value.name), side, _dtype_name(value.type.dtype), dims or (1,))


def _dtype_name(dtype: ir.DataType) -> str:
    """numpy's name; ONNX's own for strings and for what has no type."""
    if dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        return dtype.name.lower()
    return dtype.numpy().name


def _served(name: str, side: str, dtype: str, dims: tuple[int, ...]) -> ServedTensor:
    if dtype not in DATA_TYPES:
        hint = "; give it as real numbers [..., 2]" if dtype.startswith("complex") else ""
        raise ExportError(
            f"{side} '{name}' has dtype {dtype}, for which Triton Inference Server has no data type{hint}; it knows "
            f"{', '.join(DATA_TYPES)}"
        )
    if 0 in dims:
        raise ExportError(f"{side} '{name}' has shape {list(dims)}, and the server refuses empty tensors")
    return ServedTensor(name, DATA_TYPES[dtype], dims)


def _read_tensorrt_engine(path: Path) -> _Source:
    manifest = read_manifest(path)
    if manifest.stripped:
        raise ExportError(
            f"'{path}' has no weights (--strip-weights), and the server cannot put them in: build the engine with them"
        )
    notes = [
        f"built for TensorRT {manifest.tensorrt_version} and compute capability {manifest.compute_capability}: the "
        "server needs the same"
    ]
    if manifest.weight_streaming:
        notes.append("weight streaming is off in the server, whose backend sets no budget: all weights stay on the GPU")
    files = ((path.resolve(), PLAN_FILE), (manifest_path(path).resolve(), PLAN_FILE + MANIFEST_SUFFIX))
    inputs, outputs = (
        tuple(_engine_tensor(tensor, side) for tensor in tensors)
        for side, tensors in (("input", manifest.inputs), ("output", manifest.outputs))
    )
    return _Source(inputs, outputs, files, tuple(notes), engine=manifest)


def _engine_tensor(tensor: EngineInput, side: str) -> ServedTensor:
    if tensor.dtype in DATA_TYPES and tensor.dtype not in _TENSORRT_TYPES:
        raise ExportError(
            f"{side} '{tensor.name}' has dtype {tensor.dtype}, which the server's tensorrt backend does not know"
        )
    if not tensor.shape:
        raise ExportError(
            f"{side} '{tensor.name}' is a scalar, which the server's tensorrt backend cannot serve: build the engine "
            "from a model that takes it with shape [1], or deploy the .onnx"
        )
    return _served(tensor.name, side, tensor.dtype, tensor.fixed_shape)


# --- how it is served ----------------------------------------------------------------------------


def _onnxruntime_config(
    source: _Source, name: str, instances: int, device: Device, accelerator: Accelerator | None
) -> ServerConfig:
    if device == "cpu" and accelerator is not None:
        raise ExportError(f"the accelerator '{accelerator}' needs a GPU: give --device gpu or auto")
    chosen = "" if device == "cpu" else accelerator or "cuda"
    precise = chosen == "tensorrt" and source.precision_mode
    return ServerConfig(
        name=name,
        backend="onnxruntime",
        file_name=ONNX_FILE,
        inputs=source.inputs,
        outputs=source.outputs,
        kind=_KINDS[device],
        instances=instances,
        accelerator=chosen,
        accelerator_parameters=(("precision_mode", source.precision_mode),) if precise else (),
        # As export/onnx_engine.py has it.
        parameters=(("enable_mem_pattern", "0"),),
        notes=source.notes,
    )


def _tensorrt_config(
    source: _Source, name: str, instances: int, device: Device, accelerator: Accelerator | None
) -> ServerConfig:
    if device == "cpu":
        raise ExportError("a TensorRT engine runs on a GPU alone: give --device gpu, or deploy the .onnx")
    if accelerator is not None:
        raise ExportError(f"the accelerator '{accelerator}' is for .onnx files; a TensorRT engine takes none")
    return ServerConfig(
        name=name,
        backend="tensorrt",
        file_name=PLAN_FILE,
        inputs=source.inputs,
        outputs=source.outputs,
        kind="KIND_GPU",
        instances=instances,
        notes=source.notes,
    )


# --- the repository ------------------------------------------------------------------------------


def _check_versions(target: Path, version: int, force: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise OutputError(f"'{target}' is in the way: it is not a model's folder; remove it, or give another --name")
    known = sorted(int(entry.name) for entry in target.iterdir() if entry.is_dir() and entry.name.isdecimal())
    if not force:
        holds = f", with version {', '.join(map(str, known))}" if known else ""
        raise OutputError(f"the repository has a model '{target.name}' already{holds}: give --force or another --name")
    if known and known[-1] > version:
        raise OutputError(
            f"the repository has version {known[-1]} of '{target.name}', which the server takes before {version}: "
            f"give --version {known[-1] + 1}, or remove it"
        )


def _write(source: _Source, config: ServerConfig, target: Path, version: int, link: bool) -> bool:
    """Make the model's folder beside and rename it; whether all files are hard links."""
    repository = target.parent
    made = not repository.exists()
    try:
        if made:
            repository.mkdir()
        same_disk = all(path.stat().st_dev == repository.stat().st_dev for path, _ in source.files)
        needed = 0 if same_disk and link else source.size_bytes
    except OSError as error:
        raise OutputError(f"cannot write '{target}': {error.strerror} ('{error.filename}')") from None
    try:
        with staged_folder(target, beside=_stage_place(repository), needed_bytes=needed) as stage:
            if target.is_dir():
                _keep_other_versions(target, stage, version)
            folder = stage / str(version)
            folder.mkdir()
            linked = [_place(path, folder / name, link) for path, name in source.files]
            (stage / "config.pbtxt").write_text(config.to_pbtxt(), encoding="utf-8")
    except BaseException:
        if made:
            repository.rmdir()
        raise
    return all(linked)


def _stage_place(repository: Path) -> Path:
    """Beside the repository where that can be renamed from: a polling server takes every folder in it for a model."""
    parent = repository.resolve().parent
    beside = os.access(parent, os.W_OK) and parent.stat().st_dev == repository.stat().st_dev
    return parent if beside else repository


def _keep_other_versions(old: Path, stage: Path, version: int) -> None:
    for entry in old.iterdir():
        if entry.name in (str(version), "config.pbtxt"):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, stage / entry.name, symlinks=True, copy_function=_place)
        else:
            _place(entry, stage / entry.name)


def _place(source: str | Path, target: str | Path, link: bool = True) -> bool:
    """Hard link, where that can be, or copy a file; whether it is a link."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            pass  # another file system, or one without links: the copy says what is really wrong
        else:
            return True
    shutil.copy2(source, target, follow_symlinks=False)
    return False
