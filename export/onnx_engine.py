"""Load an ONNX file in onnxruntime and call it like the model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor

from t3compile.errors import EngineError, MissingExtraError, MissingKernelError, first_line
from t3compile.export.engine_inputs import (
    FROZEN_PROPERTY,
    EngineInput,
    bind_engine_inputs,
    check_tensor,
    read_frozen,
)
from t3compile.export.onnx_file import check_onnx_file
from t3compile.export.runtimes import (
    BEST_FIRST,
    CPU_PROVIDER,
    CUDA_PROVIDER,
    ONNXRUNTIMES,
    TENSORRT_PROVIDER,
    Runtime,
)

# onnxruntime's names of dtypes -> torch's.
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int16)": "int16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
_BFLOAT16 = "tensor(bfloat16)"
_INSTALL = {
    CPU_PROVIDER: "pip install 't3compile[cpu]'",
    CUDA_PROVIDER: "pip uninstall -y onnxruntime && pip install 't3compile[gpu]'",
    TENSORRT_PROVIDER: "pip uninstall -y onnxruntime && pip install 't3compile[gpu,tensorrt]'",
}


class OnnxEngine:
    """An ONNX file in onnxruntime, on the CPU unless ``runtime`` names another provider.

    Call it with tensors (of any device) or arrays, by position or by input name. Complex inputs [...] are given to the
    file as real [..., 2]; complex outputs come back so. Inputs and outputs pass through host memory, so a call has
    ended when it returns. Returns torch tensors on the CPU when an input is one or an output is bfloat16, else numpy
    arrays: the only output, or a tuple of them.

    ``runtime`` is a name of export/runtimes.py; "onnxruntime" takes the best provider that starts and says in ``notes``
    which did not. A provider chosen by name that is missing or does not start is an EngineError, where onnxruntime
    itself would go on with the CPU. ``provider_options`` go to the wanted provider. How a GPU
    provider is chosen is tested; a run on one is not.

    On the CPU the memory that a call took stays the engine's until it is deleted, so that the next call need not find
    its own. With ``shares_memory`` it is that of all such engines of the process, which are called in turns, and stays
    the process's.
    """

    def __init__(
        self,
        path: str | Path,
        runtime: str = "onnxruntime-cpu",
        *,
        provider_options: Mapping[str, str] | None = None,
        shares_memory: bool = False,
    ) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtraError("onnxruntime", "cpu", "running an ONNX file") from None
        path = Path(path)
        check_onnx_file(path)
        self._path = path
        options = _session_options(onnxruntime, shares_memory)
        self._session, self.runtime, self.notes = _start(onnxruntime, options, path, runtime, provider_options or {})
        self.inputs = tuple(_engine_input(value) for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())
        self.frozen = read_frozen(self._session.get_modelmeta().custom_metadata_map.get(FROZEN_PROPERTY))
        values = (*self._session.get_inputs(), *self._session.get_outputs())
        self._passes_bfloat16 = any(value.type == _BFLOAT16 for value in values)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = bind_engine_inputs(self.inputs, args, kwargs)
        tensors = {spec.name: check_tensor(spec, given[spec.name]).cpu() for spec in self.inputs}
        try:
            outputs = self._run_values(tensors) if self._passes_bfloat16 else self._run(tensors)
        except Exception as error:
            raise EngineError(f"onnxruntime cannot run '{self._path}': {first_line(error)}") from error
        if not self._passes_bfloat16 and not any(isinstance(value, Tensor) for value in given.values()):
            outputs = [output.numpy() for output in outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _run(self, tensors: Mapping[str, Tensor]) -> list[Any]:
        outputs = self._session.run(None, {name: tensor.numpy() for name, tensor in tensors.items()})
        return [torch.from_numpy(output) for output in outputs]

    def _run_values(self, tensors: Mapping[str, Tensor]) -> list[Any]:
        """bfloat16, which numpy does not have, goes in and out through dlpack."""
        from onnxruntime import OrtValue

        values = {
            name: OrtValue.from_dlpack(tensor.contiguous())
            if tensor.dtype == torch.bfloat16
            else OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())
            for name, tensor in tensors.items()
        }
        outputs = self._session.run_with_ort_values(None, values)
        return [
            torch.utils.dlpack.from_dlpack(output).cpu()
            if output.data_type() == _BFLOAT16
            else torch.from_numpy(output.numpy())
            for output in outputs
        ]


def _session_options(onnxruntime: Any, shares_memory: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; warnings are about its own optimisations
    # A pattern is one block beside what the first call took: on a CPU memory is held twice, and no time gained.
    options.enable_mem_pattern = False
    if shares_memory:
        _register_shared_arena(onnxruntime)
        options.add_session_config_entry("session.use_env_allocators", "1")
    return options


@functools.cache
def _register_shared_arena(onnxruntime: Any) -> None:
    kind, place = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
    memory = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, place)
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg({}))


def _start(
    onnxruntime: Any, options: Any, path: Path, name: str, provider_options: Mapping[str, str]
) -> tuple[Any, str, tuple[str, ...]]:
    """A session with the wanted provider, or the best that starts; which runtime that is, and which did not start."""
    available = onnxruntime.get_available_providers()
    notes: list[str] = []
    candidates = _candidates(name, available)
    for runtime in candidates:
        wanted = runtime.providers[0]
        providers: list[Any] = [provider for provider in runtime.providers if provider in available]
        if provider_options:
            providers[0] = (wanted, dict(provider_options))
        is_last = runtime is candidates[-1]
        try:
            # Without its fallback, which prints to stdout and goes on with the CPU.
            session = onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
        except Exception as error:
            if is_last:
                kind = MissingKernelError if "NOT_IMPLEMENTED" in str(error) else EngineError
                raise kind(f"onnxruntime cannot load '{path}' in {wanted}: {first_line(error)}") from error
            notes.append(f"onnxruntime cannot load '{path}' in {wanted} and takes the next one: {first_line(error)}")
            continue
        started = session.get_providers()
        if wanted in started:
            return session, runtime.name, tuple(notes)
        if is_last:
            raise EngineError(
                f"runtime '{runtime.name}' was chosen, and onnxruntime could not start {wanted} on this machine (it "
                f"would have gone on with {', '.join(started)}): an NVIDIA GPU, its driver and the provider's "
                "libraries are needed, and onnxruntime's log names what is missing; or choose runtime onnxruntime-cpu"
            )
        notes.append(f"onnxruntime has {wanted} and could not start it on this machine: the next one is taken")
    raise AssertionError("a runtime has at least one candidate")


def _candidates(name: str, available: Sequence[str]) -> list[Runtime]:
    """The runtimes to try in order; EngineError where onnxruntime was not built with the provider."""
    known = {runtime.name: runtime for runtime in ONNXRUNTIMES}
    names = BEST_FIRST if name == "onnxruntime" else (name,)
    candidates = [known[one] for one in names if known[one].providers[0] in available]
    if not candidates:
        wanted = known[names[-1]].providers[0]
        raise EngineError(
            f"runtime '{name}' needs onnxruntime's {wanted}, and the installed onnxruntime has only "
            f"{', '.join(available) or 'none'}: {_INSTALL[wanted]}"
        )
    return candidates


def _engine_input(value: Any) -> EngineInput:
    if value.type not in DTYPES:
        raise EngineError(f"input '{value.name}' has type {value.type}, which torch cannot hold")
    shape = tuple("?" if length is None else length for length in value.shape)
    return EngineInput(value.name, shape, DTYPES[value.type])
