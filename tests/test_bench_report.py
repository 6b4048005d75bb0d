"""What follows from times: turns, medians, ratios, tables, the picture; and what the command refuses."""

from __future__ import annotations

import builtins
import datetime
import json
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from t3compile.benchmark.bench_report import TOTAL, BenchReport, Difference, Measurement, NotRun, ProcessRecord
from t3compile.benchmark.child_process import WorkerDied
from t3compile.benchmark.load_target import stopwatch_for
from t3compile.benchmark.machine import this_machine
from t3compile.benchmark.messages import MatrixPeak, Memory
from t3compile.benchmark.plot import write_plot
from t3compile.benchmark.sizes import Keep, parse_sizes, preset_grid, scaled_schedule
from t3compile.benchmark.summaries import Ratio, Spread, weighted_rounds
from t3compile.benchmark.tables import bench_tables
from t3compile.benchmark.turns import Lane, measure_in_turns
from t3compile.benchmark.worker import calls_of_a_sample
from t3compile.cli import main
from t3compile.errors import GridError, InputsError, MissingExtraError
from t3compile.geometry import TokenGrid
from t3compile.presets import preset_named
from t3compile.stopwatch import CudaEvents, WallClock
from tests.bench_suite import ATTENTION, CYCLE, output_name, require_green_tests

# --- times ---------------------------------------------------------------------------------------


class FakeClock:
    """Moves on by a given time at every look."""

    def __init__(self, *steps: float) -> None:
        self.steps, self.now = list(steps), 0.0

    def __call__(self) -> float:
        self.now += self.steps.pop(0)
        return self.now


def test_the_wall_clock_waits_and_divides_by_the_calls() -> None:
    happened: list[str] = []
    watch = WallClock(FakeClock(0, 6.0), lambda: happened.append("waited"))
    assert watch.seconds(lambda: happened.append("called"), calls=3) == 2.0
    assert happened == ["called"] * 3 + ["waited"]


@pytest.mark.parametrize("runtime", ["torch", "compile", "ort", "aoti", "trt"])
def test_events_time_torch_on_a_gpu_and_the_clock_everything_else(runtime: str) -> None:
    assert isinstance(stopwatch_for(runtime, "cpu"), WallClock)
    kind = CudaEvents if runtime in ("torch", "compile") else WallClock
    assert isinstance(stopwatch_for(runtime, "cuda"), kind)


def test_short_calls_are_repeated_within_a_sample() -> None:
    assert [calls_of_a_sample(s) for s in (10.0, 0.05, 0.02, 0.0001, 0.0)] == [1, 1, 3, 100, 1]


class Scripted:
    """A child that takes these times, or fails at one of them."""

    def __init__(self, log: list[str], name: str, times: dict[str, list[float]]) -> None:
        self.log, self.name, self.times = log, name, times

    def ask(self, request: str, **fields: Any) -> dict[str, Any]:
        assert request == "time"
        self.log.append(f"{self.name}.{fields['name']}")
        seconds = self.times[fields["name"]].pop(0)
        if seconds < 0:
            raise WorkerDied(-9, "")
        return {"seconds": seconds}


def test_variants_are_asked_in_turns_and_shared_targets_once() -> None:
    log: list[str] = []
    windows = Lane("windows", Scripted(log, "w", {"w0": [1, 2], "w1": [3, 4]}), {"a": "w0", "b": "w1"})
    full = Lane("full", Scripted(log, "f", {"f0": [10, 20]}), {"a": "f0", "b": "f0"})
    rounds: list[int] = []
    timed: list[str] = []
    measure_in_turns(
        [windows, full], ["a", "b"], 2, rounds.append, lambda lane, target: timed.append(f"{lane.variant[0]}.{target}")
    )
    assert rounds == [1, 2]
    assert timed == log
    assert log == ["w.w0", "f.f0", "w.w1"] * 2
    assert windows.times_s == {"a": [1, 2], "b": [3, 4]}
    assert full.times_s == {"a": [10, 20], "b": [10, 20]}


