"""Work of ONNX exports that many tests repeat, done once a process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import onnx_ir as ir
from torch.onnx._internal.exporter._registration import ONNXRegistry

from t3compile.export import window_function
from t3compile.export.window_function import FunctionKey

_read_torchlib = cache(ONNXRegistry.from_torchlib)
_export_body = cache(window_function.export_body)


def _shared_registry(*args: Any, **kwargs: Any) -> ONNXRegistry:
    registry = copy.copy(_read_torchlib(*args, **kwargs))
    registry.functions = {target: list(metas) for target, metas in registry.functions.items()}
    return registry


def _shared_body(key: FunctionKey) -> ir.Graph:
    return _export_body(replace(key, form="attention")).clone()


@contextmanager
def shared_exports() -> Iterator[None]:
    """torch.onnx's library of functions is parsed once, and the body of every window function exported once."""
    with (
        patch.object(ONNXRegistry, "from_torchlib", staticmethod(_shared_registry)),
        patch.object(window_function, "export_body", _shared_body),
    ):
        yield
