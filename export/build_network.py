"""One TensorRT build: parse, configure, build to a file, and look at the layers that came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from t3compile.errors import EngineError, OutputError
from t3compile.export.build_progress import Phases, make_progress_monitor, run_cancellable
from t3compile.export.cuda_device import CudaDevice
from t3compile.export.engine_inputs import EngineInput
from t3compile.export.engine_layers import AttentionNode, LayerCheck, check_layers
from t3compile.export.tensorrt_api import Messages, TensorRT, make_logger
from t3compile.export.tensorrt_network import parse_network
from t3compile.export.tensorrt_session import deserialize, read_tensors
from t3compile.export.timing_cache import set_timing_cache, write_timing_cache
from t3compile.progress import Progress

OPT_LEVELS = range(6)


@dataclass(frozen=True)
class BuildSettings:
    """What TensorRT's builder is told.

    ``workspace_bytes`` bounds its scratch memory on the GPU (None: all of it), ``timing_cache`` is a file that is
    read and written, ``weight_streaming`` lets weights stay in host memory, ``strip_weights`` leaves them out of the
    engine, to be refitted from the same ONNX file, ``opt_level`` is 0 (fast build) to 5, None for TensorRT's default.
    """

    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    weight_streaming: bool = False
    strip_weights: bool = False
    opt_level: int | None = None

    def __post_init__(self) -> None:
        if self.opt_level is not None and self.opt_level not in OPT_LEVELS:
            raise EngineError(f"optimisation level {self.opt_level} is unknown; give 0 (fast build) to 5")
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise EngineError(f"a workspace of {self.workspace_bytes} bytes is none; give a size such as 4GiB")

    def to_json(self) -> dict[str, Any]:
        cache = None if self.timing_cache is None else str(self.timing_cache)
        return {**asdict(self), "timing_cache": cache}


@dataclass(frozen=True)
class Built:
    """A built engine: its file, the ONNX file it was parsed from, and what the inspector says."""

    engine: Path
    source: Path
    inputs: tuple[EngineInput, ...]
    outputs: tuple[EngineInput, ...]
    layers_json: str
    check: LayerCheck
    tf32: bool
    notes: tuple[str, ...]
    lowering: str = "native"


def build_network(
    tensorrt: TensorRT,
    device: CudaDevice,
    onnx: Path,
    engine: Path,
    nodes: Sequence[AttentionNode],
    settings: BuildSettings,
    progress: Progress,
) -> Built:
    """Build the ONNX file ``onnx`` into the file ``engine``.

    Plugins must be registered before. EngineError with TensorRT's reason where it fails.
    """
    messages = Messages()
    logger = make_logger(tensorrt.module, messages)
    notes, tf32 = _build(tensorrt, device, onnx, engine, settings, progress, logger, messages)
    progress("inspecting the engine")
    inputs, outputs, layers = _inspect(tensorrt, engine, logger, messages)
    return Built(engine, onnx, inputs, outputs, layers, check_layers(layers, nodes), tf32, tuple(notes))


def _build(
    tensorrt: TensorRT,
    device: CudaDevice,
    onnx: Path,
    engine: Path,
    settings: BuildSettings,
    progress: Progress,
    logger: Any,
    messages: Messages,
) -> tuple[list[str], bool]:
    """Write the engine; notes, and whether TF32 was allowed. What the builder held is free again afterwards."""
    trt = tensorrt.module
    # The parser takes some standard operators from TensorRT's own plugins.
    trt.init_libnvinfer_plugins(logger, "")
    builder = trt.Builder(logger)
    # The parser holds the weights until the engine is built.
    network, parser = parse_network(tensorrt, builder, onnx, logger, messages)
    config = builder.create_builder_config()
    notes = _configure(tensorrt, config, settings)
    phases = Phases(progress)
    monitor = make_progress_monitor(trt, phases)
    config.progress_monitor = monitor

    def build() -> None:
        _use_device(device)
        _write_engine(tensorrt, builder, network, config, engine, messages)

    run_cancellable(build, phases)
    if settings.timing_cache is not None:
        try:
            write_timing_cache(config, settings.timing_cache)
        except OutputError as error:
            # The engine is finished and worth more than the cache.
            notes.append(f"the timing cache was not kept: {error}")
    tf32 = bool(int(config.flags) & tensorrt.flags("BuilderFlag", ("TF32",)))
    del parser
    return notes, tf32


def _configure(tensorrt: TensorRT, config: Any, settings: BuildSettings) -> list[str]:
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(tensorrt.member("MemoryPoolType", "WORKSPACE"), settings.workspace_bytes)
    if settings.opt_level is not None:
        config.builder_optimization_level = settings.opt_level
    config.profiling_verbosity = tensorrt.member("ProfilingVerbosity", "DETAILED")
    flags = []
    if settings.strip_weights:
        # Identical weights alone may be put back, which leaves every optimisation open.
        flags += ["STRIP_PLAN", "REFIT_IDENTICAL"]
    if settings.weight_streaming:
        flags += ["WEIGHT_STREAMING"]
    for name in flags:
        config.set_flag(tensorrt.member("BuilderFlag", name))
    if settings.timing_cache is None:
        return []
    return list(set_timing_cache(config, settings.timing_cache))


def _use_device(device: CudaDevice) -> None:
    """The current device belongs to a thread."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(device.index)


# In every version from 10.13 on: the engine is never held in memory as well.
def _write_engine(
    tensorrt: TensorRT, builder: Any, network: Any, config: Any, engine: Path, messages: Messages
) -> None:
    with engine.open("wb") as file:
        writer = make_stream_writer(tensorrt.module, file)
        done = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.failure is not None:
        raise writer.failure
    if not done or engine.stat().st_size == 0:
        raise EngineError(f"TensorRT {tensorrt.version_text} cannot build the engine: {messages.last_error}")


def make_stream_writer(trt: Any, file: Any) -> Any:
    """TensorRT's view of an open file; it is given bytes and tells how many it wrote."""

    class FileWriter(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.failure: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return int(file.write(data))
            except OSError as error:
                # TensorRT would only print it.
                self.failure = error
                return 0

    return FileWriter()


def _inspect(
    tensorrt: TensorRT, path: Path, logger: Any, messages: Messages
) -> tuple[tuple[EngineInput, ...], tuple[EngineInput, ...], str]:
    engine, runtime = deserialize(tensorrt, path, logger, messages)
    inspector = engine.create_engine_inspector()
    text = str(inspector.get_engine_information(tensorrt.member("LayerInformationFormat", "JSON")))
    inputs, outputs = read_tensors(tensorrt, engine)
    del inspector, engine, runtime
    return inputs, outputs, text