def test_a_lane_whose_child_dies_leaves_and_the_others_go_on() -> None:
    log: list[str] = []
    windows = Lane("windows", Scripted(log, "w", {"w": [1, 2, 3]}), {"a": "w"})
    paper = Lane("paper", Scripted(log, "p", {"p": [5, -1, 7]}), {"a": "p"})
    measure_in_turns([windows, paper], ["a"], 3)
    assert windows.times_s == {"a": [1, 2, 3]}
    assert isinstance(paper.error, WorkerDied)
    assert log == ["w.w", "p.p", "w.w", "p.p", "w.w"]


def test_spread_is_median_quartiles_and_ends() -> None:
    assert Spread.of([4, 1, 3, 2, 5]) == Spread(3, 2, 4, 1, 5)
    assert Spread.of([7]) == Spread(7, 7, 7, 7, 7)


def test_paired_ratios_hold_where_the_machine_slows_down() -> None:
    # The baseline takes twice as long in every round, while all rounds get slower.
    ratio = Ratio.of([1, 2, 4], [2, 4, 8])
    assert (ratio.of_medians, ratio.pairs) == (2, Spread(2, 2, 2, 2, 2))
    # One disturbed round moves the ratio of medians and not that of pairs.
    disturbed = Ratio.of([1, 9, 9], [2, 18, 2])
    assert disturbed.pairs.median == 2
    assert disturbed.of_medians == pytest.approx(2 / 9)


def test_a_cycle_is_the_sum_of_its_layers_round_by_round() -> None:
    assert weighted_rounds([[1, 2], [10, 20]], [3, 1]) == (13, 26)


# --- the report ----------------------------------------------------------------------------------


def _measurement(**changes: Any) -> Measurement:
    first = Measurement("480p:25", "attention", "(2,1,1)", "windows", "torch", "float32", 2, 10**9, (1.0, 2.0, 3.0))
    return replace(first, **changes)


@pytest.fixture
def report() -> BenchReport:
    """Two patterns, of two layers and of one, in three variants, and a whole model."""
    attention = [
        _measurement(case=case, layers=layers, variant=variant, macs=macs, times_s=tuple(slower * t for t in (1, 2, 3)))
        for case, layers, factor in (("(2,1,1)", 2, 1), ("(1,2,3)", 1, 3))
        for variant, macs, slower in (
            ("windows", 10**9, factor),
            ("full", 8 * 10**9, 6),
            ("paper", 2 * 10**9, 2 * factor),
        )
    ]
    model = [
        _measurement(
            subject="model", case="model", layers=1, variant="windows", macs=10**10, times_s=(10.0, 12.0, 14.0)
        ),
        _measurement(
            subject="model", case="model", layers=1, variant="full", macs=3 * 10**10, times_s=(20.0, 24.0, 28.0)
        ),
    ]
    memory = Memory(3 * 2**30, 2 * 2**30, 2**30)
    return BenchReport(
        "t3compile bench x",
        "2026-01-02T03:04:05+00:00",
        this_machine(),
        {"torch": "2"},
        "cpu",
        3,
        1,
        (MatrixPeak("float32", "cpu", 2048, 10e9, 2),),
        (*attention, *model),
        (ProcessRecord("480p:25", "model", "windows", "torch", "torch eager, cpu", memory, ("regrouped: on cpu",)),),
        (Difference("480p:25", "attention", "(2,1,1)", "paper", "torch", 1e-6, 1.0, 3e-4),),
        (NotRun("trt", "no GPU"),),
        ("a note",),
    )


def test_ratios_shares_and_totals(report: BenchReport) -> None:
    ours = report.find("480p:25", "attention", "(2,1,1)", "windows", "torch")
    assert ours is not None
    full, paper = report.ratio(ours, "full"), report.ratio(ours, "paper")
    assert full is not None
    assert full.of_medians == 6
    assert paper is not None
    assert paper.pairs.median == 2
    assert report.ratio(ours, "regrouped") is None
    # 2e9 FLOP in 2 s beside 16e9 in 12 s, and beside 10e9 a second.
    assert ours.flops_per_s == 1e9
    assert report.share_of_full(ours) == pytest.approx(0.75)
    assert report.share_of_peak(ours) == pytest.approx(0.1)
    total = report.find("480p:25", "attention", TOTAL, "windows", "torch")
    assert total is not None
    assert (total.layers, total.macs, total.times_s) == (3, 3 * 10**9, (5, 10, 15))


