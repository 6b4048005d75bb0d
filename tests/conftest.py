"""Set up the test processes."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

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
def _exports_are_shared() -> Iterator[None]:
    """Most of the time of a small export is work that others did before."""
    from tests.shared_exports import shared_exports

    with shared_exports():
        yield
