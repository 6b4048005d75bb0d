"""The command line: the whole line, results on stdout and messages on stderr, exit codes, missing extras."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from t3compile.cli import main

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "inspect",
    "plan",
    "cost",
    "rewrite",
    "verify",
    "export",
    "build-engine",
    "run",
    "bench",
    "kernels",
    "deploy",
    "doctor",
)
CONFIG = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}
# 3x4x6 tokens.
SIZE = ("--frames", "9", "--height", "64", "--width", "96", "--text-tokens", "7")


def _invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def _done(code: int, *arguments: str | Path) -> Result:
    result = _invoke(*arguments)
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def _json(code: int, *arguments: str | Path) -> Any:
    """The result of a command with --json: stdout is JSON and nothing else."""
    return json.loads(_done(code, *arguments, "--json").stdout)


def _environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **variables}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wan") / "transformer"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def source(folder: Path) -> tuple[str, ...]:
    return (str(folder), "--random-weights", *SIZE)


@dataclass(frozen=True)
class Line:
    """What each command of the whole line said and wrote."""

    folder: Path
    results: dict[str, Result]

    def json(self, name: str) -> Any:
        return json.loads(self.results[name].stdout)


@pytest.fixture(scope="module")
def line(source: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Line:
    """inspect -> plan -> edit -> cost -> rewrite --plan -> verify -> export -> run, as a user types it."""
    out = tmp_path_factory.mktemp("line")
    results = {}

    def step(name: str, *arguments: str | Path) -> None:
        results[name] = _done(0, *arguments, "--json")

    step("inspect", "inspect", *source, "--schedule", "3,1,1/1,2,3")
    step("plan", "plan", *source, "--schedule", "3,1,1/1,2,3", "-o", out / "plan.json")
    plan = json.loads((out / "plan.json").read_text())
    plan["sites"][1]["pattern"]["splits"] = [1, 2, 2]
    (out / "edited.json").write_text(json.dumps(plan))
    step("cost", "cost", *source, "--plan", out / "edited.json")
    step("rewrite", "rewrite", *source, "--plan", out / "edited.json", "-o", out / "windows.pt2")
    step("verify", "verify", *source, out / "windows.pt2")
    step("export", "export", out / "windows.pt2", "-o", out / "windows.onnx")
    generator = np.random.default_rng(0)
    np.savez(
        out / "inputs.npz",
        hidden_states=generator.standard_normal((1, 4, 3, 8, 12), dtype=np.float32),
        timestep=np.full((1,), 5.0, dtype=np.float32),
        encoder_hidden_states=generator.standard_normal((1, 7, 16), dtype=np.float32),
    )
    for kind in ("onnx", "pt2"):
        inputs = ("--inputs", out / "inputs.npz", "-o", out / f"{kind}.npz", "--repeat", "2")
        step(f"run {kind}", "run", out / f"windows.{kind}", *inputs)
    return Line(out, results)


# --- the whole line ------------------------------------------------------------------------------


def test_results_are_on_stdout_and_messages_on_stderr(line: Line) -> None:
    for result in line.results.values():
        json.loads(result.stdout)
        assert "Traceback" not in result.stderr
    for name in ("inspect", "plan", "rewrite"):
        stderr = line.results[name].stderr
        assert "warning: T3 changes the function" in stderr
        assert "note: no VAE configuration was found" in stderr
    assert f"wrote {line.folder / 'windows.pt2'}" in line.results["rewrite"].stderr


def test_inspect_tells_sites_grid_plan_and_cost(line: Line) -> None:
    result = line.json("inspect")
    assert set(result) == {"traced", "survey", "plan", "cost"}
    assert result["traced"] == {
        "by": "torch.export, non-strict (not compared with eager: the weights are not in memory)",
        "notes": ["no VAE configuration was found beside the model: using VAE factors 4x8x8 (time x height x width)"],
    }
    assert [site["grid"] for site in result["survey"]["found"]] == [[3, 4, 6]] * 2
    assert {call["reason"] for call in result["survey"]["declined"]} == {"cross-attention"}
    # (3,1,1) merged: a third; (1,2,3) twice a sixth: a third.
    assert result["cost"]["attention_factor"] == pytest.approx(3.0)
    assert result["cost"]["dense_attention_macs"] == 2 * 2 * 2 * 72 * 72 * 12


def test_the_edited_plan_is_what_is_carried_out(line: Line) -> None:
    assert line.json("plan") == json.loads((line.folder / "plan.json").read_text())
    edited = json.loads((line.folder / "edited.json").read_text())
    result = line.json("rewrite")
    assert result["plan"] == edited
    assert [site["pattern"]["splits"] for site in result["plan"]["sites"]] == [[3, 1, 1], [1, 2, 2]]
    assert result["cost"] == line.json("cost")
    assert result["cost"]["attention_factor"] == pytest.approx(2 / (1 / 3 + 2 / 4))


def test_rewrite_and_verify_prove_it(line: Line) -> None:
    for report in (line.json("rewrite")["verification"], line.json("verify")):
        assert report["passed"] is True
        kinds = [check["kind"] for check in report["checks"]]
        assert kinds == ["identity", "site", "site", "model", "graph", "weights", "pattern", "pattern"]
        assert report["not_run"] == []


def test_export_and_run_agree_with_torch(line: Line) -> None:
    exported = line.json("export")
    assert exported["comparison"]["passed"] is True
    assert len(exported["functions"]) == 2
    with np.load(line.folder / "onnx.npz") as ours, np.load(line.folder / "pt2.npz") as torch_output:
        assert list(ours) == list(torch_output) == ["output"]
        assert ours["output"].shape == (1, 4, 3, 8, 12)
        assert (
            np.abs(ours["output"] - torch_output["output"]).max() <= 2 * exported["comparison"]["outputs"][0]["allowed"]
        )
    for kind in ("onnx", "pt2"):
        run = line.json(f"run {kind}")
        assert len(run["times_s"]) == 2
        assert run["outputs"] == [{"name": "output", "shape": [1, 4, 3, 8, 12], "dtype": "float32"}]


def test_only_the_results_were_written(line: Line) -> None:
    names = {"plan.json", "edited.json", "windows.pt2", "windows.onnx", "windows.onnx.data", "inputs.npz"}
    assert {file.name for file in line.folder.iterdir()} == names | {"onnx.npz", "pt2.npz"}


def test_tables_are_plain_text_off_a_terminal(line: Line, source: tuple[str, ...]) -> None:
    inspected = _done(0, "inspect", *source, "--schedule", "1,2,3").stdout
    assert "Found: 2 full self-attention calls" in inspected
    assert "3x4x6" in inspected
    assert "cross-attention" in inspected
    assert "whole model" in inspected
    verified = _done(0, "verify", *source, line.folder / "windows.pt2").stdout
    assert "Verification on grid 3x4x6" in verified
    assert "FAILED" not in verified
    assert verified.count(" ok") == 8
    ran = _done(0, "run", line.folder / "windows.onnx", "--inputs", line.folder / "inputs.npz")
    assert "1, 4, 3, 8, 12" in ran.stdout
    assert "median" in ran.stderr
    for text in (inspected, verified, ran.stdout):
        assert "\x1b" not in text


# --- exit codes ----------------------------------------------------------------------------------


def test_exit_1_against_a_wrong_original(line: Line, source: tuple[str, ...]) -> None:
    """The same architecture with other weights."""
    result = _done(1, "verify", *source, "--seed", "1", line.folder / "windows.pt2", "--json")
    report = json.loads(result.stdout)
    assert report["passed"] is False
    failed = [check["kind"] for check in report["checks"] if not check["passed"]]
    assert failed == ["model", "weights"]
    assert "FAILED" in _done(1, "verify", *source, "--seed", "1", line.folder / "windows.pt2").stdout


def test_exit_1_and_no_file_when_rewrite_fails_its_check(
    source: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from t3compile.verification import Check, VerifyReport

    report = VerifyReport("3x4x6", (Check("site", "sdpa", float("nan"), 1.0, 1.0),))
    monkeypatch.setattr("t3compile.pipeline.verify", lambda *_, **__: report)
    result = _done(1, "rewrite", *source, "--schedule", "1,2,3", "-o", tmp_path / "x.pt2")
    assert "was not written: a check failed" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_exit_3_when_something_is_left_full(source: tuple[str, ...], tmp_path: Path) -> None:
    result = _done(3, "rewrite", *source, "-o", tmp_path / "x.pt2", "--json")
    assert result.stderr.count("left full: ") == 2
    assert "too short: 72 tokens" in result.stderr
    assert "no attention call was rewritten" in result.stderr
    assert json.loads(result.stdout)["verification"] is None
    plan = _json(0, "plan", *source, "--schedule", "1,2,3", "-o", tmp_path / "plan.json")
    plan["sites"][0] |= {"pattern": None, "reason": "kept by hand"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    result = _done(3, "rewrite", *source, "--plan", tmp_path / "plan.json", "-o", tmp_path / "y.pt2", "--no-verify")
    assert result.stderr.count("left full: ") == 1
    assert "kept by hand" in result.stderr
    assert (tmp_path / "y.pt2").is_file()


def _refused(result: Result, *texts: str) -> None:
    """Exit code 2, nothing on stdout, one line 'error: ...' with these texts."""
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    said = ("... ", "note: ", "traced by ", "runtime: ")
    lines = [line for line in result.stderr.splitlines() if not line.startswith(said)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert [text for text in texts if text not in lines[0]] == []


def test_a_grid_that_does_not_fit_names_the_numbers(source: tuple[str, ...]) -> None:
    _refused(_invoke("inspect", *source, "--grid", "3x4x7"), "3x4x7", "72")


@pytest.mark.parametrize(
    ("schedule", "texts"),
    [("9,1,1", ["(9,1,1)", "3x4x6", "axis t has 3 tokens"]), ("t3-wan2.1-4k", ["t3-wan2.1-4k", "3x4x6"])],
)
def test_a_schedule_that_does_not_fit_is_named(schedule: str, texts: list[str], source: tuple[str, ...]) -> None:
    _refused(_invoke("plan", *source, "--schedule", schedule), *texts)


WRONG_CHOICES = {
    ("--schedule", "1,2"): ["schedule '1,2'", "three whole numbers"],
    ("--schedule", "1,2,3/x"): ["'x' is not three whole numbers"],
    ("--schedule", "0,1,1"): ["at least 1"],
    ("--schedule", "best"): ["schedule 'best' is unknown", "auto"],
    ("--grid", "3 by 4"): ["grid '3 by 4' is not of the form TxHxW"],
    ("--schedule", "²,1,1"): ["'²,1,1' is not three whole numbers"],
    ("--schedule", "3x4x6=best"): ["schedule 'best' is unknown"],
    ("--grid", "0x4x6"): ["at least 1"],
    ("--grid", "3x4x6@²"): ["grid '3x4x6@²' is not of the form TxHxW@START"],
}
WRONG_PLANS = {
    ("--plan", "none.json"): ["cannot read the plan", "none.json"],
    ("--plan", "bad.json"): ["the plan is not JSON"],
}
TAKES = {
    ("inspect",): WRONG_CHOICES,
    ("plan",): WRONG_CHOICES,
    ("cost",): WRONG_CHOICES | WRONG_PLANS,
    ("rewrite", "-o", "x.pt2"): WRONG_CHOICES | WRONG_PLANS,
    ("bench",): WRONG_CHOICES | WRONG_PLANS,
    ("kernels", "build", "-o", "kernels"): WRONG_CHOICES | WRONG_PLANS,
    ("verify", "none.pt2"): WRONG_PLANS | {(): ["there is no file or folder 'none.pt2'"]},
}


@pytest.mark.parametrize(
    ("command", "mistake", "texts"),
    [(command, mistake, texts) for command, wrong in TAKES.items() for mistake, texts in wrong.items()],
)
def test_a_mistake_in_planning_is_told_before_the_model_is_traced(
    command: tuple[str, ...],
    mistake: tuple[str, ...],
    texts: list[str],
    source: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("traced a model that cannot be planned")

    monkeypatch.setattr("t3compile.pipeline.load_program", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    name, *rest = command
    arguments = (name, *source, *rest) if name == "verify" else (*command, *source)
    _refused(_invoke(*arguments, *mistake), *texts)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.json"]


@pytest.mark.parametrize(
    "command", [("cost",), ("rewrite", "-o", "x.pt2"), ("bench",), ("kernels", "build", "-o", "k")]
)
def test_a_schedule_beside_a_plan_is_refused(command: tuple[str, ...], source: tuple[str, ...], line: Line) -> None:
    plan = line.folder / "plan.json"
    result = _invoke(*command, *source, "--plan", plan, "--schedule", "1,2,3", "--min-tokens", "8")
    assert result.exit_code == 2
    assert f"'{plan}' is a plan and has the patterns: leave out --schedule, --min-tokens" in result.stderr


@pytest.mark.parametrize("command", [("bench",), ("kernels", "build", "-o", "k")])
def test_planning_of_a_rewritten_model_is_refused(command: tuple[str, ...], line: Line) -> None:
    windows = line.folder / "windows.pt2"
    result = _invoke(*command, windows, "--schedule", "1,2,3")
    assert result.exit_code == 2
    assert f"'{windows}' is rewritten and has its plan: leave out --schedule" in result.stderr


def test_bad_models_are_named(tmp_path: Path, line: Line) -> None:
    (tmp_path / "foreign").write_text("hello")
    _refused(_invoke("inspect", tmp_path / "none.pt2"), "there is no file or folder", "none.pt2")
    _refused(_invoke("inspect", tmp_path / "foreign"), "is not a model file of a known kind")
    _refused(_invoke("inspect", line.folder / "windows.onnx"), "is an ONNX model")
    _refused(_invoke("inspect", line.folder / "windows.pt2", *SIZE), "cannot be applied")
    _refused(
        _invoke("run", tmp_path / "foreign", "--inputs", line.folder / "inputs.npz"),
        "is not a file of a kind that can be run",
    )


def test_bad_sizes_and_missing_weights_are_named(folder: Path, source: tuple[str, ...], tmp_path: Path) -> None:
    _refused(_invoke("inspect", *source, "--height", "65"), "height 65", "64 or 80")
    _refused(_invoke("inspect", *source, "--vae-factors", "4x8"), "TxHxW")
    _refused(_invoke("inspect", *source, "--frames", "0"), "frames 0 must be at least 1")
    weightless = ("rewrite", folder, *SIZE, "--schedule", "1,2,3", "-o", tmp_path / "x.pt2")
    _refused(_invoke(*weightless), "no weights", "--random-weights")
    assert list(tmp_path.iterdir()) == []


def test_bad_plans_are_named(source: tuple[str, ...], line: Line, tmp_path: Path) -> None:
    plan = json.loads((line.folder / "plan.json").read_text())

    def refused(content: str, *texts: str, commands: tuple[str, ...] = ("cost",)) -> None:
        (tmp_path / "plan.json").write_text(content)
        for command in commands:
            output = ("-o", str(tmp_path / "x.pt2")) if command == "rewrite" else ()
            _refused(_invoke(command, *source, "--plan", tmp_path / "plan.json", *output), *texts)

    elsewhere = json.dumps(plan | {"fingerprint": "0" * 64})
    refused(elsewhere, "made for another graph", "000000000000", commands=("cost", "rewrite"))
    refused(json.dumps(plan | {"t3compile_plan": 9}), "plan version 9")
    refused(json.dumps(plan | {"sites": plan["sites"][:1]}), "lacks the sites")
    site = plan["sites"][0] | {"pattern": {"kind": "bands"}}
    refused(json.dumps(plan | {"sites": [site, *plan["sites"][1:]]}), "sites[0]", "pattern kind 'bands' is unknown")
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_bad_run_inputs_are_named(line: Line, tmp_path: Path) -> None:
    with np.load(line.folder / "inputs.npz") as arrays:
        given = dict(arrays)

    def refused(inputs: dict[str, Any], *texts: str) -> None:
        np.savez(tmp_path / "inputs.npz", **inputs)
        for kind in ("onnx", "pt2"):
            _refused(_invoke("run", line.folder / f"windows.{kind}", "--inputs", tmp_path / "inputs.npz"), *texts)

    refused(given | {"timestep": given["timestep"].astype(np.int64)}, "'timestep' has dtype int64, expected float32")
    refused(given | {"timestep": np.zeros(2, np.float32)}, "'timestep' has shape [2], expected [1]")
    refused(given | {"extra": np.zeros(2)}, "unknown input 'extra'", "timestep [1] float32")
    refused({"timestep": given["timestep"]}, "input 'hidden_states' is missing", "[1, 4, 3, 8, 12]")
    run = ("run", line.folder / "windows.onnx", "--inputs")
    _refused(_invoke(*run, tmp_path / "none.npz"), "cannot read the inputs", "none.npz")
    _refused(_invoke(*run, line.folder / "plan.json"), "plan.json")
    repeated = _done(2, *run, line.folder / "inputs.npz", "--repeat", "0")
    assert "Invalid value for '--repeat': 0 is not in the range" in repeated.stderr


@pytest.mark.parametrize("command", ["plan", "rewrite", "export", "run"])
def test_outputs_that_cannot_be_written_are_refused_first(
    command: str, line: Line, source: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"export": (line.folder / "windows.pt2",), "run": (line.folder / "windows.onnx",)}.get(command, source)
    inputs = ("--inputs", line.folder / "inputs.npz") if command == "run" else ()

    def nothing_is_loaded(*_: Any, **__: Any) -> None:
        pytest.fail("the output must be looked at before any work")

    monkeypatch.setattr("t3compile.loading.load_program", nothing_is_loaded)
    monkeypatch.setattr("t3compile.pipeline.load_engine", nothing_is_loaded)
    (tmp_path / "taken").mkdir()
    _refused(_invoke(command, *model, *inputs, "-o", tmp_path / "taken"), "taken", "is a folder")
    _refused(_invoke(command, *model, *inputs, "-o", tmp_path / "no" / "x"), "the folder", "does not exist")
    sealed = tmp_path / "sealed"
    sealed.mkdir(mode=0o500)
    if os.access(sealed, os.W_OK):

        def refuse(*_: Any, **__: Any) -> None:
            raise PermissionError(13, "Permission denied")

        # root writes anywhere.
        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    _refused(_invoke(command, *model, *inputs, "-o", sealed / "x"), "Permission denied", "sealed")
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["sealed", "taken"]


def test_a_rewritten_model_is_not_rewritten_again(line: Line, tmp_path: Path) -> None:
    result = _done(3, "plan", line.folder / "windows.pt2", "--schedule", "1,2,3")
    assert "no attention call was rewritten" in result.stderr


def test_a_portable_file_is_rewritten_verified_and_loads_with_torch_alone(
    source: tuple[str, ...], tmp_path: Path
) -> None:
    _done(0, "rewrite", *source, "--schedule", "1,2,3", "--portable", "-o", tmp_path / "plain.pt2")
    report = _json(0, "verify", *source, tmp_path / "plain.pt2")
    assert [check["kind"] for check in report["checks"]] == ["identity", "model", "graph", "weights", "pattern"]
    code = (
        "import sys, torch; p = torch.export.load('plain.pt2'); a, k = p.example_inputs; "
        "print(p.module()(*a, **k)[0].shape); assert not [m for m in sys.modules if m.startswith('t3compile')]"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert "[1, 4, 3, 8, 12]" in done.stdout, done.stderr


# --- help and start ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_works(command: str, flag: str) -> None:
    result = _done(0, *([command] if command else []), flag)
    assert result.stdout.startswith("Usage: ")
    assert result.stderr == ""


def test_every_command_is_listed_and_each_result_has_json() -> None:
    assert set(main.commands) == set(COMMANDS)
    groups = [group for group in main.commands.values() if isinstance(group, click.Group)]
    assert all(group.help for group in groups)
    leaves = {**main.commands, **{name: one for group in groups for name, one in group.commands.items()}}
    for command in (one for one in leaves.values() if one not in groups):
        assert "as_json" in {parameter.name for parameter in command.params}
        assert command.help


def test_version_and_wrong_usage() -> None:
    import t3compile

    assert t3compile.__version__ in _done(0, "--version").stdout
    assert _invoke("no-such-command").exit_code == 2
    assert _invoke("inspect").exit_code == 2
    assert _invoke("export", "model", "-o", "x.onnx", "--precision", "int4").exit_code == 2


def test_help_starts_fast() -> None:
    """The best of five, so that a busy machine does not count."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "t3compile", "--help"], check=True, capture_output=True, cwd=ROOT)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


def test_nothing_heavy_is_imported_at_start() -> None:
    code = "import sys, t3compile, t3compile.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    heavy = {"torch", "rich", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "diffusers", "numpy", "tensorrt"}
    assert "click" in done.stdout.split()
    assert not heavy & set(done.stdout.split())


# --- missing extras ------------------------------------------------------------------------------

_WITHOUT = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == {package!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path = [Without(finder) for finder in sys.meta_path]
from t3compile.cli import main
main()
"""


@pytest.mark.parametrize(("package", "extra"), [("onnxruntime", "cpu"), ("diffusers", "diffusers")])
def test_a_missing_extra_is_named(
    package: str, extra: str, line: Line, source: tuple[str, ...], tmp_path: Path
) -> None:
    commands: dict[str, tuple[str | Path, ...]] = {
        "onnxruntime": ("run", line.folder / "windows.onnx", "--inputs", line.folder / "inputs.npz"),
        "diffusers": ("inspect", *source),
    }
    code = _WITHOUT.format(package=package)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, commands[package])],
        capture_output=True,
        text=True,
        env=_environment(),
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    errors = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert f"'{package}'" in errors[0]
    assert f"pip install 't3compile[{extra}]'" in errors[0]