def test_a_total_needs_all_of_its_cases(report: BenchReport) -> None:
    fewer = replace(report, measurements=report.measurements[:5])
    assert fewer.find("480p:25", "attention", TOTAL, "paper", "torch") is None
    assert fewer.find("480p:25", "attention", TOTAL, "full", "torch") is not None


def test_a_report_passes_unless_functions_differ_or_a_process_failed(report: BenchReport) -> None:
    assert report.passed  # a runtime that this machine lacks is no failure
    wrong = replace(report.differences[0], error=0.5)
    assert not replace(report, differences=(wrong,)).passed
    assert not replace(report, not_run=(NotRun("ort", "died", "480p:25", "model", "full", -9),)).passed


def test_growth_is_what_calls_add_on_the_device_they_run_on() -> None:
    assert Memory(300, 200, 150).growth_bytes == 50
    assert Memory(300, 200, 150, 90, 20).growth_bytes == 70
    assert Memory(300).growth_bytes is None


def test_tables_show_medians_ratios_memory_and_what_was_not_run(report: BenchReport) -> None:
    tables = {table.title: table for table in bench_tables(report)}
    attention = tables["Attention, 480p:25, torch: one call each; all layers together"]
    assert [row[0] for row in attention.rows] == ["(2,1,1)", "(1,2,3)", TOTAL]
    row = dict(zip(attention.columns, attention.rows[0], strict=True))
    assert row["windows (ms)"] == "2,000.0 (1,500.0-2,500.0)"
    assert row["over full"] == "6.00x (6.00-6.00)"
    assert row["over paper"] == "2.00x (2.00-2.00)"
    assert (row["GFLOP/s"], row["of full's"], row["of peak"]) == ("1", "75%", "10%")
    model = tables["Whole model, 480p:25"]
    assert [row[:4] for row in model.rows] == [
        ("torch", "windows", "12,000.0 (11,000.0-13,000.0)", "-"),
        ("torch", "full", "24,000.0 (22,000.0-26,000.0)", "2.00x (2.00-2.00)"),
    ]
    assert model.rows[0][-2:] == ("3.0 GiB", "1.0 GiB")
    assert tables["Not run"].rows == (("trt", "no GPU"),)
    (difference,) = tables["Outputs beside the rewritten program's"].rows
    assert difference[-1] == "same within 0.0003"
    lines = attention.markdown().splitlines()
    assert lines[3] == "| " + " | ".join(["---"] * len(attention.columns)) + " |"
    assert len(lines) == 4 + len(attention.rows)


def test_json_is_read_back_and_a_foreign_one_refused(report: BenchReport) -> None:
    data = json.loads(json.dumps(report.to_json()))
    assert BenchReport.from_json(data) == report
    with pytest.raises(InputsError, match="no report"):
        BenchReport.from_json({"t3compile_plan": 1})
    del data["machine"]
    with pytest.raises(InputsError, match="damaged: 'machine'"):
        BenchReport.from_json(data)


