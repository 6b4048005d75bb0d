"""A runtime is chosen by name or by the file's content; what was chosen is told, and what is missing is named."""

from __future__ import annotations

import json
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper
from torch import Tensor, nn

import t3compile
from t3compile.cli import main
from t3compile.errors import EngineError, InputsError, ModelFileError
from t3compile.export.measure import run_timed
from t3compile.export.onnx_engine import OnnxEngine
from t3compile.export.runtimes import RUNTIME_NAMES, recognize_file
from t3compile.loading.recognize import recognize
from t3compile.pipeline import load_engine

CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))
REAL_SESSION = onnxruntime.InferenceSession


class Doubled(nn.Module):
    def forward(self, x: Tensor, flag: bool = True) -> Tensor:
        return x * 2 if flag else x


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same small model as ONNX and as .pt2, and the beginnings of other files."""
    path = tmp_path_factory.mktemp("runtimes")
    program = t3compile.trace(Doubled(), (torch.ones(3),), {"flag": True})
    t3compile.export_onnx(program, path / "model.onnx", check=False)
    program.save(path / "model.pt2")
    (path / "model.engine").write_bytes(b"ftrt" + bytes(60))
    with zipfile.ZipFile(path / "model.aoti.pt2", "w") as archive:
        archive.writestr("model/archive_format", "pt2")
        archive.writestr("model/data/aotinductor/model/c.wrapper.so", b"\x7fELF")
    return path


# --- files and names -----------------------------------------------------------------------------


def test_files_are_told_apart_by_content(folder: Path, tmp_path: Path) -> None:
    kinds = {"model.onnx": "onnx", "model.pt2": "pt2", "model.engine": "tensorrt", "model.aoti.pt2": "aoti"}
    for name, kind in kinds.items():
        renamed = tmp_path / "file"
        renamed.write_bytes((folder / name).read_bytes())
        assert recognize_file(renamed) == kind


FITTING = {
    "model.onnx": {"onnxruntime", "onnxruntime-cpu", "onnxruntime-cuda", "onnxruntime-tensorrt"},
    "model.pt2": {"torch"},
    "model.aoti.pt2": {"aoti"},
    "model.engine": {"tensorrt"},
}


@pytest.mark.parametrize("name", FITTING)
def test_a_runtime_that_does_not_fit_the_file_is_refused_with_those_that_do(name: str, folder: Path) -> None:
    for runtime in set(RUNTIME_NAMES) - FITTING[name] - {"auto"}:
        with pytest.raises(EngineError, match=f"which runtime '{runtime}' cannot run") as raised:
            load_engine(folder / name, runtime)
        listed = str(raised.value).partition("one of: ")[2].split(", ")
        assert set(listed) == FITTING[name]


def test_an_unknown_runtime_and_an_unknown_option_are_named(folder: Path) -> None:
    with pytest.raises(EngineError, match="runtime 'openvino' is unknown; known: auto, onnxruntime, onnxruntime-cpu"):
        load_engine(folder / "model.onnx", "openvino")
    for name, runtime in (("model.onnx", "onnxruntime"), ("model.pt2", "torch")):
        with pytest.raises(EngineError, match=f"runtime '{runtime}' has no option 'cuda_graph'"):
            load_engine(folder / name, cuda_graph=True)


def test_compiled_code_is_no_model(folder: Path) -> None:
    with pytest.raises(ModelFileError, match=r"is an AOTInductor package, compiled code.*t3compile run --trust-code"):
        recognize(folder / "model.aoti.pt2")


def test_an_archive_of_a_program_and_compiled_code_is_not_loaded(folder: Path, tmp_path: Path) -> None:
    """The .pt2 reader refuses compiled code whatever else is in the archive."""
    both = tmp_path / "both.pt2"
    with zipfile.ZipFile(folder / "model.pt2") as source, zipfile.ZipFile(both, "w") as archive:
        for entry in source.infolist():
            archive.writestr(entry.filename, source.read(entry))
        archive.writestr(f"{entry.filename.partition('/')[0]}/data/aotinductor/model/c.wrapper.so", b"\x7fELF")
    assert recognize_file(both) == "pt2"
    for trust in (False, True):
        with pytest.raises(ModelFileError, match=r"compiled code|damaged"):
            load_engine(both, trust_code=trust)


def test_a_tensorrt_engine_goes_to_its_own_class_with_its_options(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the dispatch: TensorRT itself is not here."""
    made: list[tuple[Any, ...]] = []

    class TensorRTEngine:
        def __init__(self, path: Path, *, cuda_graph: bool = False) -> None:
            made.append((path, cuda_graph))

    module = types.ModuleType("t3compile.export.tensorrt_engine")
    module.TensorRTEngine = TensorRTEngine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    path = folder / "model.engine"
    for runtime, options in (("auto", {}), ("tensorrt", {"cuda_graph": True})):
        assert isinstance(load_engine(path, runtime, **options), TensorRTEngine)
    assert made == [(path, False), (path, True)]
    with pytest.raises(EngineError, match="runtime 'tensorrt' has no option 'no_such'"):
        load_engine(path, no_such=1)


