"""Write beside, then rename: a result appears whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from t3compile.errors import OutputError, UnfinishedOutputWarning
from t3compile.interruption import unfinished, uninterrupted

_STAGE_SUFFIX = ".part"
# Characters that tempfile makes a name of.
_RANDOM = 8
# Where a replaced folder waits until the new one is in its place.
_OLD = "old"
_NEW_S = 5.0
_TEMPORARY_NAME = "t3compile"


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

    What a killed run left unfinished beside `path` is removed first, with a warning.
    """
    for left in remove_abandoned(path):
        warnings.warn(left, UnfinishedOutputWarning, stacklevel=2)
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
    try:
        with scratch_folder(path.parent, path.name) as stage:
            yield stage
            moves = [(file, path.parent / file.name) for file in stage.iterdir()]
            for _, target in moves:
                # Before any is moved: all appear or none.
                if target.is_dir():
                    raise OutputError(f"cannot write '{target}': it is a folder; move it away, or write elsewhere")
            with uninterrupted():
                for file, target in sorted(moves, key=lambda move: move[1].name == path.name):
                    os.replace(file, target)
    except OSError as error:
        raise _cannot_write(path, error) from error


@contextmanager
def staged_folder(path: Path, *, beside: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """An empty folder that becomes `path` when the block ends well, and else is removed.

    `beside` is where it is made: a folder on the file system of `path`. An older folder at `path` is whole until the
    block has ended, and then goes. Raises OutputError, before the block, when `beside` cannot be written or the disk
    has no room for `needed_bytes`.
    """
    _check_folder(path, beside)
    check_space(beside / path.name, needed_bytes)
    try:
        with scratch_folder(beside, path.name) as stage:
            made = stage / "new"
            made.mkdir()
            yield made
            with uninterrupted():
                _exchange(path, made, stage / _OLD)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _exchange(path: Path, made: Path, old: Path) -> None:
    try:
        if path.exists():
            os.rename(path, old)
        os.rename(made, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise


def _cannot_write(path: Path, error: OSError) -> OutputError:
    at = f" ('{error.filename}')" if error.filename else ""
    return OutputError(f"cannot write '{path}': {error.strerror or error}{at}")


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder `.<name>.<random>.part` in `parent` that is gone after the block, also when the command is stopped.

    After a run that was killed a later one recognises it (remove_abandoned).
    """
    stack = ExitStack()
    try:
        with uninterrupted():
            folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=_STAGE_SUFFIX, dir=parent))
            stack.enter_context(unfinished(folder))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            lock = _lock(folder)
            if lock is not None:
                stack.callback(os.close, lock)
        yield folder
    finally:
        with uninterrupted():
            stack.close()


@contextmanager
def own_temporary_folder() -> Iterator[None]:
    """Temporary files of libraries and of the programs they start go into one folder, which goes with the block."""
    try:
        system, variable = tempfile.gettempdir(), os.environ.get("TMPDIR")
    except FileNotFoundError:
        # No folder for temporary files: whoever needs one says so.
        yield
        return
    remove_abandoned(Path(system, _TEMPORARY_NAME))
    with scratch_folder(Path(system), _TEMPORARY_NAME) as folder:
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = system
            if variable is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = variable


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


def remove_abandoned(path: Path) -> list[str]:
    """Remove the unfinished outputs of runs that were killed: nobody holds their folders. A sentence for each."""
    said = []
    for stage in path.parent.glob(f".{glob.escape(path.name)}.{'?' * _RANDOM}{_STAGE_SUFFIX}"):
        try:
            is_new = time.time() - stage.stat().st_mtime < _NEW_S
        except OSError:
            continue
        # A new one may be about to be locked.
        lock = None if is_new or not stage.is_dir() else _lock(stage)
        if lock is not None:
            if (stage / _OLD).exists():
                # Killed between its two renames: what the folder held is whole here, and only here.
                said.append(f"'{stage / _OLD}' is a folder that a killed run was about to replace; put it back")
            else:
                nbytes = sum(file.lstat().st_size for file in stage.rglob("*") if file.is_file())
                shutil.rmtree(stage, ignore_errors=True)
                said.append(f"removed '{stage}', {nbytes / 2**20:.1f} MiB that a killed run left unfinished")
            os.close(lock)
    return said


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with staged_outputs(path) as stage:
        (stage / path.name).write_text(text, encoding="utf-8")
