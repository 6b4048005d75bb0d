"""TensorRTEngine against a recording stand-in for TensorRT and the device; manifest, layer check, progress, driver."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from t3compile.errors import EngineError, InputsError
from t3compile.export import cuda_memory, tensorrt_api, tensorrt_session
from t3compile.export.build_engine import build_engine
from t3compile.export.build_network import BuildSettings
from t3compile.export.build_progress import Phases
from t3compile.export.cuda_device import CudaDevice, find_cuda_device, read_cuda_device
from t3compile.export.cuda_memory import CudaPythonMemory, open_device_memory
from t3compile.export.engine_inputs import EngineInput
from t3compile.export.engine_layers import AttentionNode, check_layers
from t3compile.export.engine_manifest import EngineManifest, manifest_path, read_manifest
from t3compile.export.tensorrt_engine import TensorRTEngine
from t3compile.progress import Progress
from tests.fake_tensorrt import BUFFERS, Behaviour, FakeMemory, make_tensorrt

VERSION = "10.16.1.11"
DEVICE = CudaDevice(0, "NVIDIA Test", "9.0", "13.0")


def _model(path: Path) -> Path:
    """scaled = x * w, total = x + y in bfloat16, with w as external data."""
    f32, bf16 = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
    inputs = [("x", f32, [2, 3]), ("y", bf16, [2]), ("n", onnx.TensorProto.INT64, [])]
    outputs = [("scaled", f32, [2, 3]), ("doubled", bf16, [2])]
    weight = onnx.numpy_helper.from_array(np.full((2, 3), 3, np.float32), "w")
    nodes = [
        onnx.helper.make_node("Mul", ["x", "w"], ["scaled"], name="mul"),
        onnx.helper.make_node("Add", ["y", "y"], ["doubled"], name="add"),
    ]
    infos = [[onnx.helper.make_tensor_value_info(*row) for row in rows] for rows in (inputs, outputs)]
    graph = onnx.helper.make_graph(nodes, "small", *infos, initializer=[weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    model.metadata_props.add(key="t3compile_frozen", value='{"return_dict": false}')
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    return path


def _compute(given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {"scaled": given["x"] * 3 + given["n"], "doubled": given["y"] * 2}


@pytest.fixture
def behaviour(monkeypatch: pytest.MonkeyPatch) -> Behaviour:
    made = Behaviour(compute=_compute)
    monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt(VERSION, made))
    monkeypatch.setattr(tensorrt_api, "find_cuda_device", lambda index=0: DEVICE)
    monkeypatch.setattr(tensorrt_session, "open_device_memory", FakeMemory)
    BUFFERS.clear()
    return made


@pytest.fixture
def path(behaviour: Behaviour, tmp_path: Path) -> Path:
    build_engine(_model(tmp_path / "small.onnx"), tmp_path / "small.engine")
    behaviour.calls.clear()
    return tmp_path / "small.engine"


X = torch.arange(6.0).reshape(2, 3)
Y = torch.tensor([0.5, 1.5], dtype=torch.bfloat16)
N = torch.tensor(4)


# --- calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_calls_by_position_and_by_name(path: Path, cuda_graph: bool) -> None:
    engine = TensorRTEngine(path, cuda_graph=cuda_graph)
    assert (engine.runtime, engine.output_names) == ("tensorrt", ("scaled", "doubled"))
    assert list(map(str, engine.inputs)) == ["x [2, 3] float32", "y [2] bfloat16", "n [] int64"]
    assert engine.frozen == {"return_dict": False}
    for scaled, doubled in (engine(X, Y, N), engine(n=N, y=Y, x=X), engine(X, n=N, y=Y)):
        assert torch.equal(scaled, X * 3 + 4)
        assert (doubled.dtype, doubled.tolist()) == (torch.bfloat16, [1.0, 3.0])
    # A call's outputs are its own.
    first, _ = engine(X, Y, N)
    engine(X + 1, Y, N)
    assert torch.equal(first, X * 3 + 4)
    assert engine._session._memory.replays == (5 if cuda_graph else 0)  # type: ignore[attr-defined]


def test_calls_from_several_threads_do_not_mix(path: Path, behaviour: Behaviour) -> None:
    behaviour.seconds = {False: 0.002}
    engine = TensorRTEngine(path)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: engine(X + i, Y, N)[0], range(24)))
        timed = [pool.submit(engine._session.time), pool.submit(engine, X, Y, N)]
    assert [torch.equal(scaled, (X + i) * 3 + 4) for i, scaled in enumerate(found)] == [True] * 24
    assert timed[0].result() >= 0.002
    assert torch.equal(timed[1].result()[0], X * 3 + 4)


def test_arrays_come_back_as_arrays(path: Path, behaviour: Behaviour) -> None:
    behaviour.compute = lambda given: {"scaled": given["x"] * 3, "doubled": given["y"] * 2}
    engine = TensorRTEngine(path)
    with pytest.raises(InputsError, match="input 'y' has dtype float32, expected bfloat16"):
        engine(X.numpy(), np.ones(2, np.float32), N.numpy())
    scaled, doubled = engine(X.numpy(), Y, np.array(4))
    assert isinstance(scaled, Tensor)
    assert isinstance(doubled, Tensor)


def test_every_input_and_output_has_an_address(path: Path, behaviour: Behaviour) -> None:
    TensorRTEngine(path)(X, Y, N)
    assert behaviour.names() == ["deserialize_cuda_engine", "create_execution_context", "execute_async_v3"]
    assert behaviour.last("execute_async_v3")[1] == FakeMemory.stream
    assert len(BUFFERS) == 5


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((X, Y), {}, "input 'n' is missing; the model's inputs are x [2, 3] float32, y [2] bfloat16, n [] int64"),
        ((X, Y, N), {"mask": N}, "unknown input 'mask'"),
        ((X, Y, N), {"x": X}, "input 'x' is given twice"),
        ((X, Y, N, N), {}, "4 inputs were given, the model has 3"),
        ((X[:1], Y, N), {}, "input 'x' has shape [1, 3], expected [2, 3]"),
        ((X.double(), Y, N), {}, "input 'x' has dtype float64, expected float32"),
        ((X, Y, N.reshape(1)), {}, "input 'n' has shape [1], expected []"),
        ((X, Y, "four"), {}, "input 'n' is str, expected a tensor or an array"),
        ((X, Y, None), {}, "input 'n' is NoneType"),
    ],
)
def test_wrong_inputs_are_named(path: Path, args: Any, kwargs: Any, text: str) -> None:
    with pytest.raises(InputsError) as raised:
        TensorRTEngine(path)(*args, **kwargs)
    assert text in str(raised.value)


# --- engines of elsewhere ------------------------------------------------------------------------


def test_an_engine_of_another_version_is_refused_with_both_values(
    path: Path, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt("11.4.0.106", behaviour))
    with pytest.raises(EngineError) as raised:
        TensorRTEngine(path)
    assert f"built with TensorRT {VERSION} and this is 11.4.0.106" in str(raised.value)
    assert behaviour.calls == []


def test_an_engine_of_another_gpu_is_refused_with_both_values(
    path: Path, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = CudaDevice(0, "NVIDIA Other", "8.9", "13.0")
    monkeypatch.setattr(tensorrt_api, "find_cuda_device", lambda index=0: other)
    with pytest.raises(EngineError) as raised:
        TensorRTEngine(path)
    message = str(raised.value)
    assert "compute capability 9.0 (NVIDIA Test)" in message
    assert "8.9 (NVIDIA Other)" in message
    assert behaviour.calls == []


def test_without_tensorrt_the_message_says_what_to_install(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        EngineError, match=r"running the engine 'small\.engine' needs the package 'tensorrt'.*pip install"
    ):
        TensorRTEngine(path)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda p: manifest_path(p).unlink(), "has no manifest 'small.engine.manifest.json' beside it"),
        (lambda p: manifest_path(p).write_text("{"), "is not an engine's manifest, or is damaged"),
        (lambda p: manifest_path(p).write_text("[]"), "is not an engine's manifest, or is damaged"),
        (lambda p: manifest_path(p).write_text('{"format": 7}'), "has format 7, this t3compile reads 1"),
        (lambda p: p.write_bytes(p.read_bytes() + b" "), "copy both files again"),
        (lambda p: p.unlink(), "there is no engine"),
    ],
)
def test_engines_without_their_manifest_are_refused(path: Path, damage: Any, text: str) -> None:
    damage(path)
    with pytest.raises(EngineError) as raised:
        TensorRTEngine(path)
    assert text in str(raised.value)


def test_a_damaged_engine_gives_tensorrts_reason(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(b"x" * len(data))
    with pytest.raises(EngineError, match=r"cannot load .*: magic tag does not match"):
        TensorRTEngine(path)


def test_a_manifest_of_another_model_is_refused(path: Path) -> None:
    manifest = read_manifest(path)
    wrong = dataclasses.replace(manifest, inputs=(EngineInput("z", (2,), "float32"), *manifest.inputs[1:]))
    manifest_path(path).write_text(wrong.dumps())
    with pytest.raises(EngineError, match=r"lists inputs z \[2\] float32.* and the engine has x \[2, 3\] float32"):
        TensorRTEngine(path)


def test_a_manifest_reads_back_what_it_wrote(path: Path) -> None:
    manifest = read_manifest(path)
    assert EngineManifest.loads(manifest.dumps(), path) == manifest


# --- weights elsewhere ---------------------------------------------------------------------------


@pytest.fixture
def stripped(behaviour: Behaviour, tmp_path: Path) -> Path:
    settings = BuildSettings(strip_weights=True)
    build_engine(_model(tmp_path / "small.onnx"), tmp_path / "small.engine", settings=settings)
    behaviour.calls.clear()
    return tmp_path / "small.engine"


def test_a_stripped_engine_takes_its_weights_from_its_file(stripped: Path, behaviour: Behaviour) -> None:
    engine = TensorRTEngine(stripped, refit_from=stripped.with_name("small.onnx"))
    assert torch.equal(engine(X, Y, N)[0], X * 3 + 4)
    order = ["deserialize_cuda_engine", "refit_from_file", "refit_cuda_engine", "create_execution_context"]
    assert behaviour.names()[:4] == order


def test_a_stripped_engine_without_its_file_is_refused(stripped: Path, behaviour: Behaviour) -> None:
    with pytest.raises(EngineError, match=r"give the ONNX file it was built from \('small.onnx'\)"):
        TensorRTEngine(stripped)
    other = stripped.with_name("small.onnx.data")
    other.write_bytes(np.full((2, 3), 4, np.float32).tobytes())
    with pytest.raises(EngineError, match=r"small\.onnx\.data' is not what .* was built from"):
        TensorRTEngine(stripped, refit_from=stripped.with_name("small.onnx"))
    assert behaviour.calls == []


def test_weights_that_the_file_lacks_are_named(stripped: Path, behaviour: Behaviour) -> None:
    behaviour.missing_weights = ("mul_weight",)
    with pytest.raises(EngineError, match=r"has no values for 1 weights of the engine \(mul_weight\)"):
        TensorRTEngine(stripped, refit_from=stripped.with_name("small.onnx"))
    assert "refit_cuda_engine" not in behaviour.names()


def test_a_full_engine_takes_no_weights(path: Path) -> None:
    with pytest.raises(EngineError, match="holds its weights"):
        TensorRTEngine(path, refit_from=path.with_name("small.onnx"))


@pytest.mark.parametrize(("budget", "set_to"), [(None, 4096), (0, 0), (100, 100)])
def test_the_budget_of_streamed_weights_is_set_before_the_context(
    behaviour: Behaviour, tmp_path: Path, budget: int | None, set_to: int
) -> None:
    settings = BuildSettings(weight_streaming=True)
    build_engine(_model(tmp_path / "small.onnx"), tmp_path / "small.engine", settings=settings)
    engine = TensorRTEngine(tmp_path / "small.engine", weight_streaming_budget=budget)
    assert behaviour.last("create_execution_context") == ("create_execution_context", set_to)
    assert engine.notes == (f"{set_to:,} bytes of weights stay on the GPU, the rest is streamed",)


def test_a_budget_for_an_engine_that_does_not_stream_is_refused(path: Path) -> None:
    with pytest.raises(EngineError, match="--weight-streaming"):
        TensorRTEngine(path, weight_streaming_budget=1)


# --- the inspector's layers ----------------------------------------------------------------------


def _layers(*rows: tuple[str, str, str, str]) -> str:
    keys = ("Name", "LayerType", "TacticName", "Metadata")
    return json.dumps({"Layers": [dict(zip(keys, row, strict=True)) for row in rows]})


FUNCTION = "WindowAttention_0123456789"
SITES = (AttentionNode("a", FUNCTION, "native"), AttentionNode("b", FUNCTION, "native"))
INSIDE = f"[ONNX Layer: inner_matmul | Local Function: {FUNCTION}]\x1f[ONNX Layer: inner | Local Function: {FUNCTION}]"


def test_fused_attention_is_counted_per_function() -> None:
    fused = ("_gemm_mha_v2_myl0_4", "kgen", "_gemm_mha_v2_0xab", INSIDE)
    assert check_layers(_layers(fused, fused), SITES).warnings == ()
    once = check_layers(_layers(fused, ("m", "gemm", "sm80_xmma_gemm", INSIDE)), SITES)
    assert (once.expected, once.found) == (2, 1)
    assert "function 'WindowAttention_0123456789' of sites 'a', 'b': 1 fused" in once.warnings[0]


@pytest.mark.parametrize(
    "layer",
    [
        ("node_scaled_dot_product_attention_reshape", "shape_call", "", INSIDE),
        ("/encoder/mha/attn/MatMul_myl0_16", "gemm", "sm80_xmma_gemm_f16", INSIDE),
        ("__myl_TraMaxSubExpSum_myl0_1", "kgen", "__myl_TraMaxSubExpSum_0xcb", INSIDE),
        ("_gemm_mha_v2_myl0_4", "kgen", "_gemm_mha_v2_0xab", "[ONNX Layer: inner | Local Function: Another]"),
        ("_gemm_mha_v2_myl0_4", "kgen", "_gemm_mha_v2_0xab", ""),
    ],
)
def test_what_is_not_fused_attention_of_the_function_is_not_counted(layer: tuple[str, str, str, str]) -> None:
    assert check_layers(_layers(layer), SITES[:1]).found == 0


@pytest.mark.parametrize(
    "layer",
    [
        ("_gemv_mha_v1_myl3_2", "kgen", "", INSIDE),
        ("x", "kgen", "cudnn_fmha_sm90", INSIDE),
        ("x", "Attention", "", INSIDE),
        ("x", "kgen_mha", "", INSIDE),
    ],
)
def test_forms_of_fused_attention_are_counted(layer: tuple[str, str, str, str]) -> None:
    assert check_layers(_layers(layer), SITES[:1]).found == 1


def test_a_plain_attention_node_is_found_by_its_name_outside_of_functions() -> None:
    plain = (AttentionNode("inner", "", "native"),)
    # The function's node has the same name.
    assert check_layers(_layers(("_gemm_mha_v2_1", "kgen", "", INSIDE)), plain).found == 0
    assert check_layers(_layers(("_gemm_mha_v2_1", "kgen", "", "[ONNX Layer: inner]")), plain).found == 1
    assert check_layers(_layers(("_gemm_mha_v2_1", "kgen", "", "[ONNX Layer: inner/3]")), plain).found == 1
    other = check_layers(_layers(("_gemm_mha_v2_1", "kgen", "", "[ONNX Layer: inner_1]")), plain)
    assert other.warnings == ("attention 'inner': 0 fused attention layers in the engine, expected 1; it may be slow",)


def test_plugin_layers_are_found_by_name_and_type() -> None:
    node = (AttentionNode("a", FUNCTION, "plugin", ("a_local", "a")),)
    both = (("a_local", "PluginV3", "", ""), ("fused", "PluginV3", "", "[ONNX Layer: a]"))
    assert check_layers(_layers(*both), node).warnings == ()
    missing = check_layers(_layers(both[0], ("a", "kgen", "", "[ONNX Layer: a]")), node)
    assert missing.warnings == ("site 'a': no plugin layer 'a' in the engine",)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"Layers": [1]}', '{"Layers": null}'])
def test_an_unreadable_report_is_a_warning(text: str) -> None:
    check = check_layers(text, SITES)
    assert (check.found, len(check.warnings)) == (0, 1)
    assert "cannot be read" in check.warnings[0]


def test_a_report_of_names_alone_finds_nothing() -> None:
    assert check_layers('{"Layers": ["_gemm_mha_v2_myl0_4"]}', SITES).found == 0


# --- progress ------------------------------------------------------------------------------------


def test_nested_phases_are_fractions_of_their_parents_step() -> None:
    shown: list[tuple[str, int, float]] = []

    class Shown(Progress):
        def __call__(self, step: str) -> None:
            raise AssertionError(step)

        def phase(self, name: str, depth: int, done: float) -> None:
            shown.append((name, depth, done))

    phases = Phases(Shown())
    phases.start("whole", None, 2)
    phases.start("half", "whole", 4)
    assert phases.step("half", 1)
    phases.finish("half")
    phases.step("whole", 0)
    phases.start("other half", "whole", 4)
    phases.start("lost parent", "unknown", 0)
    phases.step("lost parent", 7)
    assert shown == [
        ("whole", 0, 0.0),
        ("half", 1, 0.0),
        ("half", 1, 0.25),
        ("whole", 0, 0.5),
        ("other half", 1, 0.5),
        ("lost parent", 2, 0.5),
        ("lost parent", 2, 0.625),
    ]


# --- the device ----------------------------------------------------------------------------------


class FakeDriver:
    """libcuda: one Hopper GPU, or as many and as broken as asked."""

    def __init__(self, count: int = 1, start: int = 0, describe: int = 0) -> None:
        self.count, self.start, self.describe = count, start, describe

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.start

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        ctypes.memmove(name, b"NVIDIA H100\0", 12)
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = {75: 9, 76: 0}[attribute]
        return self.describe

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 12080
        return 0


def test_the_driver_describes_its_device() -> None:
    assert read_cuda_device(FakeDriver(), 0) == CudaDevice(0, "NVIDIA H100", "9.0", "12.8")
    for driver, index, text in (
        (FakeDriver(start=100), 0, "does not start, error 100"),
        (FakeDriver(count=0), 0, "lists no device"),
        (FakeDriver(), 1, "lists 1 devices, no number 1"),
        (FakeDriver(describe=3), 0, "does not describe its device, error 3"),
    ):
        found = read_cuda_device(driver, index)
        assert isinstance(found, str)
        assert text in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_driver_says_so() -> None:
    assert isinstance(find_cuda_device(), str)


class FakeCudaPython:
    """cuda.bindings.runtime on the host: an address is a host address."""

    def __init__(self) -> None:
        self.cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
        self.held: dict[int, Any] = {}
        self.calls: list[str] = []
        self.fails = ""

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        buffer = ctypes.create_string_buffer(size)
        self.held[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:  # noqa: N802
        assert (target in self.held) == (kind == 1)
        assert (source in self.held) == (kind == 2)
        ctypes.memmove(target, source, size)
        return (0,)

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, b"out of memory"

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> tuple[int, int]:
            self.calls.append(name)
            return (2 if name == self.fails else 0), 11

        return call


def test_cuda_python_moves_tensors_and_replays_graphs() -> None:
    runtime = FakeCudaPython()
    memory = CudaPythonMemory(runtime, 0)
    specs = (EngineInput("x", (2, 3), "float32"), EngineInput("y", (2,), "bfloat16"), EngineInput("e", (0,), "float32"))
    x, y, empty = (memory.allocate(spec) for spec in specs)
    strided = X.t().contiguous().t()
    outputs = memory.run([(x, strided), (y, Y)], lambda: None, [x, y, empty])
    assert [output.tolist() for output in outputs] == [X.tolist(), Y.tolist(), []]
    launched: list[int] = []
    replay = memory.capture(lambda: launched.append(1))
    assert (launched, runtime.calls[-4:]) == (
        [1],
        ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphDestroy"],
    )
    replay()
    assert (launched, runtime.calls[-1]) == ([1], "cudaGraphLaunch")
    runtime.fails = "cudaStreamSynchronize"
    with pytest.raises(EngineError, match="cudaStreamSynchronize failed: out of memory"):
        memory.synchronize()
    runtime.fails = ""
    del memory, replay
    assert runtime.calls.count("cudaFree") == 3
    assert runtime.calls.count("cudaGraphExecDestroy") == 1
    assert runtime.calls[-1] == "cudaStreamDestroy"


@pytest.mark.parametrize("fails", ["", "cudaStreamEndCapture"])
def test_a_launch_that_fails_while_it_is_captured_gives_its_own_reason(fails: str) -> None:
    runtime = FakeCudaPython()
    memory = CudaPythonMemory(runtime, 0)
    runtime.fails = fails

    def launch() -> None:
        raise EngineError("TensorRT cannot run the engine")

    with pytest.raises(EngineError, match="TensorRT cannot run the engine"):
        memory.capture(launch)
    # The stream leaves capture mode, and the half graph goes.
    ended = ["cudaStreamBeginCapture", "cudaStreamEndCapture", *([] if fails else ["cudaGraphDestroy"])]
    assert runtime.calls[-len(ended) :] == ended
    assert "cudaGraphInstantiate" not in runtime.calls


def test_a_graph_that_is_not_instantiated_is_destroyed() -> None:
    runtime = FakeCudaPython()
    memory = CudaPythonMemory(runtime, 0)
    runtime.fails = "cudaGraphInstantiate"
    with pytest.raises(EngineError, match="cudaGraphInstantiate failed: out of memory"):
        memory.capture(lambda: None)
    assert runtime.calls[-1] == "cudaGraphDestroy"
    del memory
    assert "cudaGraphExecDestroy" not in runtime.calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch has CUDA here")
def test_without_cuda_in_torch_or_cuda_python_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EngineError, match="pip install cuda-python"):
        open_device_memory(0)
    assert cuda_memory.torch is torch


# --- the real thing ------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_real_engine_matches_onnxruntime(tmp_path: Path, cuda_graph: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    onnxruntime = pytest.importorskip("onnxruntime")
    from t3compile.pipeline import detect, export_onnx, rewrite
    from t3compile.plan import make_plan
    from t3compile.program import trace
    from tests.tiny_models import HandWrittenDiT

    torch.manual_seed(0)
    model = HandWrittenDiT(layers=2, grid=(2, 4, 4), head_dim=32).eval()
    program = trace(model, model.example_inputs())
    rewritten = rewrite(program, make_plan(detect(program), [(1, 2, 2)]))
    onnx_path = export_onnx(rewritten, tmp_path / "model.onnx", check=False)
    report = build_engine(onnx_path, tmp_path / "model.engine", attention="native")
    assert report.manifest.layer_check["layers"] > 0
    engine = TensorRTEngine(tmp_path / "model.engine", cuda_graph=cuda_graph)
    inputs = model.example_inputs()
    names = [spec.name for spec in engine.inputs]
    feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    session = onnxruntime.InferenceSession(str(onnx_path), providers=["CPUExecutionProvider"])
    wanted = torch.from_numpy(session.run(None, feeds)[0])
    for given in (inputs, tuple(value.cuda() for value in inputs)):
        found = engine(*given)
        assert found.is_cuda == given[0].is_cuda
        # TF32 products keep ten bits: 2^-10 of values of size one, over a few layers.
        assert (found.cpu() - wanted).abs().max() < 2**-6
