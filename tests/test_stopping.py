"""Stopped commands, each a process of its own: exit code, one sentence, nothing half-written, no process left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from t3compile.inputs import named_inputs
from t3compile.pipeline import detect, export_onnx, rewrite
from t3compile.plan import make_plan
from t3compile.program import trace
from tests.test_cli import CONFIG, ROOT, SIZE
from tests.tiny_models import HandWrittenDiT

SAID = "stopped; nothing unfinished was left behind"
SECOND_S = 30


class Place:
    """A model, a folder for results and one for temporary files."""

    def __init__(self, folder: Path) -> None:
        self.model, self.out, self.temporary = folder / "model", folder / "out", folder / "tmp"
        for path in (self.model, self.out, self.temporary):
            path.mkdir()
        (self.model / "config.json").write_text(json.dumps(CONFIG | {"num_layers": 1}))

    @property
    def source(self) -> tuple[str, ...]:
        return (str(self.model), "--random-weights", *SIZE)

    def left(self) -> list[str]:
        return sorted(path.name for folder in (self.out, self.temporary) for path in folder.iterdir())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rewritten model with its export and its inputs."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = HandWrittenDiT(layers=1, grid=(2, 4, 4), head_dim=16).eval()
    traced = trace(model, model.example_inputs())
    rewritten = rewrite(traced, make_plan(detect(traced), [(1, 2, 2)]))
    traced.save(folder / "model.pt2")
    rewritten.save(folder / "windows.pt2")
    export_onnx(rewritten, folder / "windows.onnx", check=False)
    np.savez(folder / "inputs.npz", **{name: x.numpy() for name, x in named_inputs(traced).items()})
    return folder


@contextmanager
def started(place: Place, *arguments: str | Path, before: str = "") -> Iterator[subprocess.Popen[str]]:
    """The command in a process; ``before`` is Python that runs in it first."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{before}\nfrom t3compile.__main__ import main\nmain()", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(place.temporary), "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if text in line:
            return
    pytest.fail(f"'{text}' was not said: {''.join(seen)}")


def check_stopped(process: subprocess.Popen[str], number: int, place: Place) -> None:
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    assert stderr.splitlines()[-1:] == [SAID], stderr
    assert "Traceback" not in stderr
    assert "Exception ignored" not in stderr
    assert stdout == ""
    assert place.left() == []


# Writes a weight as slowly as one of many gigabytes.
SLOW = """
import sys, time
def slow(function):
    def run(*args, **options):
        result = function(*args, **options)
        print("in the middle", file=sys.stderr, flush=True)
        time.sleep(60)
        return result
    return run
"""
SLOW_PT2 = f"{SLOW}\nimport t3compile.archive as archive\narchive._content = slow(archive._content)"
SLOW_ONNX = f"{SLOW}\nimport t3compile.export.store_weights as weights\nweights._write = slow(weights._write)"

REWRITE = ("--schedule", "1,2,2")


@pytest.mark.parametrize(
    ("number", "command", "options", "before", "moment"),
    [
        (signal.SIGINT, "inspect", (), "", "... loading and tracing"),
        (signal.SIGTERM, "rewrite", REWRITE, "", "... sites and whole model"),
        (signal.SIGINT, "rewrite", (*REWRITE, "--no-verify"), SLOW_PT2, "in the middle"),
        (signal.SIGTERM, "export", (), "", "... exporting the graph"),
        (signal.SIGTERM, "export", ("--no-check",), SLOW_ONNX, "in the middle"),
    ],
)
def test_nothing_is_left(
    number: signal.Signals, command: str, options: tuple[str, ...], before: str, moment: str, place: Place, files: Path
) -> None:
    source = place.source if command == "inspect" else (files / "model.pt2", "-o", place.out / "x.bin")
    with started(place, command, *source, *options, before=before) as process:
        wait_for(process, moment)
        staged = [path for path in place.out.rglob("*") if path.is_file()]
        assert bool(staged) is bool(before)
        process.send_signal(number)
        check_stopped(process, number, place)


