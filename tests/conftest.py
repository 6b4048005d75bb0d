"""Set up the test processes."""

from __future__ import annotations

import copy
import functools
import gc
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Under pytest-xdist every worker computes on one thread; Ctrl-C works however the tests were started."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Shells start background jobs so, and every process below would ignore it too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)
    # As the command line does: graphs are many objects that live on, looked at in vain.
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="session", autouse=True)
def _torchlib_is_read_once() -> Iterator[None]:
    """torch.onnx parses its library of functions at every export: most of the time of a small one."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        yield
        return
    read = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(*args: Any, **kwargs: Any) -> ONNXRegistry:
        registry = copy.copy(read(*args, **kwargs))
        registry.functions = {target: list(metas) for target, metas in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield
