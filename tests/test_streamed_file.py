"""Files too large to cache: whole, in order, and with the disk's errors."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from t3compile import streamed_file
from t3compile.streamed_file import is_too_large_to_cache, one_ahead, open_new

needs_advice = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no such advice")
HUGE = 2**60


@needs_advice
def test_half_of_the_memory_is_too_large_to_cache() -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert not is_too_large_to_cache(memory // 2)
    assert is_too_large_to_cache(memory // 2 + 1)


@needs_advice
@pytest.mark.parametrize("expected", [0, HUGE])
def test_what_is_written_is_there(expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[int] = []
    monkeypatch.setattr(streamed_file, "PUSHED_BYTES", 1000)
    monkeypatch.setattr(streamed_file, "forget", lambda *given: pushed.append(given[0]))
    content = bytes(range(256)) * 100
    path = tmp_path / "file"
    with open_new(path, expected) as file:
        for begin in range(0, len(content), 700):
            file.write(memoryview(content)[begin : begin + 700])
        file.seek(3)
        file.write(b"xyz")
    assert path.read_bytes() == content[:3] + b"xyz" + content[6:]
    assert bool(pushed) == bool(expected)


@needs_advice
def test_an_error_of_the_disk_is_raised_at_the_next_write_or_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(streamed_file, "PUSHED_BYTES", 1000)
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="no space"), open_new(tmp_path / "last", HUGE) as file:
        file.write(b"0" * 20_000)
    writes = (b"0" * 20_000 for _ in range(3))
    with pytest.raises(OSError, match="no space"), open_new(tmp_path / "file", HUGE) as file:
        file.writelines(writes)


def test_one_task_is_ahead_and_no_more() -> None:
    begun: list[int] = []
    caller = threading.get_ident()

    def task(number: int) -> Callable[[], int]:
        def run() -> int:
            assert threading.get_ident() != caller
            begun.append(number)
            return number

        return run

    for number, result in enumerate(one_ahead(task(i) for i in range(5))):
        assert result == number
        assert len(begun) <= number + 2
    assert begun == list(range(5))
    assert list(one_ahead([])) == []


def test_a_task_that_fails_raises_in_the_caller() -> None:
    def fail() -> int:
        raise ValueError("bad weight")

    results = one_ahead([lambda: 1, fail, lambda: 3])
    assert next(results) == 1
    with pytest.raises(ValueError, match="bad weight"):
        next(results)