@pytest.mark.parametrize(("ignored", "ends_with"), [(False, -signal.SIGINT), (True, 0)])
def test_a_signal_while_the_script_imports_leaves_no_traceback(ignored: bool, ends_with: int) -> None:
    code = f"""
import signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "t3compile.cli":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
if {ignored}:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
from t3compile.__main__ import main
main()
"""
    command = [sys.executable, "-c", code, "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (ends_with, "")
    assert bool(done.stdout) is ignored


def test_a_file_that_was_written_stays_when_its_comparison_is_stopped(place: Place, files: Path) -> None:
    with started(place, "export", files / "model.pt2", "--check", "-o", place.out / "x.onnx") as process:
        wait_for(process, "... comparing onnxruntime with torch")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == SAID
    assert place.left() == ["x.onnx", "x.onnx.data"]


SLOW_OUTPUTS = f"{SLOW}\nfrom t3compile.export.measure import RunResult\nRunResult.save = slow(RunResult.save)"
SLOW_COPY = f"{SLOW}\nimport t3compile.export.triton_server as server\nserver._place = slow(server._place)"
SLOW_CALL = f"{SLOW}\nimport t3compile.export.measure as measure\nmeasure._array = slow(measure._array)"
SLOW_CHECK = f"{SLOW}\nimport t3compile.pipeline as pipeline\npipeline.check_rewritten = slow(pipeline.check_rewritten)"
# TensorRT asks whether to go on when it has done a step.
SLOW_BUILD = """
import sys, time
from tests.fake_tensorrt import Behaviour, make_tensorrt
from t3compile.export import tensorrt_api
from t3compile.export.cuda_device import CudaDevice
def step():
    print("in the middle", file=sys.stderr, flush=True)
    time.sleep({seconds})
sys.modules["tensorrt"] = make_tensorrt("10.16.1.11", Behaviour(during_build=step))
tensorrt_api.find_cuda_device = lambda index=0: CudaDevice(0, "NVIDIA Test", "9.0", "13.0")
"""
BUILD = ("build-engine", "windows.onnx", "--attention", "native", "-o", "OUT/x.engine")
NO_GRACE = "import t3compile.interruption as interruption\ninterruption._GRACE_S = 0.5"


@pytest.mark.parametrize(
    ("number", "command", "before", "staged"),
    [
        (signal.SIGINT, ("run", "windows.onnx", "--inputs", "inputs.npz", "-o", "OUT/x.npz"), SLOW_CALL, False),
        (signal.SIGTERM, ("run", "windows.pt2", "--inputs", "inputs.npz", "-o", "OUT/x.npz"), SLOW_OUTPUTS, True),
        (signal.SIGINT, ("verify", "model.pt2", "windows.pt2"), SLOW_CHECK, False),
        (signal.SIGTERM, ("deploy", "triton-server", "windows.onnx", "-o", "OUT/repository"), SLOW_COPY, True),
        (signal.SIGINT, BUILD, SLOW_BUILD.format(seconds=1), True),
        (signal.SIGINT, BUILD, SLOW_BUILD.format(seconds=60) + NO_GRACE, True),
    ],
    ids=["run", "run, writing", "verify", "deploy", "build-engine", "build-engine, deaf"],
)
def test_commands_on_files_leave_nothing(
    number: signal.Signals, command: tuple[str, ...], before: str, staged: bool, place: Place, files: Path
) -> None:
    arguments = [
        word.replace("OUT", str(place.out)) if word.startswith("OUT/") else files / word if "." in word else word
        for word in command
    ]
    kept = {path.name: path.read_bytes() for path in files.iterdir()}
    with started(place, *arguments, before=before) as process:
        wait_for(process, "in the middle")
        assert any(path.is_file() for path in place.out.rglob("*")) is staged
        process.send_signal(number)
        check_stopped(process, number, place)
    assert {path.name: path.read_bytes() for path in files.iterdir()} == kept


def test_a_compiler_is_ended_too(place: Place, files: Path) -> None:
    """Else it goes on writing into folders that are removed."""
    compiler = place.model / "slow-compiler"
    script = f"""#!{sys.executable}
import os, sys, time
if "--version" in sys.argv or "-v" in sys.argv[1:2]:
    os.execvp("g++", ["g++", *sys.argv[1:]])
open({str(place.model / "compiling")!r}, "w").write(str(os.getpid()))
time.sleep(600)
"""
    compiler.write_text(script)
    compiler.chmod(0o700)
    before = f"import os; os.environ['CXX'] = {str(compiler)!r}"
    arguments = ("export", files / "model.pt2", "--target", "aoti", "-o", place.out / "x.so")
    with started(place, *arguments, before=before) as process:
        compiling = place.model / "compiling"
        deadline = time.monotonic() + 120
        while not (compiling.exists() and compiling.read_text()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        check_stopped(process, signal.SIGTERM, place)
    with pytest.raises(ProcessLookupError):
        os.kill(int(compiling.read_text()), 0)


# A library that computes and looks at no signal.
DEAF = """
import ctypes, sys
import t3compile.doctor as doctor
from pathlib import Path
from t3compile.files import scratch_folder
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
def examine():
    with scratch_folder(Path({out!r}), "x"):
        library.pthread_mutex_lock(mutex)
        print("computing", file=sys.stderr, flush=True)
        library.pthread_mutex_lock(mutex)
doctor.examine = examine
"""


@pytest.mark.parametrize("twice", [True, False], ids=["second signal", "no answer"])
def test_a_library_that_goes_on_computing_does_not_keep_the_command_alive(twice: bool, place: Place) -> None:
    before = DEAF.format(out=str(place.out))
    if not twice:
        before += "\nimport t3compile.interruption as interruption\ninterruption._GRACE_S = 0.5"
    with started(place, "doctor", before=before) as process:
        wait_for(process, "computing")
        time.sleep(0.3)
        assert place.left() != []
        process.send_signal(signal.SIGINT)
        if twice:
            time.sleep(0.3)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
        check_stopped(process, signal.SIGINT, place)


# Python drops an exception that leaves a finalizer.
IN_FINALIZER = """
import sys, time
import t3compile.doctor as doctor
class Slow:
    def __del__(self):
        print("in a finalizer", file=sys.stderr, flush=True)
        time.sleep(60)
def examine():
    slow = Slow()
    del slow
    time.sleep(60)
doctor.examine = examine
"""


def test_a_signal_in_a_finalizer_is_not_lost(place: Place) -> None:
    with started(place, "doctor", before=IN_FINALIZER) as process:
        wait_for(process, "in a finalizer")
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        check_stopped(process, signal.SIGTERM, place)
        assert time.monotonic() - begun < SECOND_S


# Stopped between the two renames of an output that has two files.
BETWEEN = """
import os, signal, sys
import t3compile.doctor as doctor
from pathlib import Path
from t3compile.files import staged_outputs
real = os.replace
def replace(source, target):
    real(source, target)
    os.kill(os.getpid(), signal.SIGINT)
def examine():
    os.replace = replace
    with staged_outputs(Path({out!r}) / "x.onnx") as stage:
        for name in ("x.onnx", "x.onnx.data"):
            (stage / name).write_text("new")
    print("not stopped", file=sys.stderr)
doctor.examine = examine
"""


def test_files_that_belong_together_appear_together(place: Place) -> None:
    with started(place, "doctor", before=BETWEEN.format(out=str(place.out))) as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode in (130,), stderr
    assert stderr.splitlines() == [SAID]
    assert {path.name: path.read_text() for path in place.out.iterdir()} == {"x.onnx": "new", "x.onnx.data": "new"}


def test_what_a_killed_run_left_is_removed_and_said(place: Place, files: Path) -> None:
    arguments = ("rewrite", files / "model.pt2", *REWRITE, "--no-verify", "-o", place.out / "x.pt2")
    with started(place, *arguments, before=SLOW_PT2) as process:
        wait_for(process, "in the middle")
        process.kill()
        process.wait()
    (stage,) = place.out.iterdir()
    (temporary,) = place.temporary.iterdir()
    assert stage.name.startswith(".x.pt2.")
    assert temporary.name.startswith(".t3compile.")
    for left in (stage, temporary):
        assert left.name.endswith(".part")
        os.utime(left, (0, 0))
    with started(place, *arguments) as process:
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    notes = [line for line in stderr.splitlines() if "killed run" in line]
    assert notes == [notes[0]]
    assert notes[0].startswith(f"note: removed '{stage}', ")
    assert place.left() == ["x.pt2"]


def test_signals_that_are_to_be_ignored_stay_ignored(place: Place) -> None:
    """As nohup asks."""
    before = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    slow = "import time, t3compile.doctor as doctor\ndoctor.examine = lambda: time.sleep(60)"
    told = "import sys; print('ready', file=sys.stderr, flush=True)"
    with started(place, "doctor", before=f"{before}\n{slow}\n{told}") as process:
        wait_for(process, "ready")
        time.sleep(1)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        check_stopped(process, signal.SIGINT, place)
