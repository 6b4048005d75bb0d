"""TensorRT's timing cache as a file: read where it fits the device, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from t3compile.errors import EngineError, OutputError
from t3compile.files import check_writable, staged_outputs


def read_timing_cache(path: Path) -> bytes:
    """The file's bytes, none where there is no file yet; OutputError where it could not be written later."""
    check_writable(path)
    return _read(path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise OutputError(f"cannot read the timing cache '{path}': {error.strerror}") from None


def set_timing_cache(config: Any, path: Path) -> tuple[str, ...]:
    """Give a builder's configuration the file's cache; notes where it was made elsewhere and an empty one is used.

    TensorRT checks the cache's header against its own version and the device.
    """
    data = _read(path)
    if data:
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, False):
            return ()
    empty = config.create_timing_cache(b"")
    if empty is None or not config.set_timing_cache(empty, False):
        raise EngineError(f"TensorRT makes no timing cache for '{path}'; leave out --timing-cache")
    if not data:
        return ()
    return (f"the timing cache '{path}' is of another device or TensorRT version, or damaged: it is begun anew",)


def write_timing_cache(config: Any, path: Path) -> None:
    """Write what the configuration's cache holds now, beside and renamed."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    with staged_outputs(path) as stage:
        (stage / path.name).write_bytes(memoryview(cache.serialize()))
