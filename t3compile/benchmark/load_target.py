"""A file as a call without arguments, in the process that measures it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from t3compile.benchmark.messages import LoadRequest
from t3compile.export.engine_inputs import EngineInput, program_inputs
from t3compile.export.runtimes import load
from t3compile.inputs import bind_inputs, read_inputs
from t3compile.program import Program
from t3compile.stopwatch import CudaEvents, Stopwatch, WallClock

_SEED = 0
_ENGINES = {"aoti": "aoti", "trt": "tensorrt"}


@dataclass(frozen=True)
class Target:
    """What is called, how it is timed, what its runtime says of itself, and whether that keeps memory between calls."""

    call: Callable[[], tuple[Tensor, ...]]
    stopwatch: Stopwatch
    runtime: str
    notes: tuple[str, ...] = ()
    keeps_memory: bool = False


def load_target(request: LoadRequest) -> Target:
    """Load a file that write_target wrote; inputs are made or read once and stay where the runtime takes them."""
    if request.runtime in ("torch", "compile"):
        return _load_torch(request)
    return _load_engine(request)


def stopwatch_for(runtime: str, device: str) -> Stopwatch:
    """CUDA events where torch itself runs on a GPU; engines have streams and copies of their own: the wall clock."""
    return CudaEvents() if device == "cuda" and runtime in ("torch", "compile") else WallClock()


def _load_torch(request: LoadRequest) -> Target:
    # Here, so that the process of another runtime holds nothing of it.
    from t3compile.loading import load_program

    program = load_program(request.path, weights=list(request.weights) or None)
    program, module = module_on(program, request.device)
    if request.runtime == "compile":
        module = torch.compile(module)
    named = _inputs(request, program_inputs(program), request.device)
    args, kwargs = bind_inputs(program, named)

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            result = module(*args, **kwargs)
        return tuple(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))

    name = {"torch": "torch eager", "compile": "torch.compile"}[request.runtime]
    return Target(call, stopwatch_for(request.runtime, request.device), f"{name}, {request.device}")


def module_on(program: Program, device: str) -> tuple[Program, Callable[..., Any]]:
    """The program's module with weights, constants and the devices that its calls name on ``device``."""
    if device == "cpu":
        return program, program.module()
    from torch.export.passes import move_to_device_pass

    module: Callable[..., Any] = move_to_device_pass(program.with_weights(), device).module()
    return program, module


def _load_engine(request: LoadRequest) -> Target:
    name = f"onnxruntime-{request.device}" if request.runtime == "ort" else _ENGINES[request.runtime]
    # Its neighbours in this process stand for layers of one model, which share their memory too.
    keeps_memory = request.runtime == "ort" and request.device == "cpu"
    options: dict[str, Any] = {"shares_memory": True} if keeps_memory else {}
    # Trusted: just written by the process that asks.
    engine = load(Path(request.path), name, trust_code=True, **options)
    # TensorRT takes tensors where they lie; the others copy to the host, which is then part of every call.
    device = request.device if request.runtime == "trt" else "cpu"
    named = _inputs(request, engine.inputs, device)

    def call() -> tuple[Tensor, ...]:
        result = engine(**named)
        return result if isinstance(result, tuple) else (result,)

    return Target(
        call, stopwatch_for(request.runtime, request.device), engine.runtime, tuple(engine.notes), keeps_memory
    )


def _inputs(request: LoadRequest, specs: tuple[EngineInput, ...], device: str) -> Mapping[str, Tensor]:
    if request.inputs is None:
        return _seeded_inputs(specs, device)
    named = read_inputs(Path(request.inputs))
    return {name: tensor.to(device) for name, tensor in named.items()}


@functools.cache
def _seeded_inputs(specs: tuple[EngineInput, ...], device: str) -> Mapping[str, Tensor]:
    """The same tensors for every file that takes the same: q, k and v of a large grid are gigabytes."""
    generator = torch.Generator(device).manual_seed(_SEED)
    return {spec.name: _seeded(spec, generator, device) for spec in specs}


def _seeded(spec: EngineInput, generator: torch.Generator, device: str) -> Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if spec.name == "mask":
        visible = torch.ones if dtype == torch.bool else torch.zeros
        return visible(spec.fixed_shape, dtype=dtype, device=device)
    return torch.randn(spec.fixed_shape, generator=generator, dtype=dtype, device=device)
