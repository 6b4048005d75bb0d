"""Write beside, then rename: a result appears whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from t3compile.errors import OutputError

_STAGE_SUFFIX = ".part"
# Characters that tempfile makes a name of.
_RANDOM = 8
# Where a replaced folder waits until the new one is in its place.
_OLD = "old"
_NEW_S = 5.0


def check_writable(path: Path) -> None:
    """Raise OutputError, before any work, when `path` cannot be written."""
    if path.is_dir():
        raise OutputError(f"cannot write '{path}': it is a folder; give a file name")
    _check_folder(path, path.parent)


def _check_folder(path: Path, folder: Path) -> None:
    if not folder.is_dir():
        raise OutputError(f"cannot write '{path}': the folder '{folder}' does not exist")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror} in '{folder}'") from None


def check_space(path: Path, needed_bytes: int) -> None:
    """Raise OutputError, before any work, when the disk under `path` has no room for so much.

    What a killed run left unfinished beside `path` is removed first.
    """
    _remove_abandoned(path)
    free = shutil.disk_usage(path.parent).free
    if free < needed_bytes:
        raise OutputError(
            f"cannot write '{path}': it needs {needed_bytes / 2**30:.1f} GiB and '{path.parent}' has "
            f"{free / 2**30:.1f} GiB free; make room or write elsewhere"
        )


@contextmanager
def staged_outputs(path: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """A folder beside `path`; every file left in it is moved into place when the block ends well, else removed.

    The file named like `path` is moved last, so that whatever it refers to is there first. Raises OutputError, before
    the block, when `path` cannot be written or the disk has no room for `needed_bytes`.
    """
    check_writable(path)
    check_space(path, needed_bytes)
    stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_STAGE_SUFFIX, dir=path.parent))
    lock = _lock(stage)
    try:
        yield stage
        moves = [(file, path.parent / file.name) for file in stage.iterdir()]
        for _, target in moves:
            # Before any is moved: all appear or none.
            if target.is_dir():
                raise OutputError(f"cannot write '{target}': it is a folder; move it away, or write elsewhere")
        for file, target in sorted(moves, key=lambda move: move[1].name == path.name):
            os.replace(file, target)
    except OSError as error:
        at = f" ('{error.filename}')" if error.filename else ""
        raise OutputError(f"cannot write '{path}': {error.strerror or error}{at}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def trial_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` that goes with the block, or with the next run where this one is killed."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=_STAGE_SUFFIX, dir=path.parent) as folder:
        yield Path(folder)


def _lock(folder: Path) -> int | None:
    """Hold a folder for as long as this process lives; None where another one does, or locks are unknown."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned(path: Path) -> None:
    """Remove the unfinished outputs of runs that were killed: nobody holds their folders."""
    for stage in path.parent.glob(f".{glob.escape(path.name)}.{'?' * _RANDOM}{_STAGE_SUFFIX}"):
        try:
            is_new = time.time() - stage.stat().st_mtime < _NEW_S
        except OSError:
            continue
        # A new one may be about to be locked.
        lock = None if is_new or not stage.is_dir() else _lock(stage)
        if lock is not None:
            # A run that was killed between its two renames: what the folder held is whole here, and only here.
            if not (stage / _OLD).exists():
                shutil.rmtree(stage, ignore_errors=True)
            os.close(lock)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with staged_outputs(path) as stage:
        (stage / path.name).write_text(text, encoding="utf-8")


@contextmanager
def staged_folder(path: Path, *, beside: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """An empty folder that becomes `path` when the block ends well, and else is removed.

    `beside` is where it is made: a folder on the file system of `path`. An older folder at `path` is whole until the
    block has ended, and then goes. Raises OutputError, before the block, when `beside` cannot be written or the disk
    has no room for `needed_bytes`.
    """
    _check_folder(path, beside)
    check_space(beside / path.name, needed_bytes)
    stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_STAGE_SUFFIX, dir=beside))
    lock = _lock(stage)
    made, old = stage / "new", stage / _OLD
    try:
        made.mkdir()
        yield made
        try:
            if path.exists():
                os.rename(path, old)
            os.rename(made, path)
        except BaseException:
            if old.exists() and not path.exists():
                os.rename(old, path)
            raise
    except OSError as error:
        at = f" ('{error.filename}')" if error.filename else ""
        raise OutputError(f"cannot write '{path}': {error.strerror or error}{at}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if lock is not None:
            os.close(lock)
