"""Long work tells how much of it is done: amounts add up to what was announced, and time left follows from the rate."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import t3compile
from t3compile import report
from t3compile.aoti import export_aoti_report
from t3compile.mapped_files import MappedFile
from t3compile.passes.find_attention import find_attention
from t3compile.pipeline import export_onnx_report, load_program
from t3compile.plan import Plan, make_plan
from t3compile.program import Program, trace
from t3compile.progress import SILENT, Measured, Progress
from t3compile.report import left_text, progress
from t3compile.weights import TensorWeights
from tests.recorded import Recorded
from tests.tiny_models import HandWrittenDiT

SPLITS = [(3, 1, 1), (1, 2, 2)]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _planned(program: Program) -> tuple[Program, Plan]:
    plan = make_plan(find_attention(program), SPLITS)
    return t3compile.rewrite(program, plan), plan


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    model = HandWrittenDiT(2).eval()
    return trace(model, model.example_inputs())


# --- time left -----------------------------------------------------------------------------------


def test_time_left_is_what_the_rate_says_and_nothing_before_there_is_one() -> None:
    clock = Clock()
    measured = Measured(100.0, clock)
    assert measured.left_s() is None
    measured.advance(1)
    clock.now += 0.5
    assert measured.left_s() is None  # half a second says nothing
    clock.now += 1.5
    measured.advance(9)
    assert measured.fraction == 0.1
    assert measured.left_s() == pytest.approx(18.0)
    clock.now += 2.0
    assert measured.left_s() == pytest.approx(36.0)  # waiting lowers the rate
    measured.advance(90)
    assert measured.left_s() == 0.0
    measured.advance(5)
    assert (measured.fraction, measured.left_s()) == (1.0, 0.0)


def test_the_rate_is_that_of_the_last_half_minute() -> None:
    clock = Clock()
    measured = Measured(10_000.0, clock)
    for step in [100.0] * 60 + [10.0] * 60:
        clock.now += 1.0
        measured.advance(step)
    assert measured.left_s() == pytest.approx((10_000 - 6_600) / 10, rel=0.02)


def test_rare_amounts_are_not_forgotten() -> None:
    clock = Clock()
    measured = Measured(10.0, clock)
    for _ in range(4):
        clock.now += 60.0
        measured.advance(1.0)
    assert measured.left_s() == pytest.approx(360.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (59.5, "1 min"), (75, "1 min 15 s"), (301, "5 min 10 s"), (7321, "2 h 2 min")]
)
def test_time_left_in_words(seconds: float, text: str) -> None:
    clock = Clock()
    measured = Measured(1.0 + seconds, clock)
    clock.now += 1.0
    measured.advance(1.0)
    assert left_text(measured) == f"about {text} left"


# --- amounts add up ------------------------------------------------------------------------------


def test_verification_does_the_work_that_it_announces(program: Program) -> None:
    rewritten, plan = _planned(program)
    for portable in (False, True):
        ours = t3compile.rewrite(program, plan, portable=True) if portable else rewritten
        seen = Recorded()
        assert t3compile.verify(program, ours, plan, progress=seen).passed
        (work,) = seen.of("MACs")
        assert work.done == work.total > 0
        assert max(work.amounts) < work.total / 2


def test_a_small_grid_counts_as_what_it_is(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t3compile.pipeline.DIRECT_MACS", 0)
    rewritten, plan = _planned(program)
    seen = Recorded()
    report = t3compile.verify(program, rewritten, plan, progress=seen)
    assert report.passed
    assert "small grid" in report.grid
    (work,) = seen.of("MACs")
    assert work.done == work.total > 0


def test_comparing_files_counts_the_weights_that_are_read(program: Program, tmp_path: Path) -> None:
    rewritten, plan = _planned(program)
    loaded = load_program(rewritten.save(tmp_path / "x.pt2"))
    seen = Recorded()
    assert t3compile.verify(program, loaded, plan, progress=seen).passed
    (work,) = seen.of("bytes")
    constants = sum(x.nbytes for x in program.exported.constants.values())
    assert work.done == work.total == program.weight_bytes + constants
    seen = Recorded()
    assert t3compile.verify(program, rewritten, plan, progress=seen).passed
    assert sum(work.total for work in seen.of("bytes")) == constants


def test_saving_counts_bytes(program: Program, tmp_path: Path) -> None:
    seen = Recorded()
    program.save(tmp_path / "x.pt2", progress=seen)
    (work,) = seen.work
    assert (work.step, work.unit) == (f"writing {tmp_path / 'x.pt2'}", "bytes")
    assert work.done == work.total == program.weight_bytes


def test_export_counts_bytes_and_comparison(program: Program, tmp_path: Path) -> None:
    seen = Recorded()
    report = export_onnx_report(program, tmp_path / "x.onnx", check=True, progress=seen)
    assert report.passed
    written, compared = seen.work
    assert report.storage is not None
    assert written.done == written.total == report.storage.written_bytes > 0
    assert (written.step, written.unit) == ("writing x.onnx", "bytes")
    assert compared.done == compared.total > 0
    assert compared.step == "comparing onnxruntime with torch"


@pytest.mark.parametrize("can_link", [True, False])
def test_shared_weights_count_only_where_they_are_copied(
    can_link: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = HandWrittenDiT(1).eval()
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "out").mkdir()
    checkpoint = tmp_path / "checkpoint" / "model.safetensors"
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, checkpoint)
    state = model.state_dict()
    file = MappedFile.open(checkpoint)
    header = int.from_bytes(checkpoint.read_bytes()[:8], "little")
    entries = json.loads(checkpoint.read_bytes()[8 : 8 + header])
    tensors = {
        name: file.tensor(8 + header + entries[name]["data_offsets"][0], tuple(x.shape), x.dtype)
        for name, x in state.items()
    }
    program = trace(model, model.example_inputs(), weights=TensorWeights(tensors, files=(file,)))
    if not can_link:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
    seen = Recorded()
    report = export_onnx_report(program, tmp_path / "out" / "x.onnx", share_weights=True, check=False, progress=seen)
    assert report.storage is not None
    assert [shared.how for shared in report.storage.shared_files] == ["hard link" if can_link else "copy"]
    (work,) = seen.work
    copied = 0 if can_link else checkpoint.stat().st_size
    assert work.done == work.total == report.storage.written_bytes + copied


# --- how it is shown -----------------------------------------------------------------------------


def test_lines_are_rare_and_stay_off_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(report.time, "monotonic", clock)
    monkeypatch.setattr("t3compile.report.Measured", lambda total: Measured(total, clock))
    with progress() as step:
        step("writing x")
        with step.measure(2**30, "bytes") as advance:
            for _ in range(256):
                clock.now += 0.125
                advance(2**22)
        step("checking")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "... writing x",
        "... 31% of 1.0 GiB, about 22 s left",
        "... 62% of 1.0 GiB, about 12 s left",
        "... 94% of 1.0 GiB, about 2 s left",
        "... checking",
    ]


def test_steps_within_measured_work_tell_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(report.time, "monotonic", clock)
    monkeypatch.setattr("t3compile.report.Measured", lambda total: Measured(total, clock))
    with progress() as step, step.measure(100, "MACs") as advance:
        step("identity")
        clock.now += 2
        advance(40)
        step("sites")
    assert capsys.readouterr().err.splitlines() == ["... identity", "... sites (about 3 s left)"]


def test_a_terminal_gets_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    clock = Clock()
    monkeypatch.setattr("t3compile.report.Measured", lambda total: Measured(total, clock))
    with progress() as step:
        step("writing x")
        with step.measure(2**30, "bytes") as advance:
            clock.now += 2
            advance(2**29)
            step("still writing")
            step._bar.refresh()  # type: ignore[attr-defined]
        (task,) = step._bar.tasks  # type: ignore[attr-defined]
        assert task.total is None
        step.phase("Timing", 0, 0.25)
        step._bar.refresh()  # type: ignore[attr-defined]
        assert (task.completed, task.total) == (0.25, 1.0)
        step("inspecting")
        assert task.total is None
    shown = terminal.getvalue()
    assert "still writing" in shown
    assert "50% of 1.0 GiB, about 2 s left" in shown
    assert "Timing" in shown


def test_silence_is_a_progress(capsys: pytest.CaptureFixture[str]) -> None:
    SILENT("step")
    SILENT.phase("phase", 0, 0.5)
    with SILENT.measure(1, "bytes") as advance:
        advance(1)
    assert isinstance(SILENT, Progress)
    assert capsys.readouterr() == ("", "")


def test_a_package_compares_with_measured_work(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its compiler, which takes a minute: torch's own graph stands in for the package."""
    monkeypatch.setattr("t3compile.export.write_aoti.check_compiler", lambda: "g++")
    monkeypatch.setattr("t3compile.export.write_aoti.write_aoti", lambda *_: None)

    class Package:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
            return program.module()(*inputs.values())  # type: ignore[no-any-return]

    monkeypatch.setattr("t3compile.export.aoti_engine.AotiEngine", Package)
    seen = Recorded()
    assert export_aoti_report(program, tmp_path / "x.so", check=True, progress=seen).passed
    (work,) = seen.work
    assert work.done == work.total > 0
    assert seen.steps == ["compiling x.so", "comparing the package with torch"]
