"""Device buffers, a stream and CUDA graphs for an engine: torch's where torch has CUDA, else cuda-python's.

No GPU was at hand where this was written: names and signatures were checked, no call reached a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from t3compile.errors import EngineError
from t3compile.export.engine_inputs import EngineInput

Launch = Callable[[], None]


class DeviceMemory(Protocol):
    """Buffers of fixed address on one device, and the stream that all work on them runs on."""

    @property
    def stream(self) -> int:
        """The stream's handle."""
        ...

    def allocate(self, spec: EngineInput) -> int:
        """The address of a new buffer for a tensor; it lives as long as this object."""
        ...

    def run(self, given: Sequence[tuple[int, Tensor]], launch: Launch, results: Sequence[int]) -> list[Tensor]:
        """Copy tensors into buffers, launch, and return copies of other buffers: on the device, or on the CPU."""
        ...

    def capture(self, launch: Launch) -> Launch:
        """Record what ``launch`` puts on the stream as a CUDA graph; returns its replay."""
        ...

    def synchronize(self) -> None:
        """Wait for the stream."""
        ...


def open_device_memory(index: int) -> DeviceMemory:
    """Memory of a GPU; EngineError says what to install where neither torch nor cuda-python can reach it."""
    if torch.cuda.is_available():
        return TorchMemory(index)
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise EngineError(
            "running a TensorRT engine needs torch with CUDA (see pytorch.org) or the package 'cuda-python': "
            "pip install cuda-python"
        ) from None
    return CudaPythonMemory(runtime, index)


class TorchMemory:
    """torch's allocator; results stay on the device, ordered after the caller's stream and before its next work."""

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self._device)
        self._buffers: dict[int, Tensor] = {}

    @property
    def stream(self) -> int:
        return int(self._stream.cuda_stream)

    def allocate(self, spec: EngineInput) -> int:
        buffer = torch.empty(spec.fixed_shape, dtype=getattr(torch, spec.dtype), device=self._device)
        # TensorRT wants an address even of an empty tensor.
        buffer = buffer if buffer.numel() else torch.empty(1, dtype=buffer.dtype, device=self._device)
        self._buffers[buffer.data_ptr()] = buffer
        return buffer.data_ptr()

    def run(self, given: Sequence[tuple[int, Tensor]], launch: Launch, results: Sequence[int]) -> list[Tensor]:
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            for address, value in given:
                self._buffers[address].copy_(value)
                if value.is_cuda:
                    value.record_stream(self._stream)
            launch()
            outputs = [self._buffers[address].clone() for address in results]
        caller.wait_stream(self._stream)
        for output in outputs:
            output.record_stream(caller)
        return outputs

    def capture(self, launch: Launch) -> Launch:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            launch()
        return graph.replay

    def synchronize(self) -> None:
        self._stream.synchronize()


class CudaPythonMemory:
    """cuda-python's runtime API, for a torch without CUDA: tensors come from and go to the CPU."""

    def __init__(self, runtime: Any, index: int) -> None:
        self._runtime = runtime
        self._specs: dict[int, EngineInput] = {}
        self._executables: list[Any] = []
        self._call("cudaSetDevice", index)
        self._stream = self._call("cudaStreamCreate")

    @property
    def stream(self) -> int:
        return int(self._stream)

    def allocate(self, spec: EngineInput) -> int:
        bytes_needed = torch.empty(spec.fixed_shape, dtype=getattr(torch, spec.dtype), device="meta").nbytes
        address = int(self._call("cudaMalloc", max(bytes_needed, 1)))
        self._specs[address] = spec
        return address

    def run(self, given: Sequence[tuple[int, Tensor]], launch: Launch, results: Sequence[int]) -> list[Tensor]:
        kinds = self._runtime.cudaMemcpyKind
        held = [(address, value.contiguous()) for address, value in given]
        for address, value in held:
            to_device = kinds.cudaMemcpyHostToDevice
            self._call("cudaMemcpyAsync", address, value.data_ptr(), value.nbytes, to_device, self._stream)
        launch()
        outputs = []
        for address in results:
            spec = self._specs[address]
            output = torch.empty(spec.fixed_shape, dtype=getattr(torch, spec.dtype))
            to_host = kinds.cudaMemcpyDeviceToHost
            self._call("cudaMemcpyAsync", output.data_ptr(), address, output.nbytes, to_host, self._stream)
            outputs.append(output)
        self.synchronize()
        return outputs

    def capture(self, launch: Launch) -> Launch:
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            launch()
        except BaseException:
            # A capture that failed must end all the same, and its own error says less than the launch's.
            status, graph = self._runtime.cudaStreamEndCapture(self._stream)
            if int(status) == 0:
                self._runtime.cudaGraphDestroy(graph)
            raise
        graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            executable = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._runtime.cudaGraphDestroy(graph)
        self._executables.append(executable)
        return lambda: self._call("cudaGraphLaunch", executable, self._stream)

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)

    def __del__(self) -> None:
        for executable in self.__dict__.get("_executables", ()):
            self._runtime.cudaGraphExecDestroy(executable)
        for address in self.__dict__.get("_specs", {}):
            self._runtime.cudaFree(address)
        if "_stream" in self.__dict__:
            self._runtime.cudaStreamDestroy(self._stream)

    def _call(self, name: str, *args: Any) -> Any:
        status, *values = getattr(self._runtime, name)(*args)
        if int(status) != 0:
            _, text = self._runtime.cudaGetErrorString(status)
            raise EngineError(f"{name} failed: {text.decode() if isinstance(text, bytes) else text}")
        return values[0] if values else None
