"""t3compile bench: the processes that are measured, a whole run, and the command."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import t3compile
from t3compile.benchmark import run_benchmark
from t3compile.benchmark.bench_report import TOTAL, BenchReport
from t3compile.benchmark.cases import Workload
from t3compile.benchmark.child_process import ChildProcess, WorkerDied, WorkerError, child_process
from t3compile.benchmark.compare_outputs import allowed_difference
from t3compile.benchmark.messages import Memory
from t3compile.benchmark.run_benchmark import BenchSettings, bench
from t3compile.benchmark.tables import bench_tables
from t3compile.benchmark.variants import AttentionLayer, variant_program
from t3compile.benchmark.worker import Worker
from t3compile.cli import main
from t3compile.errors import EngineError
from t3compile.geometry import Splits, TokenGrid
from t3compile.ops import WindowAttentionArgs
from t3compile.pattern import WindowPattern
from t3compile.program import Program
from tests.test_runtimes import MIDDLE_BYTES, save_large_middle
from tests.two_layers import ARGS, two_layer_programs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def programs() -> tuple[Program, Program]:
    return two_layer_programs()


# --- processes -----------------------------------------------------------------------------------


def test_a_worker_loads_calls_and_tells_memory(tmp_path: Path) -> None:
    layer = AttentionLayer.by_tokens(ARGS, heads=2, head_dim=8, dtype="float32")
    layer.program().save(tmp_path / "a.pt2")
    with child_process(tmp_path, "worker") as child:
        with pytest.raises(WorkerError, match="there is no file or folder"):
            child.ask("load", name="none", path="nowhere.pt2", runtime="torch")
        with pytest.raises(WorkerError, match="KeyError"):
            child.ask("time", name="none")
        child.ask("load", name="a", path=str(tmp_path / "a.pt2"), runtime="torch")
        warm = child.ask("warm", name="a", calls=2, output=str(tmp_path / "out"))
        assert warm["paths"] == ["regrouped: the tensors are on cpu"]
        assert warm["runtime"] == "torch eager, cpu"
        child.ask("settle")
        timed = child.ask("time", name="a")
        assert timed["seconds"] > 0
        assert 1 <= timed["calls"] <= 100
        memory = child.ask("memory")
    assert memory["device_bytes"] is None
    assert memory["peak_bytes"] >= memory["calls_peak_bytes"] >= 0.9 * memory["baseline_bytes"] > 2**26
    (out,) = torch.load(tmp_path / "out", weights_only=True)
    assert out.shape == (1, 48, 2, 8)


def test_memory_that_a_runtime_keeps_between_calls_counts_as_the_calls(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = save_large_middle(tmp_path / "large.onnx")
    with child_process(tmp_path, "worker") as child:
        child.ask("load", name="a", path=str(path), runtime="ort")
        child.ask("warm", name="a", calls=1, output=None)
        child.ask("settle")
        child.ask("time", name="a")
        memory = Memory(**child.ask("memory"))
    assert memory.growth_bytes is not None
    assert 0.9 * MIDDLE_BYTES < memory.growth_bytes < 3 * MIDDLE_BYTES


def test_a_worker_that_dies_is_told_with_its_exit_code(tmp_path: Path) -> None:
    script = "import sys; sys.stdin.readline(); print('out of luck', file=sys.stderr); sys.exit(7)"
    child = ChildProcess(tmp_path, "dies", (sys.executable, "-c", script))
    with pytest.raises(WorkerDied, match="exit code 7: out of luck") as died:
        child.ask("load")
    assert died.value.exit_code == 7
    child.end()


def test_a_killed_worker_is_told_with_its_signal(tmp_path: Path) -> None:
    script = "import os, sys; sys.stdin.readline(); os.kill(os.getpid(), 9)"
    child = ChildProcess(tmp_path, "killed", (sys.executable, "-c", script))
    with pytest.raises(WorkerDied, match=r"killed by SIGKILL.*memory ran out") as died:
        child.ask("load")
    assert died.value.exit_code == -9
    child.end()


def test_a_worker_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); "
        "print('{\"pid\": %d}' % p.pid, flush=True); time.sleep(60)"
    )
    child = ChildProcess(tmp_path, "hangs", (sys.executable, "-c", script))
    pid = child.ask("anything")["pid"]
    child.end()
    deadline = time.monotonic() + 5
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_running(pid)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


# --- the whole -----------------------------------------------------------------------------------


class InThisProcess:
    """A worker without a process of its own: it answers the same, sooner."""

    def __init__(self, _: Path, __: str) -> None:
        self._worker = Worker()

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, request: str, **fields: Any) -> dict[str, Any]:
        if request == "matrix_peak":
            return {"dtype": fields["dtype"], "device": "cpu", "size": 512, "flops_per_s": 1e11, "threads": 1}
        answer: dict[str, Any] = json.loads(json.dumps(self._worker.answer({"ask": request, **fields})))
        return answer


@pytest.fixture(scope="module")
def report(programs: tuple[Program, Program]) -> BenchReport:
    original, rewritten = programs
    settings = BenchSettings(runtimes=("torch", "trt"), repeats=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_benchmark, "child_process", InThisProcess)
        return bench([Workload.of_model("tiny", rewritten, original)], settings, command="t3compile bench tiny")


def test_every_variant_is_measured_in_every_runtime_that_runs_here(report: BenchReport) -> None:
    assert report.groups() == (("tiny", "attention"), ("tiny", "model"))
    for subject, cases in (("attention", ("(2,1,1) on 2x4x6", "(1,2,3) on 2x4x6", TOTAL)), ("model", ("model",))):
        assert report.cases("tiny", subject) == cases
        for case in cases:
            for variant in ("windows", "full", "paper"):
                found = report.find("tiny", subject, case, variant, "torch")
                assert found is not None
                assert len(found.times_s) == 3
                assert min(found.times_s) > 0
    assert {(p.subject, p.variant, p.runtime) for p in report.processes} == {
        (subject, variant, "torch") for subject in ("attention", "model") for variant in ("windows", "full", "paper")
    }
    assert {p.engine for p in report.processes} == {"torch eager, cpu"}


def test_a_runtime_that_cannot_run_here_is_listed_with_the_reason(report: BenchReport) -> None:
    (one,) = report.not_run
    assert (one.runtime, one.variant) == ("trt", "")
    assert "tensorrt" in one.reason.lower()
    assert report.passed


def test_outputs_were_compared_with_the_first_runtimes_windows(report: BenchReport) -> None:
    assert all(one.passed for one in report.differences)
    same = {(d.variant, d.runtime) for d in report.differences if d.allowed is not None}
    assert same == {("paper", "torch")}
    full = [one for one in report.differences if one.variant == "full"]
    assert full
    assert all(one.error > 10 * allowed_difference("float32", one.magnitude) for one in full)


def test_macs_of_the_whole_cycle_are_those_of_its_layers(report: BenchReport) -> None:
    total = report.find("tiny", "attention", TOTAL, "windows", "torch")
    assert total is not None
    # (2,1,1): both branches are the same partition, computed once.
    assert total.macs == 2 * (2 * 24 * 24) * 16 + 2 * 2 * (6 * 8 * 8) * 16
    assert total.layers == 2
    paper = report.find("tiny", "attention", TOTAL, "paper", "torch")
    assert paper is not None
    assert paper.macs == 2 * 2 * (2 * 24 * 24) * 16 + 2 * 2 * (6 * 8 * 8) * 16


def test_a_report_comes_back_from_its_json(report: BenchReport) -> None:
    data = json.loads(json.dumps(report.to_json()))
    assert BenchReport.from_json(data) == report
    (windows,) = (
        r for r in data["results"] if (r["variant"], r["runtime"], r["subject"]) == ("windows", "torch", "model")
    )
    assert set(windows["times_as_fast_as"]) == {"full", "paper"}
    assert windows["seconds"]["q1"] <= windows["seconds"]["median"] <= windows["seconds"]["q3"]
    assert data["machine"]["cores"] >= 1
    assert data["versions"]["python"] == platform.python_version()
    assert data["command"] == "t3compile bench tiny"


def test_processes_of_their_own_measure_onnxruntime() -> None:
    layer = AttentionLayer.by_tokens(ARGS, heads=2, head_dim=8, dtype="float32")
    settings = BenchSettings(against=("paper",), runtimes=("ort",), repeats=2)
    found = bench([Workload("2x4x6", layers={layer: 3})], settings)
    assert found.passed
    assert [(d.variant, d.runtime) for d in found.differences] == [("paper", "ort")]
    assert [m.layers for m in found.measurements] == [3] * 2
    assert found.notes == ("2x4x6 has no model around its attention: only attention was measured",)
    assert {p.engine for p in found.processes} == {"onnxruntime-cpu"}
    for process in found.processes:
        assert process.memory.peak_bytes is not None
        assert process.memory.growth_bytes is not None
        assert process.memory.peak_bytes > 2**26
    (peak,) = found.peaks
    assert (peak.dtype, peak.device) == ("float32", "cpu")
    assert peak.flops_per_s > 1e8


def test_a_process_that_dies_is_reported_and_the_others_go_on(
    programs: tuple[Program, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ChildProcess.ask

    def dying(self: ChildProcess, request: str, **fields: Any) -> dict[str, Any]:
        if request == "time" and str(fields["name"]).startswith("paper"):
            os.kill(self._process.pid, signal.SIGKILL)
        return ask(self, request, **fields)

    monkeypatch.setattr(ChildProcess, "ask", dying)
    monkeypatch.setattr(run_benchmark._Run, "_measure_peak", lambda *_: None)
    settings = BenchSettings(against=("paper",), subjects=("model",), repeats=2)
    found = bench([Workload.of_model("tiny", *reversed(programs))], settings)
    (gone,) = found.not_run
    assert (gone.variant, gone.runtime, gone.exit_code) == ("paper", "torch", -9)
    assert {m.variant for m in found.measurements} == {"windows"}
    assert not found.passed


def test_another_function_in_a_variants_place_is_found(
    programs: tuple[Program, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    from t3compile.benchmark import cases

    def swapped(rewritten: Program, variant: Any, original: Program | None = None) -> Program:
        return variant_program(rewritten, "full" if variant == "paper" else variant, original)

    monkeypatch.setattr(cases, "variant_program", swapped)
    monkeypatch.setattr(run_benchmark, "child_process", InThisProcess)
    settings = BenchSettings(against=("paper",), subjects=("attention",), repeats=1)
    found = bench([Workload.of_model("tiny", *reversed(programs))], settings)
    assert not found.passed
    assert all(not d.passed for d in found.differences if d.variant == "paper")


def test_without_the_rewritten_program_nothing_is_passed_off_as_compared(
    programs: tuple[Program, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(InThisProcess):
        def ask(self, request: str, **fields: Any) -> dict[str, Any]:
            if request == "matrix_peak" or str(fields.get("name")).startswith("windows"):
                raise WorkerError("out of order")
            return super().ask(request, **fields)

    monkeypatch.setattr(run_benchmark, "child_process", Failing)
    settings = BenchSettings(against=("paper",), subjects=("model",), repeats=1)
    found = bench([Workload.of_model("tiny", *reversed(programs))], settings)
    assert {(one.runtime, one.variant) for one in found.not_run} == {("matrix-product peak", ""), ("torch", "windows")}
    assert found.differences == ()
    assert found.notes == ("tiny, model model: paper in torch was not compared: the rewritten program has not run",)
    assert not found.passed
    assert list(bench_tables(found))


def test_nothing_to_measure_is_an_error(programs: tuple[Program, Program]) -> None:
    with pytest.raises(EngineError, match=r"nothing was measured: trt: .*tensorrt"):
        bench([Workload.of_model("tiny", *reversed(programs))], BenchSettings(runtimes=("trt",)))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_asked_by_events_and_the_kernel_is_seen() -> None:
    pytest.importorskip("triton")
    args = WindowAttentionArgs(TokenGrid(3, 8, 8), WindowPattern(Splits(1, 2, 2)))
    layer = AttentionLayer.by_tokens(args, heads=2, head_dim=64, dtype="bfloat16")
    settings = BenchSettings(against=("full", "paper", "regrouped"), device="cuda", repeats=2)
    found = bench([Workload("3x8x8", layers={layer: 1})], settings)
    assert found.passed
    assert found.machine.gpu
    (windows,) = (p for p in found.processes if p.variant == "windows")
    assert windows.paths[0].startswith("kernel: ")
    assert windows.memory.device_bytes is not None


# --- the command ---------------------------------------------------------------------------------


def _bench(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_a_rewritten_file_is_measured_by_one_command(
    programs: tuple[Program, Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_benchmark, "child_process", InThisProcess)
    file = programs[1].save(tmp_path / "windows.pt2")
    output = tmp_path / "report.json"
    options = ("--runtime", "torch,ort", "--against", "full", "--what", "model", "--repeats", "1")
    result = _bench(file, *options, "-o", output, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    printed = json.loads(result.stdout)
    assert printed == json.loads(output.read_text())
    found = BenchReport.from_json(printed)
    assert {m.variant for m in found.measurements} == {"windows", "full"}
    (same,) = (d for d in found.differences if d.allowed is not None)
    assert (same.variant, same.runtime, same.passed) == ("windows", "ort", True)
    assert same.magnitude > 0.1
    # Full attention was put back into the file's own graph.
    full, windows = (found.find("as given", "model", "model", v, "torch") for v in ("full", "windows"))
    assert full is not None
    assert windows is not None
    assert full.macs > windows.macs


def test_a_folder_is_measured_at_several_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_benchmark, "child_process", InThisProcess)
    config = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, 2, 2],
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 1,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ("--random-weights", "--text-tokens", "7", "--runtime", "torch", "--repeats", "1", "--what", "attention")
    sizes = ("--sizes", "9x64x96,5x64x96", "--schedule", "1,2,2", "--against", "paper")
    result = _bench(tmp_path, *options, *sizes, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    found = BenchReport.from_json(json.loads(result.stdout))
    assert found.groups() == (("9x64x96", "attention"), ("5x64x96", "attention"))
    assert found.cases("5x64x96", "attention") == ("(1,2,2) on 2x4x6", TOTAL)
    result = _bench(tmp_path, *options, *sizes, "--frames", "9")
    assert result.exit_code == 2
    assert "leave out --frames" in result.stderr


def test_sizes_of_a_file_are_its_own(programs: tuple[Program, Program], tmp_path: Path) -> None:
    file = programs[1].save(tmp_path / "windows.pt2")
    result = _bench(file, "--sizes", "480p:25")
    assert result.exit_code == 2
    assert "has the one size that it was traced at: leave out --sizes" in result.stderr
    result = _bench(file, "--heads", "4")
    assert result.exit_code == 2
    assert "--heads is for presets" in result.stderr


def test_a_model_without_sites_is_refused(tmp_path: Path) -> None:
    file = t3compile.trace(nn.Linear(4, 4), (torch.ones(2, 4),)).save(tmp_path / "linear.pt2")
    result = _bench(file)
    assert result.exit_code == 2
    assert "no t3::window_attention to compare" in result.stderr


def test_a_stopped_command_leaves_no_file_and_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "t3compile", "bench", "t3-wan2.1-4k", "--sizes", "5x64x64", "--heads", "1"]
    command += ["--what", "attention", "--against", "paper", "--runtime", "torch", "--repeats", "1000000"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=variables, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if ": round 1 of" in line:
            break
    workers = _workers_in(tmp_path)
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(60) == 130, (lines, said)
    assert "stopped; nothing unfinished was left behind" in said
    assert len(workers) == 2, lines
    assert not any(map(_is_running, workers))
    assert list(tmp_path.iterdir()) == []


def _workers_in(folder: Path) -> list[int]:
    """Processes of workers whose temporary folder lies in ``folder``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            is_worker = b"t3compile.benchmark.worker" in (process / "cmdline").read_bytes()
        except OSError:
            continue
        if is_worker and any(v.startswith(f"TMPDIR={folder}".encode()) for v in variables):
            found.append(int(process.name))
    return found
