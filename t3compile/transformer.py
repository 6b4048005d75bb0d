"""An engine in the place of a pipeline's transformer."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from t3compile.errors import InputsError
from t3compile.export.engine_inputs import Engine, EngineInput, check_shape

# These would change the original model, and the engine would not notice.
_CHANGES_MODEL = frozenset(
    {
        *("add_adapter", "enable_lora", "fuse_lora", "load_lora_adapter", "set_adapter", "set_adapters"),
        *("enable_cache", "fuse_qkv_projections", "set_attention_backend", "set_attn_processor"),
    }
)
_REMEDY = (
    "run the pipeline with the frames, height, width, batch and text length that the engine was exported for, or trace "
    "and export the model for this call (t3compile.capture records it)"
)


def as_transformer(
    engine: Engine, transformer: nn.Module, *, output_class: Callable[..., Any] | None = None
) -> EngineTransformer:
    """A module that a diffusers pipeline calls like ``transformer`` and that runs ``engine``.

    ``transformer`` is the model that the engine was exported from; its weights are not used and may be on the meta
    device. Its configuration and other attributes stay readable. ``output_class`` is what ``return_dict=True`` gives,
    by default the output class that the model's forward itself makes. See EngineTransformer for the call.
    """
    return EngineTransformer(engine, transformer, output_class or _find_output_class(transformer))


class EngineTransformer(nn.Module):
    """Runs an engine under the call signature and the attributes of the model that it was exported from.

    Tensors go to the engine's inputs by forward's names (nested ones joined by "_", as torch.export names them), cast
    to its dtypes (an InputsError where that changes a whole number or makes a finite value infinite); outputs come back
    on the device of the first tensor given, in ``dtype`` if any input was cast. A tuple, or the output class under
    ``return_dict``; models without
    ``return_dict`` return what the engine does. Arguments that the trace fixed (None, bools, numbers, text) must have
    the values of the trace: another one is an InputsError, as is another shape. Where the file does not tell them, a
    warning names each one that is not forward's default. Other objects are taken to be those of the trace.
    """

    def __init__(self, engine: Engine, transformer: nn.Module, output_class: Callable[..., Any] | None) -> None:
        super().__init__()
        # Not as a submodule: its weights are neither moved nor listed.
        self.__dict__["_original"] = transformer
        self._engine = engine
        self._output_class = output_class
        self._signature = inspect.signature(transformer.forward)
        self._warned: set[str] = set()
        device, dtype = _placement(transformer)
        # Holds no element; follows to() as a model's weights would.
        self.placement = nn.Parameter(torch.empty(0, device=device, dtype=dtype), requires_grad=False)

    @property
    def device(self) -> torch.device:
        return self.placement.device

    @property
    def dtype(self) -> torch.dtype:
        return self.placement.dtype

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            if original is None:
                raise
            value = getattr(original, name)
            return self._refusal(name) if name in _CHANGES_MODEL else value

    def extra_repr(self) -> str:
        return f"{type(self._original).__name__} in {self._engine.runtime}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self._bind(args, kwargs)
        returns_dict = given.pop("return_dict", None)
        leaves = dict(_leaves(given))
        tensors = {spec.name: leaves.pop(spec.name, None) for spec in self._engine.inputs}
        self._check_constants(leaves)
        for spec in self._engine.inputs:
            self._check_given(spec, tensors[spec.name])
        fitted = {spec.name: _cast(spec, tensors[spec.name]) for spec in self._engine.inputs}
        result = self._engine(**fitted)
        was_cast = any(fitted[name].dtype != tensors[name].dtype for name in fitted)
        device = next((tensor.device for tensor in tensors.values()), self.device)
        outputs = tuple(
            self._returned(x, device, was_cast) for x in (result if isinstance(result, tuple) else (result,))
        )
        if returns_dict:
            return self._as_output(outputs)
        if returns_dict is None and len(outputs) == 1:
            return outputs[0]
        return outputs

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The call's arguments by forward's names, defaults filled in."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputsError(f"the call does not fit {type(self._original).__name__}.forward: {error}") from None
        bound.apply_defaults()
        given: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if self._signature.parameters[name].kind == inspect.Parameter.VAR_KEYWORD:
                given.update(value)
            else:
                given[name] = value
        return given

    def _check_given(self, spec: EngineInput, value: Any) -> None:
        if not isinstance(value, Tensor):
            came = "is missing" if value is None else f"is {type(value).__name__}, not a tensor"
            raise InputsError(f"the engine's input '{spec.name}' {came}; it expects {spec}: {_REMEDY}")
        as_real = value.is_complex() and not spec.dtype.startswith("complex")
        try:
            check_shape(spec, (*value.shape, 2) if as_real else tuple(value.shape))
        except InputsError as error:
            raise InputsError(f"the call does not fit the engine: {error}; {_REMEDY}") from None

    def _check_constants(self, leaves: Mapping[str, Any]) -> None:
        """What is no input of the engine must be as in the trace."""
        frozen = self._engine.frozen
        for name, value in leaves.items():
            if isinstance(value, Tensor):
                raise InputsError(f"the engine has no input '{name}', as the trace had none: {_REMEDY}")
            parameter = self._signature.parameters.get(name)
            expected = None if parameter is None or parameter.default is parameter.empty else parameter.default
            if frozen is not None:
                expected = frozen.get(name, expected)
            if value == expected:
                continue
            if frozen is not None:
                raise InputsError(
                    f"argument '{name}' is {value!r}, and the engine was traced with {expected!r}, which cannot be "
                    "changed: trace and export the model with this value"
                )
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"argument '{name}' = {value!r} has no effect: the engine has what it was traced with, which its "
                    "file does not tell",
                    stacklevel=5,
                )
        for name, value in (frozen or {}).items():
            if name not in leaves and name != "return_dict" and value is not None:
                raise InputsError(
                    f"argument '{name}' is not given, and the engine was traced with {value!r}, which cannot be "
                    "changed: give it, or trace and export the model without it"
                )

    def _returned(self, value: Any, device: torch.device, was_cast: bool) -> Tensor:
        tensor = torch.as_tensor(value, device=device)
        return tensor.to(self.dtype) if was_cast and tensor.is_floating_point() else tensor

    def _as_output(self, outputs: tuple[Tensor, ...]) -> Any:
        if self._output_class is None:
            raise InputsError(
                f"which class {type(self._original).__name__}.forward returns cannot be told: call it with "
                "return_dict=False, or give as_transformer its output_class"
            )
        return self._output_class(*outputs)

    def _refusal(self, name: str) -> Callable[..., NoReturn]:
        def refuse(*_: Any, **__: Any) -> NoReturn:
            raise InputsError(
                f"'{name}' changes {type(self._original).__name__}, and an engine stays as it was exported: call it on "
                "the model, then trace and export it again"
            )

        return refuse


def _placement(transformer: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the model is and in which dtype; the CPU for one on the meta device."""
    first = next((parameter for parameter in transformer.parameters() if parameter.is_floating_point()), None)
    dtype = getattr(transformer, "dtype", None if first is None else first.dtype)
    device = getattr(transformer, "device", None if first is None else first.device)
    if not isinstance(device, torch.device) or device.type == "meta":
        device = torch.device("cpu")
    return device, dtype if isinstance(dtype, torch.dtype) else torch.float32


