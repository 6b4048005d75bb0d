"""The call convention of every engine: inputs by position or by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from t3compile.errors import InputsError


def name_inputs(args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str], expected: str) -> dict[str, Any]:
    """Positional and named inputs as one mapping; names are not checked further.

    ``expected`` lists the inputs for messages. InputsError for too many, or one given twice.
    """
    if len(args) > len(names):
        raise InputsError(f"{len(args)} inputs were given, the model has {len(names)}: {expected}")
    named = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name in named:
            raise InputsError(f"input '{name}' is given twice, by position and by name")
        named[name] = value
    return named
