"""AOTInductor packages: compiled here, run by torch alone, checked before they run, and never loaded unasked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch._inductor import config

import t3compile
from t3compile.cli import main
from t3compile.errors import EngineError, ExportError, InputsError
from t3compile.export.aoti_engine import AotiEngine
from t3compile.export.compare_engine import compare_engine
from t3compile.export.write_aoti import check_compiler, write_aoti
from t3compile.inputs import named_inputs
from t3compile.ops import WINDOW_ATTENTION

try:
    check_compiler()
except ExportError as error:
    pytest.skip(str(error), allow_module_level=True)


class Attention(nn.Module):
    """One attention over a grid of 2x4x4 tokens, with a bfloat16 input, a constant one, and two outputs."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.embed = nn.Conv3d(2, 16, (1, 2, 2), stride=(1, 2, 2))
        self.qkv = nn.Linear(16, 48)
        self.gain = nn.Parameter(torch.tensor([gain]))

    def forward(self, x: Tensor, shift: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        tokens = self.embed(x).flatten(2).transpose(1, 2)  # [B, S, D]
        q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, dim=2))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).flatten(2) * self.gain * scale, x + shift.to(x.dtype)


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Not contiguous: compiled code reads memory by the strides of the trace.
    x = torch.randn(1, 2, 2, 8, 8, generator=generator).transpose(3, 4)
    return x, torch.randn(1, generator=generator).bfloat16()


def _program(gain: float = 1.0) -> t3compile.Program:
    torch.manual_seed(0)
    program = t3compile.trace(Attention(gain).eval(), _inputs(), {"scale": 2.0})
    survey = t3compile.detect(program)
    return t3compile.rewrite(program, t3compile.make_plan(survey, [(1, 2, 2)], min_tokens=0))


@dataclass
class _Line:
    path: Path
    program: t3compile.Program
    report: dict[str, Any]
    left: list[str]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> _Line:
    """The windowed program compiled by the command, in a folder of its own."""
    program = _program()
    assert any(node.target is WINDOW_ATTENTION for node in program.graph.nodes)
    source = program.save(tmp_path_factory.mktemp("source") / "windows.pt2")
    folder, cache = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("cache")
    path = folder / "windows.aoti.pt2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
        with config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
            done = CliRunner().invoke(main, ["export", str(source), "--target", "aoti", "-o", str(path), "--json"])
    assert done.exit_code == 0, done.stderr
    left = [str(file.relative_to(cache)) for file in cache.rglob("*") if file.is_file()]
    return _Line(path, program, json.loads(done.stdout), left)


@pytest.fixture(scope="module")
def engine(line: _Line) -> Any:
    return t3compile.load_engine(line.path, trust_code=True)


@pytest.fixture(scope="module")
def expected(line: _Line) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        first, second = line.program.module()(*_inputs(), scale=2.0)
    return first, second


def _same(outputs: Any, expected: tuple[Tensor, Tensor]) -> bool:
    """float32 sums in another order, of values of size one."""
    return all(torch.allclose(ours, theirs, rtol=0, atol=1e-5) for ours, theirs in zip(outputs, expected, strict=True))


# --- export --------------------------------------------------------------------------------------


def test_the_package_is_compared_and_nothing_else_is_left(line: _Line) -> None:
    compared = line.report["comparison"]
    assert compared["passed"]
    assert [check["kind"] for check in compared["outputs"]] == ["aoti", "aoti"]
    assert [file.name for file in line.path.parent.iterdir()] == ["windows.aoti.pt2"]
    assert line.left == []


def test_the_comparison_fails_on_another_model(line: _Line, engine: AotiEngine) -> None:
    inputs = named_inputs(line.program)
    same, other = (compare_engine(engine, _program(gain), inputs, "aoti") for gain in (1.0, 1.001))
    assert all(check.passed for check in same)
    assert [check.passed for check in other] == [False, True]


def test_torch_alone_runs_the_package(line: _Line, expected: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    torch.save(_inputs(), tmp_path / "inputs.pt")
    code = (
        "import sys, torch\n"
        f"model = torch._inductor.aoti_load_package({str(line.path)!r})\n"
        "outputs = model(*torch.load('inputs.pt'), scale=2.0)\n"
        "torch.save(outputs, 'outputs.pt')\n"
        "assert not [name for name in sys.modules if name.startswith('t3compile')]\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert _same(torch.load(tmp_path / "outputs.pt"), expected)


def test_no_compiler_is_said_before_any_work(line: _Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_compiler = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with no_compiler, pytest.raises(ExportError, match=r"no C\+\+ compiler was found.*apt install g\+\+.*CXX"):
        t3compile.export_aoti(line.program, tmp_path / "x.pt2")

    def nothing_is_loaded(*_: Any, **__: Any) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr("t3compile.pipeline.load_program", nothing_is_loaded)
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        done = CliRunner().invoke(main, ["export", "x.pt2", "--target", "aoti", "-o", str(tmp_path / "x")])
    assert done.exit_code == 2
    assert "no C++ compiler" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_compilation_that_fails_is_one_sentence_and_leaves_nothing(
    line: _Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, package_path: str, **__: Any) -> None:
        Path(package_path).write_bytes(b"half a package")
        raise RuntimeError("no lowering for this\nand a long dump")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fail)
    with pytest.raises(ExportError, match=r"torch cannot compile the program: RuntimeError: no lowering for this$"):
        t3compile.export_aoti(line.program, tmp_path / "x.pt2")
    assert list(tmp_path.iterdir()) == []


def test_the_window_operator_never_gets_into_a_package(line: _Line, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"holds t3::window_attention.*lower it first"):
        write_aoti(line.program, tmp_path / "x.pt2")


def test_options_of_onnx_are_wrong_usage() -> None:
    for option in (("--inline",), ("--attention", "matmul"), ("--share-weights",), ("--quantize", "int8")):
        done = CliRunner().invoke(main, ["export", "x.pt2", "--target", "aoti", "-o", "y", *option])
        assert done.exit_code == 2
        assert "--weights-dtype and --quantize are for --target onnx" in " ".join(done.stderr.split())


# --- calls ---------------------------------------------------------------------------------------


def test_calls_by_position_by_name_and_with_arrays(engine: AotiEngine, expected: tuple[Tensor, Tensor]) -> None:
    x, shift = _inputs()
    assert engine.runtime == "aoti"
    assert engine.notes == ()
    assert [str(spec) for spec in engine.inputs] == ["x [1, 2, 2, 8, 8] float32", "shift [1] bfloat16"]
    assert engine.output_names == ("output_0", "output_1")
    assert engine.frozen == {"scale": 2.0}
    for outputs in (engine(x, shift), engine(shift=shift, x=x), engine(x.numpy(), shift)):
        assert isinstance(outputs, tuple)
        assert _same(outputs, expected)


def test_inputs_of_other_strides_are_read_as_what_they_are(engine: AotiEngine, expected: tuple[Tensor, Tensor]) -> None:
    x, shift = _inputs()
    assert not x.is_contiguous()
    for same in (x.contiguous(), x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)):
        assert same.stride() != x.stride()
        assert _same(engine(same, shift), expected)


Wrong = Callable[[Tensor, Tensor], tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (
            lambda x, shift: ((x[:, :, :1], shift), {}),
            r"input 'x' has shape \[1, 2, 1, 8, 8\], expected \[1, 2, 2, 8, 8\]",
        ),
        (lambda x, shift: ((x.double(), shift), {}), "input 'x' has dtype float64, expected float32"),
        (lambda x, shift: ((x, shift.float()), {}), "input 'shift' has dtype float32, expected bfloat16"),
        (lambda x, shift: ((x,), {}), r"input 'shift' is missing; the model's inputs are x \[1, 2, 2, 8, 8\] float32"),
        (lambda x, shift: ((x, shift), {"scale": 2.0}), "unknown input 'scale'"),
    ],
)
def test_wrong_inputs_are_named(wrong: Wrong, text: str, engine: AotiEngine) -> None:
    args, kwargs = wrong(*_inputs())
    with pytest.raises(InputsError, match=text):
        engine(*args, **kwargs)


