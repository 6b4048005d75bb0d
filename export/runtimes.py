"""Which runtimes there are, which file each runs, and what a file is; nothing heavy is imported before it is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from t3compile.errors import EngineError, T3CompileError

if TYPE_CHECKING:
    from t3compile.export.engine_inputs import Engine

FileKind = Literal["onnx", "pt2", "aoti", "tensorrt"]

KIND_TEXT: dict[FileKind, str] = {
    "onnx": "an ONNX model",
    "pt2": "a torch.export .pt2 archive",
    "aoti": "an AOTInductor package",
    "tensorrt": "a TensorRT engine",
}


@dataclass(frozen=True)
class Runtime:
    """A way to run one kind of file; ``providers`` are onnxruntime's, the wanted one first."""

    name: str
    kind: FileKind
    providers: tuple[str, ...] = ()


CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
TENSORRT_PROVIDER = "TensorrtExecutionProvider"

# Operations that a GPU provider lacks run on the next one, so each is followed by those that it may leave work to.
ONNXRUNTIMES: tuple[Runtime, ...] = (
    Runtime("onnxruntime-cpu", "onnx", (CPU_PROVIDER,)),
    Runtime("onnxruntime-cuda", "onnx", (CUDA_PROVIDER, CPU_PROVIDER)),
    Runtime("onnxruntime-tensorrt", "onnx", (TENSORRT_PROVIDER, CUDA_PROVIDER, CPU_PROVIDER)),
)
# What "onnxruntime" takes, best first. The TensorRT provider builds an engine at every load, which takes minutes for
# a large model: it is for those who name it.
BEST_FIRST: tuple[str, ...] = ("onnxruntime-cuda", "onnxruntime-cpu")

RUNTIMES: tuple[Runtime, ...] = (
    Runtime("onnxruntime", "onnx"),
    *ONNXRUNTIMES,
    Runtime("torch", "pt2"),
    Runtime("aoti", "aoti"),
    Runtime("tensorrt", "tensorrt"),
)
RUNTIME_NAMES: tuple[str, ...] = ("auto", *(runtime.name for runtime in RUNTIMES))
_DEFAULT: dict[FileKind, str] = {"onnx": "onnxruntime", "pt2": "torch", "aoti": "aoti", "tensorrt": "tensorrt"}


def find_runtime(name: str, kind: FileKind, path: Path) -> Runtime:
    """The runtime of that name, or under "auto" the one for the file's kind; EngineError where they do not fit."""
    if name == "auto":
        name = _DEFAULT[kind]
    found = {runtime.name: runtime for runtime in RUNTIMES}.get(name)
    if found is None:
        raise EngineError(f"runtime '{name}' is unknown; known: {', '.join(RUNTIME_NAMES)}")
    if found.kind != kind:
        fitting = ", ".join(runtime.name for runtime in RUNTIMES if runtime.kind == kind)
        raise EngineError(
            f"'{path}' is {KIND_TEXT[kind]}, which runtime '{name}' cannot run; choose auto, or one of: {fitting}"
        )
    return found


def recognize_file(path: Path) -> FileKind:
    """What an exported file is, told by content. EngineError for a folder, a missing file, or any other kind."""
    from t3compile.loading.recognize import TENSORRT_MAGIC, is_aoti_package, looks_like_onnx, recognize

    if path.is_dir():
        raise EngineError(f"'{path}' is a folder; give a file that 't3compile export' wrote")
    if not path.is_file():
        raise EngineError(f"'{path}' does not exist; give a file that 't3compile export' wrote")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise EngineError(f"cannot read '{path}': {error.strerror or error}; give a readable file") from None
    if head.startswith(TENSORRT_MAGIC):
        return "tensorrt"
    if looks_like_onnx(head):
        return "onnx"
    if is_aoti_package(path):
        return "aoti"
    with suppress(T3CompileError):
        if recognize(path).kind == "pt2":
            return "pt2"
    kinds = ", ".join(KIND_TEXT[kind] for kind in get_args(FileKind))
    raise EngineError(
        f"'{path}' is not a file of a kind that can be run ({kinds}), or is damaged; export it again, or copy it again"
    )


def load(
    path: Path, name: str, *, trust_code: bool = False, weights: Sequence[Path] | None = None, **options: Any
) -> Engine:
    """The engine of a file in the named runtime; ``options`` are the engine class's own. See pipeline.load_engine."""
    if name not in RUNTIME_NAMES:
        raise EngineError(f"runtime '{name}' is unknown; known: {', '.join(RUNTIME_NAMES)}")
    runtime = find_runtime(name, recognize_file(path), path)
    if weights and runtime.kind != "pt2":
        raise EngineError(f"'{path}' is {KIND_TEXT[runtime.kind]}, to which --weights cannot be applied; leave it out")
    match runtime.kind:
        case "onnx":
            from t3compile.export.onnx_engine import OnnxEngine

            return _make(OnnxEngine, runtime, options, path, runtime.name)
        case "pt2":
            from t3compile.export.torch_engine import TorchEngine
            from t3compile.loading import load_program

            return _make(TorchEngine, runtime, options, load_program(path, weights=weights))
        case "aoti":
            from t3compile.export.aoti_engine import AotiEngine

            return _make(AotiEngine, runtime, options, path, trust_code)
        case "tensorrt":
            from t3compile.export.tensorrt_engine import TensorRTEngine

            return _make(TensorRTEngine, runtime, options, path)


def _make(engine: Callable[..., Engine], runtime: Runtime, options: Mapping[str, Any], *args: Any) -> Engine:
    taken = signature(engine).parameters
    for option in options:
        if option not in taken:
            raise EngineError(f"runtime '{runtime.name}' has no option '{option}'")
    return engine(*args, **options)
