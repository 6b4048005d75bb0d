"""A deserialized TensorRT engine with its buffers: what a call and a measurement run.

No engine was run where this was written: TensorRT and GPUs were missing.
"""

from __future__ import annotations

import mmap
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t3compile.errors import EngineError
from t3compile.export.cuda_memory import DeviceMemory, Launch, open_device_memory
from t3compile.export.engine_inputs import EngineInput
from t3compile.export.tensorrt_api import TORCH_DTYPES, Messages, TensorRT, make_logger

_WARM_UPS, _TIMED = 3, 10


def deserialize(tensorrt: TensorRT, path: Path, logger: Any, messages: Messages) -> tuple[Any, Any]:
    """The engine of a file, and its runtime, which must live as long. The file is mapped, not read."""
    trt = tensorrt.module
    runtime = trt.Runtime(logger)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            engine = runtime.deserialize_cuda_engine(mapped)
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot read the engine '{path}': {error}") from None
    if engine is None:
        raise EngineError(f"TensorRT {tensorrt.version_text} cannot load '{path}': {messages.last_error}")
    return engine, runtime


def read_tensors(tensorrt: TensorRT, engine: Any) -> tuple[tuple[EngineInput, ...], tuple[EngineInput, ...]]:
    """Inputs and outputs of an engine, in its order."""
    sides: dict[bool, list[EngineInput]] = {True: [], False: []}
    taken = tensorrt.member("TensorIOMode", "INPUT")
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        dtype = engine.get_tensor_dtype(name).name
        if dtype not in TORCH_DTYPES:
            raise EngineError(f"tensor '{name}' of the engine has type {dtype}, which torch does not have")
        spec = EngineInput(name, tuple(map(int, engine.get_tensor_shape(name))), TORCH_DTYPES[dtype])
        sides[engine.get_tensor_mode(name) == taken].append(spec)
    return tuple(sides[True]), tuple(sides[False])


def refit(tensorrt: TensorRT, engine: Any, onnx: Path, logger: Any, messages: Messages) -> None:
    """Put the weights of an ONNX file into a stripped engine; EngineError names the parser's errors or what is left."""
    trt = tensorrt.module
    refitter = trt.Refitter(engine, logger)
    parser_refitter = trt.OnnxParserRefitter(refitter, logger)
    done = parser_refitter.refit_from_file(str(onnx))
    errors = [parser_refitter.get_error(i).desc() for i in range(parser_refitter.num_errors)]
    missing = list(refitter.get_missing_weights())
    if missing:
        some = ", ".join(missing[:5])
        errors.append(f"'{onnx.name}' has no values for {len(missing)} weights of the engine ({some})")
    if errors or not done or not refitter.refit_cuda_engine():
        reasons = "; ".join(errors) or messages.last_error
        raise EngineError(f"the engine cannot take its weights from '{onnx}': {reasons}")


class TensorRTSession:
    """An engine ready to run: weights in place, a buffer for every input and output, perhaps a CUDA graph.

    ``weight_streaming_budget`` is how many bytes of weights stay on the device, None for TensorRT's own choice; it is
    read only where ``streams`` says that the engine was built to stream. Calls from several threads take turns: all
    share the buffers.
    """

    def __init__(
        self,
        tensorrt: TensorRT,
        path: Path,
        device_index: int,
        *,
        refit_from: Path | None = None,
        streams: bool = False,
        weight_streaming_budget: int | None = None,
        cuda_graph: bool = False,
    ) -> None:
        messages = Messages()
        self._messages = messages
        self._lock = threading.Lock()
        self._logger = make_logger(tensorrt.module, messages)
        # Before TensorRT allocates: the device's context must be the one that the buffers are in.
        self._memory: DeviceMemory = open_device_memory(device_index)
        engine, self._runtime = deserialize(tensorrt, path, self._logger, messages)
        if refit_from is not None:
            refit(tensorrt, engine, refit_from, self._logger, messages)
        self.weight_streaming_budget: int | None = None
        if streams:
            budget = weight_streaming_budget
            # Only before the first context.
            engine.weight_streaming_budget_v2 = (
                engine.get_weight_streaming_automatic_budget() if budget is None else budget
            )
            self.weight_streaming_budget = int(engine.weight_streaming_budget_v2)
        self.inputs, self.outputs = read_tensors(tensorrt, engine)
        context = engine.create_execution_context()
        if context is None:
            raise EngineError(f"TensorRT has no memory to run '{path}': {messages.last_error}")
        self._engine, self._context = engine, context
        self._addresses = {spec.name: self._memory.allocate(spec) for spec in (*self.inputs, *self.outputs)}
        for name, address in self._addresses.items():
            if not context.set_tensor_address(name, address):
                raise EngineError(f"TensorRT refuses the buffer of '{name}': {messages.last_error}")
        self._replay: Launch | None = None
        if cuda_graph:
            # TensorRT allocates and updates its state in the first call, which a capture cannot hold.
            self._memory.run([(self._addresses[s.name], _sample(s)) for s in self.inputs], self._enqueue, ())
            self._memory.synchronize()
            self._replay = self._memory.capture(self._enqueue)

    def run(self, given: Mapping[str, Tensor]) -> list[Tensor]:
        """Outputs in the engine's order, for inputs by name of the engine's shapes and dtypes."""
        pairs = [(self._addresses[name], value) for name, value in given.items()]
        with self._lock:
            return self._memory.run(pairs, self._launch, [self._addresses[spec.name] for spec in self.outputs])

    def time(self) -> float:
        """Median seconds of a launch, inputs and outputs left on the device."""
        given = [(self._addresses[spec.name], _sample(spec)) for spec in self.inputs]
        with self._lock:
            self._memory.run(given, self._launch, ())
            return statistics.median(self._timed_launches())

    def _timed_launches(self) -> Sequence[float]:
        times = []
        for _ in range(_WARM_UPS + _TIMED):
            self._memory.synchronize()
            start = time.perf_counter()
            self._memory.run((), self._launch, ())
            self._memory.synchronize()
            times.append(time.perf_counter() - start)
        return times[_WARM_UPS:]

    def _launch(self) -> None:
        (self._replay or self._enqueue)()

    def _enqueue(self) -> None:
        context = self._context
        if not context.execute_async_v3(self._memory.stream):
            raise EngineError(f"TensorRT cannot run the engine: {self._messages.last_error}")


def _sample(spec: EngineInput) -> Tensor:
    """Seeded values: normal for floats, zero for the rest, which may be indices."""
    dtype = getattr(torch, spec.dtype)
    if not dtype.is_floating_point:
        return torch.zeros(spec.fixed_shape, dtype=dtype)
    return torch.randn(spec.fixed_shape, generator=torch.Generator().manual_seed(0)).to(dtype)