# --- files ---------------------------------------------------------------------------------------


def test_compiled_code_runs_only_when_asked(line: _Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("torch was given the package")

    monkeypatch.setattr("torch._inductor.aoti_load_package", fail)
    for runtime in ("auto", "aoti"):
        with pytest.raises(EngineError, match=r"compiled code that runs when it is loaded.*--trust-code"):
            t3compile.load_engine(line.path, runtime)


def test_the_command_runs_a_package_under_any_name(
    line: _Line, expected: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    renamed = tmp_path / "package"
    renamed.write_bytes(line.path.read_bytes())
    torch.save(dict(zip(("x", "shift"), _inputs(), strict=True)), tmp_path / "in.pt")
    arguments = ["run", str(renamed), "--inputs", str(tmp_path / "in.pt"), "-o", str(tmp_path / "out.npz")]
    done = CliRunner().invoke(main, [*arguments, "--trust-code"])
    assert done.exit_code == 0, done.stderr
    assert "runtime: aoti" in done.stderr.splitlines()
    with np.load(tmp_path / "out.npz") as saved:
        assert _same((torch.from_numpy(saved["output_0"]), torch.from_numpy(saved["output_1"])), expected)


def _changed(line: _Line, target: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """The package with some of its files changed."""
    with zipfile.ZipFile(line.path) as source, zipfile.ZipFile(target, "w") as archive:
        for entry in source.infolist():
            archive.writestr(entry.filename, change(entry.filename, source.read(entry)))
    return target


def _with_metadata(**changes: Any) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("_metadata.json"):
            return content
        described = json.loads(content)
        if "t3compile" in changes:
            del described["t3compile"]
        else:
            described["t3compile"] = json.dumps(json.loads(described["t3compile"]) | changes)
        return json.dumps(described).encode()

    return change


def test_a_package_for_another_processor_is_refused_before_it_is_loaded(
    line: _Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda *_: pytest.fail("torch was given the package"))
    path = _changed(line, tmp_path / "x.pt2", _with_metadata(processor=["s390x", "avx1024"]))
    with pytest.raises(EngineError, match="was compiled for a processor with avx1024, s390x, which this one does not"):
        AotiEngine(path, trust_code=True)


def test_a_package_that_does_not_tell_its_inputs_is_refused(line: _Line, tmp_path: Path) -> None:
    for change in (_with_metadata(t3compile=None), _with_metadata(inputs=[{"name": "x"}])):
        path = _changed(line, tmp_path / "x.pt2", change)
        with pytest.raises(EngineError, match="does not tell the names, shapes and dtypes of its inputs"):
            AotiEngine(path, trust_code=True)


def test_another_version_of_torch_is_noted(line: _Line, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = torch.__version__.partition("+")[0]
    monkeypatch.setattr(torch, "__version__", "2.99.1")
    (note,) = AotiEngine(line.path, trust_code=True).notes
    assert note.startswith(f"the package was compiled with torch {ours} and runs in torch 2.99.1")


def test_damaged_packages_are_refused(line: _Line, tmp_path: Path) -> None:
    content = line.path.read_bytes()
    (tmp_path / "cut.pt2").write_bytes(content[: len(content) // 2])
    with pytest.raises(EngineError, match=r"cut\.pt2' is not a file of a kind that can be run .*or is damaged"):
        t3compile.load_engine(tmp_path / "cut.pt2", trust_code=True)
    path = _changed(line, tmp_path / "x.pt2", lambda name, old: b"not a library" if name.endswith(".so") else old)
    with pytest.raises(EngineError, match=r"cannot load the package '.*x\.pt2'"):
        t3compile.load_engine(path, trust_code=True)
