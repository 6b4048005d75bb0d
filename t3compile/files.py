"""Write beside, then rename: a result appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from t3compile.errors import OutputError


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


def _check_space(path: Path, needed_bytes: int) -> None:
    """Raise OutputError when the disk under `path` has no room for so much."""
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
    _check_space(path, needed_bytes)
    stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield stage
        for file in sorted(stage.iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.parent / file.name)
    except OSError as error:
        at = f" ('{error.filename}')" if error.filename else ""
        raise OutputError(f"cannot write '{path}': {error.strerror or error}{at}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


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
    _check_space(beside / path.name, needed_bytes)
    stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=beside))
    made, old = stage / "new", stage / "old"
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
