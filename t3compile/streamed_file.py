"""Files that memory cannot cache: what was written or read leaves the system's cache as the work goes on.

Otherwise they push out all else, and finding pages to use again takes the system longer than the writing itself.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

# So much is on its way to the disk while as much is written.
PUSHED_BYTES = 256 << 20

Result = TypeVar("Result")


def is_too_large_to_cache(nbytes: int) -> bool:
    """Whether files of so many bytes together take more than half of this machine's memory; False where unknown."""
    if not hasattr(os, "posix_fadvise"):
        return False
    return nbytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def open_new(path: Path, expected_bytes: int) -> BinaryIO:
    """An empty file for writing; if the expected bytes are too large to cache, they go to the disk as they come.

    Its ``write`` and ``close`` raise OSError also for what was written before.
    """
    if not is_too_large_to_cache(expected_bytes):
        return path.open("wb")
    return cast(BinaryIO, io.BufferedWriter(_PushedFile(path)))


def forget(descriptor: int, offset: int, nbytes: int) -> None:
    """Take bytes that were read out of the system's cache."""
    os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


def one_ahead(tasks: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """The results in order; each task runs in a thread while the caller uses the result of the one before."""
    with ThreadPoolExecutor(1) as worker:
        ahead: Future[Result] | None = None
        for task in tasks:
            following = worker.submit(task)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()


class _PushedFile(io.FileIO):
    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self._worker = ThreadPoolExecutor(1)
        self._pushing: Future[None] | None = None
        self._fresh = 0

    def write(self, data: object, /) -> int:
        count: int = super().write(data)  # type: ignore[arg-type]
        self._fresh += count
        if self._fresh >= PUSHED_BYTES:
            self._wait()
            self._pushing = self._worker.submit(self._push)
            self._fresh = 0
        return count

    def close(self) -> None:
        try:
            self._wait()
        finally:
            self._worker.shutdown()
            super().close()

    def _push(self) -> None:
        os.fdatasync(self.fileno())
        forget(self.fileno(), 0, 0)

    def _wait(self) -> None:
        pushing, self._pushing = self._pushing, None
        if pushing is not None:
            pushing.result()
