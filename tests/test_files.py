"""A result appears whole or not at all, and what cannot be written is refused before any work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from t3compile.errors import OutputError, UnfinishedOutputWarning
from t3compile.files import check_writable, staged_folder, staged_outputs, write_text


def test_all_files_appear_together_and_the_stage_goes(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with staged_outputs(path) as stage:
        assert stage.parent == tmp_path
        (stage / "model.onnx").write_text("graph")
        (stage / "model.onnx.data").write_text("weights")
        assert [file.name for file in tmp_path.iterdir()] == [stage.name]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert path.read_text() == "graph"


def test_the_named_file_is_moved_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it refers to is there first, whatever the names sort to."""
    moved = []
    replace = os.replace

    def watched(source: Any, target: Any) -> None:
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    with staged_outputs(tmp_path / "a") as stage:
        for name in ("a", "a.data", "b"):
            (stage / name).write_text(name)
    assert moved[-1] == "a"
    assert sorted(moved) == ["a", "a.data", "b"]


def test_a_folder_in_the_place_of_one_file_keeps_all_away(tmp_path: Path) -> None:
    (tmp_path / "model.data").mkdir()

    def write() -> None:
        with staged_outputs(tmp_path / "model") as stage:
            for name in ("model", "model.1", "model.data"):
                (stage / name).write_text("new")

    with pytest.raises(OutputError, match=r"cannot write '.*model\.data': it is a folder"):
        write()
    assert [file.name for file in tmp_path.iterdir()] == ["model.data"]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3), MemoryError()])
def test_an_interrupted_write_leaves_nothing_and_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")

    def write() -> None:
        with staged_outputs(path) as stage:
            (stage / "model.onnx").write_text("half")
            (stage / "model.onnx.data").write_text("half")
            raise error

    with pytest.raises(type(error)) as raised:
        write()
    assert raised.value is error
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_text() == "old"


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_text(path, "one")
    write_text(path, "zwei ü")
    assert path.read_bytes() == "zwei ü".encode()
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_a_full_disk_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with (
        pytest.raises(OutputError, match=r"cannot write '.*plan\.json': No space left on device"),
        staged_outputs(path),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match=r"cannot write '.*out': it is a folder; give a file name"):
        check_writable(tmp_path / "out")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"x\.json': the folder '.*/no/such' does not exist"):
        check_writable(tmp_path / "no" / "such" / "x.json")
    with pytest.raises(OutputError, match="does not exist"), staged_outputs(tmp_path / "no" / "x.json"):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="does not exist"):
        check_writable(tmp_path / "file" / "x.json")


def test_a_read_only_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sealed"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):

        def refuse(*_: Any, **__: Any) -> None:
            raise PermissionError(13, "Permission denied")

        # root writes anywhere.
        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    try:
        with pytest.raises(OutputError, match=r"cannot write '.*x\.json': Permission denied in '.*sealed'"):
            check_writable(folder / "x.json")
    finally:
        folder.chmod(0o700)


