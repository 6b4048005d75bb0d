"""A live module with or without inputs -> Program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from t3compile.errors import ModelFileError
from t3compile.inputs import call_inputs
from t3compile.program import Program
from t3compile.tracing import trace

_ACCEPTED = "an nn.Module, (module, args[, kwargs]), or a dict with module, args and kwargs"


def trace_made(made: object, source: str, where: str, inputs: Mapping[str, Tensor] | None) -> Program:
    """Trace a module, ``(module, args[, kwargs])`` or such a dict, in eval mode.

    `inputs` go before the example inputs that came with the module. `where` starts every message.
    """
    module, args, kwargs = _split(made, where)
    if inputs is not None:
        args, kwargs = call_inputs(module, inputs, source)
    elif not args and not kwargs:
        # Refuses, unless forward needs nothing.
        args, kwargs = call_inputs(module, {}, source)
    return trace(module.eval(), args, kwargs, source=source)


def _split(made: object, where: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    if isinstance(made, dict):
        unknown = sorted(str(key) for key in set(made) - {"module", "args", "kwargs"})
        if "module" not in made or unknown:
            found = ", ".join(sorted(map(str, made))[:8])
            raise ModelFileError(f"{where} gives a dict with the keys {found}; expected {_ACCEPTED}")
        parts = (made["module"], made.get("args", ()), made.get("kwargs", {}))
    elif isinstance(made, tuple) and 2 <= len(made) <= 3:
        parts = (made[0], made[1], made[2] if len(made) == 3 else {})
    else:
        parts = (made, (), {})
    module, args, kwargs = parts
    args = (args,) if isinstance(args, Tensor) else args
    if not isinstance(module, nn.Module):
        raise ModelFileError(f"{where} gives {type(module).__name__}; expected {_ACCEPTED}")
    if not isinstance(args, tuple | list) or not isinstance(kwargs, Mapping):
        raise ModelFileError(
            f"{where} gives args of type {type(args).__name__} and kwargs of type "
            f"{type(kwargs).__name__}; "
            f"expected {_ACCEPTED}"
        )
    return module, tuple(args), dict(kwargs)
