"""What an engine takes, and the check of what it is given: names, shapes and dtypes, whatever runtime runs it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.export.graph_signature import OutputKind, TensorArgument

from t3compile.errors import InputsError
from t3compile.export.name_inputs import name_inputs
from t3compile.program import Program, user_input_names

# The entry of a file's metadata with the arguments that the trace fixed, as JSON by forward's names.
FROZEN_PROPERTY = "t3compile_frozen"


@dataclass(frozen=True)
class EngineInput:
    """Name, shape and dtype of one input; the dtype is torch's name for it ("float32", "bfloat16", "bool").

    A length that the file leaves open is text, its name there.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    @property
    def fixed_shape(self) -> tuple[int, ...]:
        """The shape where no length is open, as in an engine; ValueError otherwise."""
        return tuple(int(size) for size in self.shape)

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.dtype}"


class Engine(Protocol):
    """An exported file, loaded: call it with tensors or arrays, by position or by input name.

    ``runtime`` is what was chosen; ``notes`` say what the user should know of the choice, one sentence each;
    ``frozen`` are the arguments that the trace fixed, by forward's names, None where the file does not tell.
    """

    @property
    def runtime(self) -> str: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    @property
    def inputs(self) -> tuple[EngineInput, ...]: ...

    @property
    def output_names(self) -> tuple[str, ...]: ...

    @property
    def frozen(self) -> Mapping[str, object] | None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The only output, or a tuple of them. InputsError names the input, what came and what is expected."""


def program_inputs(program: Program) -> tuple[EngineInput, ...]:
    """The inputs of a program as its placeholders were traced."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    return tuple(
        EngineInput(name, tuple(values[name].shape), str(values[name].dtype).removeprefix("torch."))
        for name in user_input_names(program.exported)
    )


def program_output_names(program: Program) -> tuple[str, ...]:
    """ "output", or "output_0", "output_1", ... of several."""
    specs = program.exported.graph_signature.output_specs
    count = sum(spec.kind == OutputKind.USER_OUTPUT and isinstance(spec.arg, TensorArgument) for spec in specs)
    return ("output",) if count == 1 else tuple(f"output_{i}" for i in range(count))


def list_inputs(specs: Sequence[EngineInput]) -> str:
    """The inputs on one line, for messages."""
    return ", ".join(map(str, specs))


def bind_engine_inputs(specs: Sequence[EngineInput], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every input's value by name, in the order of ``specs``; shapes and dtypes are not looked at.

    InputsError for too many, one given twice, an unknown or a missing one.
    """
    expected = list_inputs(specs)
    known = [spec.name for spec in specs]
    named = name_inputs(args, kwargs, known, expected)
    for name in named:
        if name not in known:
            raise InputsError(f"unknown input '{name}'; the model's inputs are {expected}")
    for spec in specs:
        if spec.name not in named:
            raise InputsError(f"input '{spec.name}' is missing; the model's inputs are {expected}")
    return {name: named[name] for name in known}


def check_tensor(spec: EngineInput, value: Any) -> Tensor:
    """``value`` as a torch tensor of the input's dtype and shape, where it lies; InputsError otherwise.

    A complex value [...] for a real input [..., 2] is given as its real and imaginary parts.
    """
    tensor = value.detach() if isinstance(value, Tensor) else _tensor_of(spec, value)
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_complex() and not spec.dtype.startswith("complex"):
        tensor = torch.view_as_real(tensor)
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype != spec.dtype:
        raise InputsError(f"input '{spec.name}' has dtype {dtype}, expected {spec.dtype}")
    check_shape(spec, tuple(tensor.shape))
    return tensor


def read_frozen(text: str | None) -> dict[str, object] | None:
    """The entry FROZEN_PROPERTY; None where a file has none, or nothing that can be read."""
    try:
        frozen = json.loads(text or "null")
    except ValueError:
        return None
    return frozen if isinstance(frozen, dict) else None


def check_shape(spec: EngineInput, shape: tuple[int, ...]) -> None:
    """Raise InputsError unless ``shape`` is the input's."""
    fits = len(shape) == len(spec.shape) and all(
        isinstance(want, str) or want == got for want, got in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        raise InputsError(f"input '{spec.name}' has shape {list(shape)}, expected {list(spec.shape)}")


def _tensor_of(spec: EngineInput, value: Any) -> Tensor:
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":  # of the package ml_dtypes, which torch does not know
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind not in "biufc" or array.dtype.name in ("longdouble", "float128", "complex256"):
        kind = str(array.dtype) if isinstance(value, np.ndarray) else type(value).__name__
        raise InputsError(f"input '{spec.name}' is {kind}, expected a tensor or an array of {spec.dtype}")
    # torch knows neither negative strides, nor other byte orders, nor arrays that must not be written.
    is_plain = array.dtype.isnative and array.flags.writeable and all(step >= 0 for step in array.strides)
    return torch.from_numpy(array if is_plain else np.array(array, dtype=array.dtype.newbyteorder("=")))