# --- memory of onnxruntime's calls -----------------------------------------------------------------


def save_large_middle(path: Path) -> Path:
    """The sum of exp(x) over 256 x 256 copies of x [256], as a file: what is between is larger than all else."""
    nodes = [
        helper.make_node("Expand", ["x", "shape"], ["wide"]),
        helper.make_node("Exp", ["wide"], ["middle"]),
        helper.make_node("ReduceSum", ["middle"], ["y"], keepdims=0),
    ]
    shape = helper.make_tensor("shape", TensorProto.INT64, [3], [256, 256, 256])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in (("x", [256]), ("y", [])))
    graph = helper.make_graph(nodes, "large", [x], [y], [shape])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path


MIDDLE_BYTES = 256**3 * 4
_HELD = """
import sys, torch
from t3compile.benchmark.process_memory import resident
from t3compile.export.onnx_engine import OnnxEngine
shares_memory = bool(int(sys.argv[2]))
engines = [OnnxEngine(sys.argv[1], shares_memory=shares_memory) for _ in range(2)]
x = torch.zeros(256)
held = [resident().anonymous_bytes]
for engine in (*engines, engines[0]):
    assert float(engine(x)) == 256**3
    held.append(resident().anonymous_bytes)
del engine, engines
held.append(resident().anonymous_bytes)
print(*(now - held[0] for now in held[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("shared", [False, True])
def test_an_engine_keeps_the_memory_of_a_call_for_the_next(shared: bool, tmp_path: Path) -> None:
    path = save_large_middle(tmp_path / "large.onnx")
    done = subprocess.run(
        [sys.executable, "-c", _HELD, str(path), str(int(shared))], capture_output=True, text=True, check=True
    )
    first, second, again, deleted = (int(word) / MIDDLE_BYTES for word in done.stdout.split())
    assert 0.9 < first < 3
    assert again == pytest.approx(second, rel=0.1)
    if shared:
        assert second == pytest.approx(first, rel=0.1)
    else:
        assert second == pytest.approx(2 * first, rel=0.1)
        assert deleted < 0.5


# --- onnxruntime's providers ---------------------------------------------------------------------


class FakeSession:
    """onnxruntime with GPU providers that start, or that silently do not; the work is done on the CPU."""

    def __init__(self, starts: set[str], fails: set[str]) -> None:
        self.starts, self.fails = starts, fails
        self.asked: list[list[Any]] = []

    def __call__(self, path: str, options: Any, *, providers: list[Any], enable_fallback: int) -> Any:
        assert enable_fallback == 0, "onnxruntime's own fallback prints to stdout"
        assert (options.enable_cpu_mem_arena, options.enable_mem_pattern) == (True, False)
        self.asked.append(providers)
        names = [one if isinstance(one, str) else one[0] for one in providers]
        if self.fails & set(names):
            raise RuntimeError(f"cannot load library for {names[0]}\nmore")
        session = REAL_SESSION(path, options, providers=[CPU])
        session.get_providers = lambda: [name for name in names if name == CPU or name in self.starts]
        return session


@pytest.fixture
def fake_providers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeSession]:
    def fake(available: list[str], starts: set[str], fails: set[str] = frozenset()) -> FakeSession:  # type: ignore[assignment]
        session = FakeSession(starts, fails)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
        monkeypatch.setattr(onnxruntime, "InferenceSession", session)
        return session

    return fake


FakeProviders = Callable[..., FakeSession]
ALL = [TENSORRT, CUDA, CPU]


@pytest.mark.parametrize(
    ("runtime", "available", "chosen", "asked"),
    [
        ("auto", ALL, "onnxruntime-cuda", [CUDA, CPU]),
        ("onnxruntime", ALL, "onnxruntime-cuda", [CUDA, CPU]),
        ("onnxruntime", ["AzureExecutionProvider", CPU], "onnxruntime-cpu", [CPU]),
        ("onnxruntime-cpu", ALL, "onnxruntime-cpu", [CPU]),
        ("onnxruntime-cuda", ALL, "onnxruntime-cuda", [CUDA, CPU]),
        ("onnxruntime-tensorrt", ALL, "onnxruntime-tensorrt", [TENSORRT, CUDA, CPU]),
        ("onnxruntime-tensorrt", [TENSORRT, CPU], "onnxruntime-tensorrt", [TENSORRT, CPU]),
    ],
)
def test_faked_providers_are_asked_for_in_order(
    runtime: str, available: list[str], chosen: str, asked: list[str], folder: Path, fake_providers: FakeProviders
) -> None:
    session = fake_providers(available, {CUDA, TENSORRT})
    engine = load_engine(folder / "model.onnx", runtime)
    assert engine.runtime == chosen
    assert engine.notes == ()
    assert session.asked == [asked]
    assert torch.equal(engine(torch.arange(3.0)), 2 * torch.arange(3.0))


@pytest.mark.parametrize("runtime", ["auto", "onnxruntime"])
@pytest.mark.parametrize("way", ["silently", "with an error"])
def test_a_faked_provider_that_does_not_start_is_reported_and_the_next_one_taken(
    runtime: str, way: str, folder: Path, fake_providers: FakeProviders
) -> None:
    session = fake_providers(ALL, set(), {CUDA} if way == "with an error" else set())
    engine = load_engine(folder / "model.onnx", runtime)
    assert engine.runtime == "onnxruntime-cpu"
    assert session.asked == [[CUDA, CPU], [CPU]]
    (note,) = engine.notes
    assert CUDA in note
    assert "\n" not in note
    assert torch.equal(engine(torch.ones(3)), 2 * torch.ones(3))


@pytest.mark.parametrize(("runtime", "provider"), [("onnxruntime-cuda", CUDA), ("onnxruntime-tensorrt", TENSORRT)])
def test_a_chosen_faked_provider_that_does_not_start_is_an_error(
    runtime: str, provider: str, folder: Path, fake_providers: FakeProviders
) -> None:
    fake_providers(ALL, set())
    with pytest.raises(EngineError, match=f"'{runtime}' was chosen, and onnxruntime could not start {provider}"):
        load_engine(folder / "model.onnx", runtime)
    # CUDA in TensorRT's place is not what was chosen either.
    fake_providers(ALL, {CUDA, TENSORRT} - {provider})
    with pytest.raises(EngineError, match=f"could not start {provider}"):
        load_engine(folder / "model.onnx", runtime)
    fake_providers(ALL, {CUDA, TENSORRT}, {provider})
    with pytest.raises(EngineError, match=rf"cannot load '.*' in {provider}: cannot load library"):
        load_engine(folder / "model.onnx", runtime)


def test_a_provider_that_the_installed_onnxruntime_lacks_is_named_with_the_command(folder: Path) -> None:
    """Not faked: the onnxruntime of the tests is built for the CPU."""
    available = onnxruntime.get_available_providers()
    if CUDA in available:
        pytest.skip("this onnxruntime has GPU providers")
    for runtime, provider, extra in (
        ("onnxruntime-cuda", CUDA, r"t3compile\[gpu\]"),
        ("onnxruntime-tensorrt", TENSORRT, r"t3compile\[gpu,tensorrt\]"),
    ):
        with pytest.raises(
            EngineError, match=rf"needs onnxruntime's {provider}, .*only .*{CPU}: .*pip install '{extra}"
        ):
            load_engine(folder / "model.onnx", runtime)


def test_provider_options_go_to_the_faked_provider(folder: Path, fake_providers: FakeProviders) -> None:
    session = fake_providers(ALL, {CUDA, TENSORRT})
    load_engine(folder / "model.onnx", "onnxruntime-cuda", provider_options={"device_id": "1"})
    assert session.asked == [[(CUDA, {"device_id": "1"}), CPU]]


# --- inputs and outputs --------------------------------------------------------------------------


def test_engines_tell_their_inputs_and_what_the_trace_fixed(folder: Path) -> None:
    for name, runtime in (("model.onnx", "onnxruntime-cpu"), ("model.pt2", "torch")):
        engine = load_engine(folder / name)
        assert engine.runtime == runtime
        assert [str(spec) for spec in engine.inputs] == ["x [3] float32"]
        assert engine.output_names == ("output",)
        assert engine.frozen == {"flag": True}


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_arrays_of_every_layout_are_taken(name: str, folder: Path) -> None:
    engine = load_engine(folder / name)
    read_only = np.arange(3, dtype=np.float32)
    read_only.flags.writeable = False
    for array in (read_only, np.arange(3, dtype=np.float32)[::-1], np.arange(3, dtype=">f4"), torch.arange(3.0).neg()):
        assert np.array_equal(np.asarray(engine(array)), 2 * np.asarray(array))
    for bad in ("a cat", None, object(), np.array(["a", "b", "c"])):
        with pytest.raises(InputsError, match=r"input 'x' is .*expected a tensor or an array of float32"):
            engine(bad)


def test_an_open_length_takes_any(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    for length in ("n", None):
        graph = helper.make_graph(
            [helper.make_node("Neg", ["x"], ["y"])],
            "open",
            [value("x", TensorProto.FLOAT, [length, 2])],
            [value("y", TensorProto.FLOAT, [length, 2])],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "x")
        engine = load_engine(tmp_path / "x")
        assert engine.frozen is None
        assert engine(torch.ones(5, 2)).shape == (5, 2)
        with pytest.raises(
            InputsError, match=rf"has shape \[5, 3\], expected \['{length or '?'}', 2\]".replace("?", r"\?")
        ):
            engine(torch.ones(5, 3))


def test_bfloat16_goes_in_and_comes_out_and_is_saved_as_float32(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["wide", "y"], ["sum"]),
            helper.make_node("Cast", ["sum"], ["narrow"], to=TensorProto.BFLOAT16),
        ],
        "bfloat16",
        [value("x", TensorProto.BFLOAT16, [2]), value("y", TensorProto.FLOAT, [2])],
        [value("narrow", TensorProto.BFLOAT16, [2]), value("sum", TensorProto.FLOAT, [2])],
    )
    path = tmp_path / "bfloat16.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    engine = OnnxEngine(path)
    x, y = torch.tensor([1.5, -3.0], dtype=torch.bfloat16), torch.tensor([0.25, 0.001])
    narrow, total = engine(x, y)
    assert torch.equal(total, x.float() + y)
    assert torch.equal(narrow, (x.float() + y).bfloat16())
    assert narrow.dtype == torch.bfloat16
    with pytest.raises(InputsError, match="input 'x' has dtype float32, expected bfloat16"):
        engine(x.float(), y)
    result = run_timed(engine, {"x": x, "y": y}, repeat=1)
    assert [dtype for _, _, dtype in result.outputs] == ["bfloat16", "float32"]
    result.save(tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as saved:
        assert np.array_equal(saved["narrow"], narrow.float().numpy())


# --- the command ---------------------------------------------------------------------------------


def _run(*args: Any) -> Any:
    return CliRunner().invoke(main, ["run", *map(str, args)])


@pytest.mark.parametrize(
    ("name", "options", "runtime"),
    [
        ("model.onnx", (), "onnxruntime-cpu"),
        ("model.onnx", ("--runtime", "onnxruntime-cpu"), "onnxruntime-cpu"),
        ("model.pt2", ("--runtime", "torch"), "torch"),
    ],
)
def test_run_says_what_was_chosen(
    name: str, options: tuple[str, ...], runtime: str, folder: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "in.npz", x=np.arange(3, dtype=np.float32))
    result = _run(folder / name, "--inputs", tmp_path / "in.npz", "-o", tmp_path / "out.npz", "--json", *options)
    assert result.exit_code == 0, result.stderr
    assert f"runtime: {runtime}" in result.stderr.splitlines()
    assert json.loads(result.stdout)["runtime"] == runtime
    with np.load(tmp_path / "out.npz") as saved:
        assert saved["output"].tolist() == [0, 2, 4]


def test_run_says_that_a_faked_provider_did_not_start(
    folder: Path, tmp_path: Path, fake_providers: FakeProviders
) -> None:
    fake_providers(ALL, set())
    np.savez(tmp_path / "in.npz", x=np.arange(3, dtype=np.float32))
    result = _run(folder / "model.onnx", "--inputs", tmp_path / "in.npz")
    assert result.exit_code == 0
    assert "runtime: onnxruntime-cpu" in result.stderr
    assert f"note: onnxruntime has {CUDA} and could not start it" in result.stderr
    refused = _run(folder / "model.onnx", "--inputs", tmp_path / "in.npz", "--runtime", "onnxruntime-cuda")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: runtime 'onnxruntime-cuda' was chosen")


def test_run_of_compiled_code_needs_a_flag(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.arange(3, dtype=np.float32))
    result = _run(folder / "model.aoti.pt2", "--inputs", tmp_path / "in.npz")
    assert result.exit_code == 2
    assert "compiled code that runs when it is loaded" in result.stderr
    assert "--trust-code" in result.stderr


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (("--cuda-graph",), "cuda_graph"),
        (("--refit-from", "model.onnx"), "refit_from"),
        (("--weight-streaming-budget", "4GiB"), "weight_streaming_budget"),
    ],
)
def test_run_refuses_an_option_of_another_runtime(
    option: tuple[str, ...], name: str, folder: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "in.npz", x=np.arange(3, dtype=np.float32))
    result = _run(folder / "model.onnx", "--inputs", tmp_path / "in.npz", *option)
    assert result.exit_code == 2
    assert f"has no option '{name}'" in result.stderr