def test_checking_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    check_writable(tmp_path / "new")
    check_writable(tmp_path / "old")
    assert [file.name for file in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "old"


def test_a_bare_name_is_written_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(Path("plan.json"), "{}")
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_written_files_obey_the_umask(tmp_path: Path) -> None:
    """Staging must not make results private: another user, or a container, reads them."""
    old = os.umask(0o022)
    try:
        write_text(tmp_path / "plan.json", "{}")
    finally:
        os.umask(old)
    assert (tmp_path / "plan.json").stat().st_mode & 0o777 == 0o644


# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_folder_appears_whole_in_the_place_of_the_old_one(there: bool, inside: bool, tmp_path: Path) -> None:
    """Made beside its own folder, or in it."""
    path = tmp_path / "repo" / "model"
    path.parent.mkdir()
    if there:
        path.mkdir()
        (path / "old").write_text("old")
    beside = path.parent if inside else tmp_path
    with staged_folder(path, beside=beside) as stage:
        assert stage.parent.parent == beside
        assert list(stage.iterdir()) == []
        (stage / "new").write_text("new")
        assert path.exists() is there
        assert not there or [file.name for file in path.iterdir()] == ["old"]
    assert [file.name for file in path.iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["repo"]
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_an_interrupted_folder_leaves_the_old_one(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").write_text("old")

    def write() -> None:
        with staged_folder(path, beside=tmp_path) as stage:
            (stage / "new").write_text("half")
            raise error

    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
        write()
    assert [file.name for file in path.iterdir()] == ["old"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    for beside, needed_bytes in ((tmp_path / "none", 0), (tmp_path, 2**60)):
        with (
            pytest.raises(OutputError, match="cannot write"),
            staged_folder(tmp_path / "model", beside=beside, needed_bytes=needed_bytes),
        ):
            pytest.fail("the block ran")
    assert list(tmp_path.iterdir()) == []


# --- what killed runs leave ----------------------------------------------------------------------


def _run_and_kill(line: str) -> None:
    code = f"import os, signal\nfrom pathlib import Path\nfrom t3compile.files import *\n{line}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL


def _make_old(path: Path) -> None:
    """Five seconds pass before an unlocked stage counts as abandoned."""
    os.utime(path, (time.time() - 60,) * 2)


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from t3compile.files import staged_outputs\n"
        "with staged_outputs(Path(sys.argv[1])) as stage:\n"
        "    (stage / 'half').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    output = tmp_path / "model.pt2"
    subprocess.run([sys.executable, "-c", code, str(output)], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".part")
    old = time.time() - 60
    os.utime(left, (old, old))
    # A run that still lives keeps its folder, however old.
    with staged_outputs(tmp_path / "model.pt2") as stage:
        assert [path.name for path in tmp_path.iterdir()] == [stage.name]
        os.utime(stage, (old, old))
        write_text(output, "done")
        assert stage.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_a_folder_of_another_name_is_not_taken_for_what_was_left(tmp_path: Path) -> None:
    """Others name what they download like this."""
    for name in (".model.pt2.part", ".model.mp4.1.part", ".model.onnx.data.part"):
        (tmp_path / name).mkdir()
        _make_old(tmp_path / name)
    write_text(tmp_path / "model", "done")
    write_text(tmp_path / "model.pt2", "done")
    assert len(list(tmp_path.glob(".*.part"))) == 3


@pytest.mark.parametrize("is_held", [True, False])
def test_the_next_folder_clears_what_a_killed_run_left_but_not_what_is_being_made(
    tmp_path: Path, is_held: bool
) -> None:
    path = tmp_path / "model"
    if is_held:
        with staged_folder(path, beside=tmp_path) as held:
            _make_old(held.parent)
            with staged_folder(path, beside=tmp_path) as other:
                (other / "new").write_text("other")
            assert held.is_dir()
            (held / "new").write_text("held")
    else:
        _run_and_kill(
            f"with staged_folder(Path({str(path)!r}), beside=Path({str(tmp_path)!r})) as made:\n"
            "    (made / 'half').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
        )
        (left,) = tmp_path.iterdir()
        _make_old(left)
        with (
            pytest.warns(UnfinishedOutputWarning, match="removed '.*'.* that a killed run left"),
            staged_folder(path, beside=tmp_path) as made,
        ):
            (made / "new").write_text("held")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert (path / "new").read_text() == "held"


def test_a_folder_whose_replacement_was_killed_midway_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "precious").write_text("precious")
    _run_and_kill(
        "real = os.rename\n"
        "def rename(a, b):\n"
        "    real(a, b)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.rename = rename\n"
        f"with staged_folder(Path({str(path)!r}), beside=Path({str(tmp_path)!r})): pass"
    )
    (left,) = tmp_path.iterdir()
    _make_old(left)
    with (
        pytest.warns(UnfinishedOutputWarning, match="'.*old' is a folder that a killed run was about to replace"),
        staged_folder(path, beside=tmp_path) as made,
    ):
        (made / "new").write_text("new")
    assert [file.read_text() for file in tmp_path.rglob("precious")] == ["precious"]