def _png_size_and_pixels(data: bytes) -> tuple[int, int, bytes]:
    """A PNG taken apart by hand: chunks with right checksums, and pixels that inflate."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, size, packed = 8, (0, 0), b""
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        assert checksum == zlib.crc32(kind + body)
        if kind == b"IHDR":
            size = struct.unpack(">II", body[:8])
        if kind == b"IDAT":
            packed += body
        at += 12 + length
    return *size, zlib.decompress(packed)


def test_the_picture_is_a_png_with_something_on_it(report: BenchReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write_plot(report, tmp_path / "times.png")
    width, height, pixels = _png_size_and_pixels(path.read_bytes())
    assert width > 800
    assert height > 400
    # Rows are a filter byte and 4 bytes a pixel.
    assert len(pixels) == height * (4 * width + 1)
    assert len(set(pixels)) > 20
    assert [file.name for file in tmp_path.iterdir()] == ["times.png"]


def test_without_matplotlib_the_remedy_is_told_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"pip install 't3compile\[plot\]'"):
        write_plot(None, tmp_path / "x.png")  # type: ignore[arg-type]
    result = _bench("t3-wan2.1-4k", "--plot", tmp_path / "x.png")
    assert result.exit_code == 2
    assert "t3compile[plot]" in result.stderr
    assert list(tmp_path.iterdir()) == []


# --- sizes ---------------------------------------------------------------------------------------


def test_sizes_are_named_or_in_pixels() -> None:
    found = [(s.text, s.frames, s.height, s.width) for s in parse_sizes("480p:25, 720p,25x480x840")]
    assert found == [("480p:25", 25, 480, 832), ("720p", 81, 720, 1280), ("25x480x840", 25, 480, 840)]


@pytest.mark.parametrize("text", ["", "480", "480p:", "480p:x", "25x480", "8k", "480p,"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(InputsError, match="is not a size: give FRAMESxHEIGHTxWIDTH"):
        parse_sizes(text)


def test_a_size_given_twice_is_refused() -> None:
    with pytest.raises(InputsError, match="names 25x480x832 twice"):
        parse_sizes("480p:25,25x480x832")


@pytest.mark.parametrize(
    ("name", "text", "grid"),
    [
        ("t3-wan2.1-4k", "4k", (21, 136, 240)),
        ("t3-wan2.1-4k", "480p:25", (7, 30, 52)),
        ("t3-wan2.2-4k", "4k", (21, 68, 120)),
    ],
)
def test_grids_of_presets_follow_from_pixels(name: str, text: str, grid: tuple[int, int, int]) -> None:
    preset = preset_named(name)
    (size,) = parse_sizes(text)
    assert preset_grid(preset, size) == TokenGrid(*grid)


@pytest.mark.parametrize(("arguments", "keep"), [(ATTENTION, "windows"), (CYCLE, "splits")])
def test_the_suites_grids_divide_as_the_papers_formulation_needs(arguments: list[str], keep: Keep) -> None:
    preset = preset_named("t3-wan2.1-4k")
    (size,) = parse_sizes(arguments[arguments.index("--sizes") + 1])
    grid = preset_grid(preset, size)
    assert ("--keep" in arguments) == (keep == "splits")
    assert all(pattern.splits.divide(grid) for pattern in scaled_schedule(preset, grid, keep).patterns)


def test_windows_of_a_scaled_preset_keep_their_extent() -> None:
    preset = preset_named("t3-wan2.1-4k")
    assert scaled_schedule(preset, preset.grid) is preset.schedule
    # A quarter of the height and width, all frames: windows (1,34,60), (21,8.5,7.5), ...
    scaled = scaled_schedule(preset, TokenGrid(21, 34, 60))
    assert [p.splits.counts for p in scaled.patterns] == [(21, 1, 1), (1, 4, 8), (1, 2, 10), (3, 4, 2), (7, 2, 2)]


def test_a_preset_may_keep_its_splits_at_another_size() -> None:
    """So every pattern keeps its share of the work: merging coinciding branches saves 1.69 times at 4K."""
    preset = preset_named("t3-wan2.1-4k")
    grid = TokenGrid(21, 34, 60)
    patterns = scaled_schedule(preset, grid, "splits").patterns
    assert patterns == preset.schedule.patterns
    shares = [
        sum(p.pairs(on, merged=False) for p in patterns) / sum(p.pairs(on) for p in patterns)
        for on in (grid, preset.grid)
    ]
    assert shares == pytest.approx([1.69, 1.69], abs=0.01)
    with pytest.raises(GridError, match=r"splits \(1,17,30\) .* cut no grid as small as 21x8x60"):
        scaled_schedule(preset, TokenGrid(21, 8, 60), "splits")


# --- the command ---------------------------------------------------------------------------------


def _bench(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x.pt2", "--runtime", "torch,tvm"), "'tvm' is none of torch, compile, ort, aoti, trt"),
        (("x.pt2", "--against", "half"), "'half' is none of full, paper, regrouped"),
        (("x.pt2", "--what", "all"), "'all' is none of attention, model"),
        (("nowhere.pt2",), "there is no file or folder 'nowhere.pt2'"),
        (("t3-wan2.1-4k", "--schedule", "5,1,1"), "'t3-wan2.1-4k' is no model to load: leave out --schedule"),
        (("t3-wan2.1-4k", "--sizes", "480p:26"), "frames must be 4*k + 1"),
        (("t3-wan2.1-4k", "--json", "--markdown"), "leave one out"),
        (("t3-wan2.1-4k", "-o", "no/such/folder/x.json"), "the folder 'no/such/folder' does not exist"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: tuple[str, ...], message: str) -> None:
    result = _bench(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_without_a_gpu_nothing_is_measured_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = _bench("t3-wan2.1-4k", "--sizes", "5x64x64", "--device", "cuda", "--runtime", "torch")
    assert result.exit_code == 2
    assert "torch sees no CUDA device" in result.stderr


def test_the_command_shows_what_was_measured(
    report: BenchReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t3compile.benchmark.run_benchmark.bench", lambda *_, **__: report)
    monkeypatch.setattr("t3compile.cli.bench_command._workloads", lambda _: [])
    output = tmp_path / "report.json"
    shown = _bench("x", "--markdown", "-o", output)
    assert shown.exit_code == 0
    titles = [line.strip("*").partition(",")[0] for line in shown.stdout.splitlines() if line.startswith("**")]
    assert titles == [table.title.partition(",")[0] for table in bench_tables(report)]
    assert f"{report.machine}; {report.date}" in shown.stdout
    assert "note: a note" in shown.stderr
    assert "not run: trt: no GPU" in shown.stderr
    assert BenchReport.from_json(json.loads(output.read_text())) == report
    plain = _bench("x")
    assert "Whole model, 480p:25" in plain.stdout
    assert "**" not in plain.stdout


def test_another_function_is_an_error_with_exit_code_1(report: BenchReport, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(report, differences=(replace(report.differences[0], error=0.5),))
    monkeypatch.setattr("t3compile.benchmark.run_benchmark.bench", lambda *_, **__: wrong)
    monkeypatch.setattr("t3compile.cli.bench_command._workloads", lambda _: [])
    result = _bench("x")
    assert result.exit_code == 1
    assert "paper in torch is another function, largest difference 0.5 at magnitude 1" in result.stderr


# --- the suite -----------------------------------------------------------------------------------


def _tree(root: Path) -> Path:
    (root / "tests").mkdir()
    (root / "tests" / "test_x.py").write_text("x = 1\n")
    (root / "pyproject.toml").write_text("")
    (root / "constraints.txt").write_text("")
    return root


def test_the_suite_measures_nothing_when_tests_are_red(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, green = _tree(tmp_path), tmp_path / "cache" / "green"
    with pytest.raises(SystemExit) as stopped:
        require_green_tests((sys.executable, "-c", "raise SystemExit(3)"), green, root)
    assert stopped.value.code == 1
    assert "the tests are red (exit code 3): nothing was measured" in capsys.readouterr().err
    assert not green.exists()


def test_the_suite_runs_tests_once_for_the_same_files(tmp_path: Path) -> None:
    root, green, runs = _tree(tmp_path), tmp_path / "cache" / "green", tmp_path / "runs"
    command = (sys.executable, "-c", f"open({str(runs)!r}, 'a').write('x')")
    for _ in range(2):
        require_green_tests(command, green, root)
    assert runs.read_text() == "x"
    (root / "tests" / "test_x.py").write_text("x = 2\n")
    require_green_tests(command, green, root)
    assert runs.read_text() == "xx"


def test_outputs_of_the_suite_are_named_by_day_and_processor() -> None:
    assert output_name("AMD EPYC (TM) 7R13", datetime.date(2026, 1, 2)) == "2026-01-02-amd-epyc-tm-7r13"
