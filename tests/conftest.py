"""Set up the test processes."""

from __future__ import annotations

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


@pytest.fixture(scope="session", autouse=True)
def _time_is_saved() -> Iterator[None]:
    """Garbage is collected as rarely as by the command line; exports repeat no work that others did before."""
    from t3compile.cli.options import rare_collections
    from tests.shared_exports import shared_exports

    with rare_collections(), shared_exports():
        yield