def _find_output_class(transformer: nn.Module) -> Callable[..., Any] | None:
    """The one output class that the model's forward names."""
    forward = inspect.unwrap(type(transformer).forward)
    code = getattr(forward, "__code__", None)
    if code is None:
        return None
    named = [forward.__globals__.get(name) for name in code.co_names if name.endswith("Output")]
    classes = [value for value in named if isinstance(value, type) and is_dataclass(value)]
    return classes[0] if len(classes) == 1 else None


def _leaves(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Tensors and constants with the names that torch.export gives them; other objects are left out."""
    for name, value in given.items():
        if isinstance(value, Mapping):
            yield from _leaves({f"{name}_{key}": item for key, item in value.items()})
        elif isinstance(value, list | tuple):
            yield from _leaves({f"{name}_{i}": item for i, item in enumerate(value)})
        elif value is None or isinstance(value, Tensor | bool | int | float | str):
            yield name, value


def _cast(spec: EngineInput, value: Tensor) -> Tensor:
    """The value in the input's dtype; InputsError where that changes whole numbers or makes finite values infinite."""
    dtype = getattr(torch, spec.dtype)
    if value.dtype == dtype or value.is_complex():
        return value
    cast = value.to(dtype)
    if not _holds(cast, value):
        raise InputsError(
            f"input '{spec.name}' holds {str(value.dtype).removeprefix('torch.')} values that the engine's "
            f"{spec.dtype} cannot: trace and export the model with inputs of the pipeline's dtype"
        )
    return cast


def _holds(cast: Tensor, value: Tensor) -> bool:
    real = cast.real if cast.is_complex() else cast
    if not (value.is_floating_point() and real.is_floating_point()):
        return torch.equal(real.to(value.dtype), value)
    if torch.finfo(real.dtype).max >= torch.finfo(value.dtype).max:
        return True
    return torch.equal(real.isfinite(), value.isfinite())
