"""``package.module:factory`` -> Program."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from t3compile.errors import ModelFileError, first_line
from t3compile.loading.trace_made import trace_made
from t3compile.program import Program


def load_factory(name: str, *, inputs: Mapping[str, Tensor] | None = None) -> Program:
    """Import the module (the current folder counts, as with ``python -m``), call the factory, trace
    what it made.

    The factory returns an nn.Module, ``(module, args[, kwargs])``, or a dict with module, args and
    kwargs.
    """
    module_name, _, attributes = name.partition(":")
    with current_folder_importable():
        try:
            target: object = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ModelFileError(
                f"factory '{name}': no module named '{error.name}'; run from its folder or install its package"
            ) from None
        except (Exception, SystemExit) as error:
            raise ModelFileError(
                f"factory '{name}': importing '{module_name}' raised {type(error).__name__}: "
                f"{first_line(error)}; mend the module"
            ) from error
        for attribute in attributes.split("."):
            if not hasattr(target, attribute):
                raise ModelFileError(
                    f"factory '{name}': '{module_name}' has no attribute '{attributes}'; check the name"
                )
            target = getattr(target, attribute)
        if not callable(target):
            raise ModelFileError(
                f"factory '{name}' is {type(target).__name__} and not callable; name a function that returns the module"
            )
        try:
            made = target()
        except (Exception, SystemExit) as error:
            raise ModelFileError(
                f"factory '{name}' raised {type(error).__name__}: {first_line(error)}; "
                "it must return a module when called without arguments"
            ) from error
        return trace_made(made, name, f"factory '{name}'", inputs)


@contextmanager
def current_folder_importable() -> Iterator[None]:
    folder = str(Path.cwd())
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
