"""build_engine against a recording stand-in for TensorRT: what it asks for, what it writes, and how it fails."""

from __future__ import annotations

import _thread
import json
import shutil
import sys
import tempfile
import threading
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator

import t3compile
from t3compile.cli import main
from t3compile.errors import EngineError, ExportError, KernelError, OutputError
from t3compile.execute import execute
from t3compile.export import prepare_plugins, tensorrt_api, tensorrt_session
from t3compile.export.build_engine import EngineReport, build_engine
from t3compile.export.build_network import BuildSettings
from t3compile.export.cuda_device import CudaDevice
from t3compile.export.engine_manifest import hash_file, read_manifest
from t3compile.export.plugin_layers import PluginLayers
from t3compile.inputs import named_inputs
from t3compile.passes.mix_precision import MixPrecision
from t3compile.pipeline import detect, export_onnx, rewrite
from t3compile.plan import make_plan
from t3compile.program import Program, trace
from tests import fake_tensorrt
from tests.fake_tensorrt import BUFFERS, MAGIC, Behaviour, FakeMemory, fused_layers, make_tensorrt
from tests.tiny_models import HandWrittenDiT

VERSION = "10.16.1.11"
DEVICE = CudaDevice(0, "NVIDIA Test", "9.0", "13.0")


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    model = HandWrittenDiT(layers=2, grid=(2, 4, 4), head_dim=16).eval()
    traced = trace(model, model.example_inputs())
    return rewrite(traced, make_plan(detect(traced), [(1, 2, 2)]))


@pytest.fixture(scope="module")
def exported(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_onnx(program, folder / "model.onnx", check=False)
    export_onnx(program, folder / "half.onnx", precision="bfloat16", check=False)
    return folder


@dataclass
class Machine:
    """A machine with the stand-in: a folder to write in, and what the stand-in does and was asked."""

    folder: Path
    behaviour: Behaviour
    monkeypatch: pytest.MonkeyPatch

    @property
    def onnx(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def half(self) -> Path:
        """The same in bfloat16, which the kernel takes."""
        return self.folder / "half.onnx"

    @property
    def engine(self) -> Path:
        return self.folder / "out" / "model.engine"

    @property
    def written(self) -> list[str]:
        return sorted(path.name for path in self.engine.parent.iterdir())

    def install(self, version: str) -> None:
        self.monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt(version, self.behaviour))

    def build(self, onnx: Path | None = None, **options: Any) -> EngineReport:
        return build_engine(onnx or self.onnx, self.engine, **{"attention": "native", **options})


@pytest.fixture
def machine(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    for name in ("model.onnx", "model.onnx.data", "half.onnx", "half.onnx.data"):
        shutil.copy(exported / name, tmp_path / name)
    (tmp_path / "out").mkdir()
    made = Machine(tmp_path, Behaviour(), monkeypatch)
    made.install(VERSION)
    monkeypatch.setattr(tensorrt_api, "find_cuda_device", lambda index=0: DEVICE)
    monkeypatch.setattr(tensorrt_session, "open_device_memory", FakeMemory)
    BUFFERS.clear()
    return made


# --- a build that succeeds -----------------------------------------------------------------------


def test_the_engine_its_manifest_and_its_layers_are_written(machine: Machine, program: Program) -> None:
    report = machine.build()
    assert machine.written == ["model.engine", "model.engine.layers.json", "model.engine.manifest.json"]
    manifest = read_manifest(machine.engine)
    assert manifest == report.manifest
    assert manifest.t3compile_version == t3compile.__version__
    assert (manifest.tensorrt_version, manifest.compute_capability, manifest.gpu) == (VERSION, "9.0", "NVIDIA Test")
    assert (manifest.precision, manifest.lowering, manifest.stripped) == ("float32", "native", False)
    assert list(map(str, manifest.inputs)) == [
        "x [1, 4, 2, 8, 8] float32",
        "t [1] float32",
        "text [1, 5, 16] float32",
    ]
    assert list(map(str, manifest.outputs)) == ["output [1, 4, 2, 8, 8] float32"]
    assert manifest.engine_sha256 == hash_file(machine.engine)
    assert manifest.onnx.sha256 == hash_file(machine.onnx)
    assert manifest.onnx.data_sha256 == {"model.onnx.data": hash_file(machine.folder / "model.onnx.data")}
    assert program.plan is not None
    assert manifest.plan == json.loads(program.plan.dumps())
    # Two sites of one function, and the cross-attention of each block.
    assert [(site.site.startswith("node__symbolic"), site.lowering) for site in manifest.sites] == [
        (True, "native"),
        (False, "native"),
    ] * 2
    assert manifest.layer_check["attention_found"] == manifest.layer_check["attention_expected"] == 4
    assert report.notes == ()
    layers = json.loads((machine.engine.parent / "model.engine.layers.json").read_text())
    assert any("mha" in layer["Name"] for layer in layers["Layers"])
    assert sorted(path.name for path in machine.folder.iterdir()) == [
        "half.onnx",
        "half.onnx.data",
        "model.onnx",
        "model.onnx.data",
        "out",
    ]


def test_an_unchanged_file_is_parsed_where_it_is(machine: Machine) -> None:
    machine.build()
    assert machine.behaviour.last("parse_from_file") == ("parse_from_file", machine.onnx)


def test_a_changed_file_is_parsed_beside_its_weights(machine: Machine) -> None:
    Plugins(machine)
    before = _listing(machine.folder)
    machine.build(machine.half, attention="plugin")
    parsed = machine.behaviour.last("parse_from_file")[1]
    assert parsed != machine.half
    assert (parsed.parent, parsed.exists()) == (machine.folder, False)
    assert _listing(machine.folder) == before | {
        "model.engine",
        "model.engine.layers.json",
        "model.engine.manifest.json",
    }
    expected = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(machine.half).graph.initializer}
    for initializer in machine.behaviour.networks[-1].graph.initializer:
        assert np.array_equal(onnx.numpy_helper.to_array(initializer), expected[initializer.name])


def _listing(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


def test_weights_in_a_read_only_folder_are_linked(machine: Machine) -> None:
    Plugins(machine)
    real = tempfile.mkstemp
    linked: list[bool] = []

    def refuse(*args: Any, dir: Path | None = None, **kwargs: Any) -> Any:
        if dir == machine.half.parent:
            raise PermissionError(13, "Permission denied")
        return real(*args, dir=dir, **kwargs)

    def parse(path: str, *args: Any, **kwargs: Any) -> Any:
        data = Path(path).parent / "half.onnx.data"
        linked.append(data.is_symlink() and data.read_bytes() == (machine.folder / "half.onnx.data").read_bytes())
        return load(path, load_external_data=False)

    load = onnx.load
    machine.monkeypatch.setattr(tempfile, "mkstemp", refuse)
    machine.monkeypatch.setattr(onnx, "load", parse)
    machine.build(machine.half, attention="plugin")
    # The last to read it is the parser.
    assert linked[-1]


@pytest.mark.parametrize(("version", "bits"), [("10.13.3.9", 0b1011), ("10.16.1.11", 0b1011), ("11.4.0.106", 0b101)])
def test_flags_of_the_network_follow_the_version(machine: Machine, version: str, bits: int) -> None:
    machine.install(version)
    machine.build()
    assert {call[1] for call in machine.behaviour.calls if call[0] == "create_network"} == {bits}


def test_settings_reach_the_builder(machine: Machine) -> None:
    settings = BuildSettings(workspace_bytes=1 << 30, weight_streaming=True, strip_weights=True, opt_level=5)
    manifest = machine.build(settings=settings).manifest
    assert machine.behaviour.last("set_memory_pool_limit") == ("set_memory_pool_limit", "WORKSPACE", 1 << 30)
    flags = [call[1] for call in machine.behaviour.calls if call[0] == "set_flag"]
    assert flags == ["STRIP_PLAN", "REFIT_IDENTICAL", "WEIGHT_STREAMING"]
    assert machine.behaviour.last("build")[1:3] == ("DETAILED", 5)
    assert (manifest.stripped, manifest.weight_streaming) == (True, True)
    assert manifest.settings == {
        "workspace_bytes": 1 << 30,
        "timing_cache": None,
        "weight_streaming": True,
        "strip_weights": True,
        "opt_level": 5,
        "tf32": True,
    }


def test_defaults_leave_the_builder_alone(machine: Machine) -> None:
    machine.build()
    assert {"set_memory_pool_limit", "set_flag", "set_timing_cache"}.isdisjoint(machine.behaviour.names())
    assert machine.behaviour.last("build")[1:3] == ("DETAILED", 3)


@pytest.mark.parametrize("settings", [{"opt_level": 6}, {"opt_level": -1}, {"workspace_bytes": 0}])
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(EngineError):
        BuildSettings(**settings)


# --- versions and what is missing ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "texts"),
    [
        ("10.14.1.48.post1", ["TensorRT 10.14.1.48", "10.14 is reported to break", "10.15"]),
        ("10.12.0.36", ["TensorRT 10.12.0.36 is too old", "10.13"]),
        ("8.6.1", ["TensorRT 8.6.1 is too old"]),
        ("unknown", ["'unknown' cannot be read"]),
    ],
)
def test_versions_that_cannot_build_are_refused(machine: Machine, version: str, texts: list[str]) -> None:
    machine.install(version)
    with pytest.raises(EngineError) as raised:
        machine.build()
    assert [text for text in texts if text not in str(raised.value)] == []
    assert (machine.written, machine.behaviour.calls) == ([], [])


def test_a_version_without_a_needed_member_is_refused_by_name(machine: Machine) -> None:
    without: Any = make_tensorrt(VERSION, machine.behaviour)
    without.ProfilingVerbosity = types.SimpleNamespace(LAYER_NAMES_ONLY=without.ProfilingVerbosity.LAYER_NAMES_ONLY)
    machine.monkeypatch.setitem(sys.modules, "tensorrt", without)
    with pytest.raises(EngineError, match=r"has no ProfilingVerbosity\.DETAILED"):
        machine.build()
    assert machine.written == []


# --- precision -----------------------------------------------------------------------------------


def test_the_precision_of_a_file_must_be_the_one_asked_for(machine: Machine) -> None:
    half = machine.half
    assert machine.build(half, precision="bfloat16").manifest.precision == "bfloat16"
    assert machine.build(half).manifest.precision == "bfloat16"
    with pytest.raises(ExportError) as raised:
        machine.build(precision="float16")
    message = str(raised.value)
    assert [
        t for t in ("computes in float32", "float16 was asked for", "--precision float16") if t not in message
    ] == []
    with pytest.raises(ExportError, match="computes in bfloat16 and float32 was asked for"):
        machine.build(half, precision="float32")


def test_a_program_is_exported_in_the_precision(machine: Machine, program: Program) -> None:
    report = t3compile.build_engine(program, machine.engine, precision="bfloat16", attention="native")
    assert report.manifest.precision == "bfloat16"
    assert machine.written == ["model.engine", "model.engine.layers.json", "model.engine.manifest.json"]
    (function,) = machine.behaviour.networks[-1].functions
    assert any('"dtype": "bfloat16"' in entry.value for entry in function.metadata_props)
    # Inputs stay as traced.
    assert {spec.dtype for spec in report.manifest.inputs} == {"float32"}


def test_a_program_without_weights_in_its_engine_is_refused(machine: Machine, program: Program) -> None:
    with pytest.raises(ExportError, match="t3compile export"):
        t3compile.build_engine(program, machine.engine, settings=BuildSettings(strip_weights=True))
    assert machine.written == []


def test_bfloat16_is_of_products_alone_and_errs_as_torch_in_bfloat16(machine: Machine, program: Program) -> None:
    """onnxruntime's CPU has no bfloat16 kernels: onnx's own reference runs the file."""
    model = onnx.load(machine.half)
    types_ = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.value_info, *model.graph.input]}
    types_ |= {i.name: i.data_type for i in model.graph.initializer}
    float32, half = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
    read: dict[str, set[int]] = {}
    for node in model.graph.node:
        kinds = {types_[name] for name in node.input if name and types_[name] in (float32, half)}
        read.setdefault("t3" if node.domain == "t3" else node.op_type, set()).update(kinds)
    assert all(read[op_type] == {half} for op_type in ("MatMul", "Attention", "t3", "Conv"))
    assert all(read[op_type] == {float32} for op_type in ("LayerNormalization", "RMSNormalization", "Cos", "Sin"))
    inputs = named_inputs(program)
    feeds = {name: value.numpy() for name, value in inputs.items()}
    found = torch.from_numpy(ReferenceEvaluator(model).run(None, feeds)[0]).double()
    (exact,) = execute(program, inputs, float64=True)
    (plain,) = execute(MixPrecision("bfloat16")(program).program, inputs)
    torch_error = float((plain.double() - exact).abs().max())
    error = float((found - exact).abs().max())
    step = torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
    # Not by chance in float32, and no worse than torch in the same dtype.
    assert 1e-4 * float(exact.abs().max()) < error <= 2 * torch_error + step


# --- failures ------------------------------------------------------------------------------------


def test_every_parser_error_is_named_with_its_node(machine: Machine) -> None:
    machine.behaviour.parser_errors = (
        {"node": 3, "name": "node_conv", "operator": "Conv", "desc": "bad pads", "func": "importConv"},
        {
            "node": 9,
            "name": "node_view",
            "operator": "Reshape",
            "desc": "too many axes",
            "func": "importReshape",
            "stack": ["WindowAttention_0123456789"],
        },
    )
    with pytest.raises(EngineError) as raised:
        machine.build()
    message = str(raised.value)
    for text in (
        f"TensorRT {VERSION} cannot parse 'model.onnx'",
        "node 3 'node_conv' (Conv): bad pads [importConv]",
        "node 9 'node_view' (Reshape) in function WindowAttention_0123456789: too many axes [importReshape]",
    ):
        assert text in message
    assert machine.written == []


def test_a_failed_build_says_why_and_leaves_nothing(machine: Machine) -> None:
    machine.behaviour.build_error = "Could not find any implementation for node X"
    with pytest.raises(EngineError, match="cannot build the engine: Could not find any implementation for node X"):
        machine.build()
    assert machine.written == []


def test_an_older_engine_survives_a_failed_build(machine: Machine) -> None:
    machine.build()
    before = {path.name: path.read_bytes() for path in machine.engine.parent.iterdir()}
    machine.behaviour.build_error = "no"
    with pytest.raises(EngineError):
        machine.build()
    assert {path.name: path.read_bytes() for path in machine.engine.parent.iterdir()} == before


def test_ctrl_c_cancels_the_build_and_leaves_nothing(machine: Machine) -> None:
    threads: list[threading.Thread] = []

    def interrupt() -> None:
        threads.append(threading.current_thread())
        _thread.interrupt_main()
        # The build goes on until TensorRT asks the monitor.
        while not phases[0].cancelled:
            threading.Event().wait(0.01)

    from t3compile.export import build_network

    phases: list[Any] = []
    made = build_network.Phases

    def keep(*args: Any) -> Any:
        phases.append(made(*args))
        return phases[0]

    machine.monkeypatch.setattr(build_network, "Phases", keep)
    machine.behaviour.during_build = interrupt
    with pytest.raises(KeyboardInterrupt):
        machine.build(settings=BuildSettings(timing_cache=machine.folder / "out" / "cache"))
    assert machine.behaviour.cancelled
    assert threads[0] is not threading.main_thread()
    assert not threads[0].is_alive()
    assert machine.written == []


def test_open_lengths_are_refused(machine: Machine) -> None:
    model = onnx.load(machine.onnx, load_external_data=False)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, machine.folder / "open.onnx")
    with pytest.raises(EngineError, match=r"input 'x' of 'open.onnx' has open lengths, \[-1, 4, 2, 8, 8\]"):
        machine.build(machine.folder / "open.onnx")


def test_files_that_are_no_model_are_refused(machine: Machine) -> None:
    (machine.folder / "text.onnx").write_text("not a model")
    with pytest.raises(EngineError, match="is not an ONNX model"):
        machine.build(machine.folder / "text.onnx")
    with pytest.raises(OutputError, match="does not exist"):
        build_engine(machine.onnx, machine.folder / "nowhere" / "model.engine")


def test_a_full_disk_is_the_reason_given(machine: Machine) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

    machine.monkeypatch.setattr(Path, "open", _opening(Path.open, Full()))
    with pytest.raises(OutputError, match="No space left on device"):
        machine.build()
    machine.monkeypatch.undo()
    assert machine.written == []


def _opening(real: Callable[..., Any], full: Any) -> Callable[..., Any]:
    def open_(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return full if path.name == "native" and mode == "wb" else real(path, mode, *args, **kwargs)

    return open_


# --- operators that the parser does not know -----------------------------------------------------


def test_older_parsers_get_older_operators_with_the_same_result(machine: Machine) -> None:
    machine.behaviour.unknown_operators = frozenset({"Attention", "RMSNormalization"})
    report = machine.build()
    assert any("does not know Attention, RMSNormalization" in note for note in report.notes)
    spelled = machine.behaviour.networks[-1]
    onnx.checker.check_model(spelled, full_check=True)
    used = {node.op_type for node in (*spelled.graph.node, *(n for f in spelled.functions for n in f.node))}
    assert used.isdisjoint({"Attention", "RMSNormalization"})
    torch.manual_seed(1)
    inputs = {"x": torch.randn(1, 4, 2, 8, 8), "t": torch.tensor([300.0]), "text": torch.randn(1, 5, 16)}
    feeds = {name: value.numpy() for name, value in inputs.items()}
    sessions = (
        onnxruntime.InferenceSession(str(machine.onnx)),
        onnxruntime.InferenceSession(spelled.SerializeToString()),
    )
    wanted, found = (session.run(None, feeds)[0] for session in sessions)
    assert np.abs(wanted - found).max() < 1e-5
    # All attention is still recognised: by function inside, by the node's name outside.
    assert report.manifest.layer_check["attention_found"] == 4


def test_an_attention_that_is_the_models_output_keeps_its_name(machine: Machine) -> None:
    machine.behaviour.unknown_operators = frozenset({"Attention"})
    path = _attention_file(machine.folder / "full.onnx", "Attention", "")
    machine.build(path)
    spelled = machine.behaviour.networks[-1]
    onnx.checker.check_model(spelled, full_check=True)
    assert "Attention" not in {node.op_type for node in spelled.graph.node}
    torch.manual_seed(2)
    feeds = {name: torch.randn(1, 2, 8, 16).numpy() for name in "qkv"}
    wanted, found = (
        onnxruntime.InferenceSession(model).run(["y"], feeds)[0] for model in (str(path), spelled.SerializeToString())
    )
    assert np.abs(wanted - found).max() < 1e-5


def test_operators_that_nothing_spells_are_named(machine: Machine) -> None:
    machine.behaviour.unknown_operators = frozenset({"Gelu", "Cos"})
    with pytest.raises(ExportError) as raised:
        machine.build()
    message = str(raised.value)
    assert f"TensorRT {VERSION} does not know Cos (1, first '" in message
    assert "Gelu (2, first '" in message
    assert "parse_from_file" not in machine.behaviour.names()


def test_operators_of_onnxruntime_are_refused_by_name(machine: Machine) -> None:
    path = _attention_file(machine.folder / "ort.onnx", "MultiHeadAttention", "com.microsoft")
    with pytest.raises(ExportError, match=r"com\.microsoft::MultiHeadAttention.*--attention attention"):
        machine.build(path)


def _attention_file(path: Path, op_type: str, domain: str) -> Path:
    """One attention without windows, as a file of its own."""
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2, 8, 16]) for name in "qkvy"]
    node = onnx.helper.make_node(op_type, ["q", "k", "v"], ["y"], name="alone", domain=domain)
    graph = onnx.helper.make_graph([node], "attention", values[:3], values[3:])
    opsets = [onnx.helper.make_opsetid("", 23), *([onnx.helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


# --- the timing cache ----------------------------------------------------------------------------


def test_a_timing_cache_is_begun_read_and_written(machine: Machine) -> None:
    cache = machine.folder / "cache"
    machine.build(settings=BuildSettings(timing_cache=cache))
    assert cache.read_bytes() == b"+timed"
    machine.build(settings=BuildSettings(timing_cache=cache))
    # A mismatch is not ignored.
    assert machine.behaviour.last("set_timing_cache") == ("set_timing_cache", b"+timed", False)
    assert cache.read_bytes() == b"+timed+timed"


def test_a_timing_cache_of_another_device_is_begun_anew_and_said(machine: Machine) -> None:
    cache = machine.folder / "cache"
    cache.write_bytes(b"elsewhere")
    machine.behaviour.accepts_cache = False
    report = machine.build(settings=BuildSettings(timing_cache=cache))
    assert any("another device or TensorRT version" in note for note in report.notes)
    assert cache.read_bytes() == b"+timed"


def test_a_timing_cache_survives_a_failed_build(machine: Machine) -> None:
    cache = machine.folder / "cache"
    cache.write_bytes(b"good")
    machine.behaviour.build_error = "no"
    with pytest.raises(EngineError):
        machine.build(settings=BuildSettings(timing_cache=cache))
    assert cache.read_bytes() == b"good"


@pytest.mark.parametrize("attention", ["native", "auto"])
def test_a_timing_cache_that_cannot_be_written_any_more_costs_no_engine(machine: Machine, attention: str) -> None:
    Plugins(machine)
    folder = machine.folder / "caches"
    folder.mkdir()
    # Removed in the middle of the first build.
    machine.behaviour.during_build = lambda: shutil.rmtree(folder, ignore_errors=True)
    report = machine.build(machine.half, attention=attention, settings=BuildSettings(timing_cache=folder / "cache"))
    assert machine.written == ["model.engine", "model.engine.layers.json", "model.engine.manifest.json"]
    (note,) = report.notes
    assert f"the timing cache was not kept: cannot write '{folder / 'cache'}'" in note
    assert len(report.manifest.times_s) == (2 if attention == "auto" else 0)


def test_a_timing_cache_that_cannot_be_written_is_said_before_any_work(machine: Machine) -> None:
    with pytest.raises(OutputError):
        machine.build(settings=BuildSettings(timing_cache=machine.folder / "nowhere" / "cache"))
    assert machine.behaviour.calls == []


# --- layers --------------------------------------------------------------------------------------


def test_attention_that_was_not_fused_is_warned_of_by_site(machine: Machine) -> None:
    machine.behaviour.layers = lambda model: [x for x in fused_layers(model) if "Local Function" not in x["Metadata"]]
    report = machine.build()
    (warning,) = report.notes
    assert "'node__symbolic', 'node__symbolic_1'" in warning
    assert "0 fused attention layers in the engine, expected 2" in warning
    assert report.manifest.layer_check["warnings"] == [warning]
    assert report.manifest.layer_check["attention_found"] == 2


# --- plugin layers -------------------------------------------------------------------------------


class Plugins:
    """The real plugin layers and kernels; TensorRT's plugin module, which registers them, is replaced."""

    def __init__(self, machine: Machine, error: str = "") -> None:
        self.registered: list[str] = []
        self.machine, self.error = machine, error
        trtp = types.ModuleType("tensorrt.plugin")
        machine.monkeypatch.setitem(sys.modules, "tensorrt.plugin", trtp)
        machine.monkeypatch.setattr(prepare_plugins, "register_plugins", self.register)
        machine.monkeypatch.setattr(prepare_plugins, "compile_plugin_layers", self.compile)

    def compile(self, plugins: PluginLayers, **options: Any) -> tuple[PluginLayers, Any]:
        assert options["architectures"] == (90,)
        if self.error:
            raise KernelError(self.error)
        kernels = {(layer.name, 128032082): SimpleNamespace(sha256=f"sha of {layer.name}") for layer in plugins.layers}
        return plugins, SimpleNamespace(compiled=lambda: kernels)

    def register(self, layers: Any, kernels: Any, trtp: Any) -> None:
        assert trtp is sys.modules["tensorrt.plugin"]
        assert "parse_from_file" not in self.machine.behaviour.names()
        self.registered += [layer.name for layer in layers]


def test_plugin_nodes_replace_the_functions(machine: Machine) -> None:
    plugins = Plugins(machine)
    report = machine.build(machine.half, attention="plugin")
    manifest = report.manifest
    (name,) = {site.function for site in manifest.sites if site.function}
    assert plugins.registered == [f"{name}_local", f"{name}_mean"]
    assert [(kernel.name, kernel.tactic, kernel.ptx_sha256) for kernel in manifest.plugins] == [
        (f"{name}_local", 128032082, f"sha of {name}_local"),
        (f"{name}_mean", 128032082, f"sha of {name}_mean"),
    ]
    assert [site.lowering for site in manifest.sites] == ["plugin", "native", "plugin", "native"]
    parsed = machine.behaviour.networks[-1]
    assert not parsed.functions
    assert sum(node.domain == "t3" for node in parsed.graph.node) == 4
    assert manifest.layer_check["attention_found"] == 4
    assert report.notes == ()
    # The original file alone is the source, as its weights are.
    assert manifest.onnx.sha256 == hash_file(machine.half)


def test_a_plugin_layer_that_is_not_in_the_engine_is_warned_of(machine: Machine) -> None:
    Plugins(machine)
    machine.behaviour.layers = lambda model: [
        layer for layer in fused_layers(model) if layer["Name"] != "node__symbolic_1_local"
    ]
    report = machine.build(machine.half, attention="plugin")
    assert report.notes == ("site 'node__symbolic_1': no plugin layer 'node__symbolic_1_local' in the engine",)
    assert report.manifest.layer_check["attention_found"] == 3


def test_a_declined_function_stays_native_and_is_said(machine: Machine) -> None:
    Plugins(machine)
    report = machine.build(machine.onnx, attention="plugin")
    assert report.manifest.lowering == "native"
    assert "'node__symbolic', 'node__symbolic_1' stays native: its dtype is float32" in report.notes[0]
    assert "no window function can be a plugin layer" in report.notes[1]


@pytest.mark.parametrize(("slow", "kept"), [(True, "native"), (False, "plugin")])
def test_auto_keeps_the_faster_and_says_both_times(machine: Machine, slow: bool, kept: str) -> None:
    Plugins(machine)
    machine.behaviour.seconds = {slow: 0.02, not slow: 0.002}
    _count_time(machine.monkeypatch)
    manifest = machine.build(machine.half, attention="auto").manifest
    assert manifest.lowering == kept
    assert set(manifest.times_s) == {"plugin", "native"}
    assert manifest.times_s[kept] == pytest.approx(0.002)
    assert max(manifest.times_s.values()) == pytest.approx(0.02)
    assert json.loads(machine.engine.read_bytes()[len(MAGIC) :])["plugin"] is (kept == "plugin")
    assert bool(manifest.plugins) is (kept == "plugin")
    assert {site.lowering for site in manifest.sites if site.function} == {kept}
    assert machine.written == ["model.engine", "model.engine.layers.json", "model.engine.manifest.json"]


def _count_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the stand-in's calls advance: no other process changes who is faster."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(fake_tensorrt, "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(tensorrt_session, "time", SimpleNamespace(perf_counter=lambda: now[0]))


class Limited(FakeMemory):
    """Memory of a device that is full for a while; remembers which sessions' memory lives."""

    living: weakref.WeakSet[Limited]
    full_for: int
    error: Exception

    def __init__(self, index: int) -> None:
        super().__init__(index)
        # Two engines of that size do not fit.
        assert not list(self.living)
        self.living.add(self)

    def run(self, given: Any, launch: Callable[[], None], results: Any) -> list[torch.Tensor]:
        if type(self).full_for:
            type(self).full_for -= 1
            # A new one: an error keeps the frames that it went through, and they the memory.
            raise type(self.error)(*self.error.args)
        return super().run(given, launch, results)


def _limit(machine: Machine, full_for: int, error: Exception) -> None:
    Limited.living, Limited.full_for, Limited.error = weakref.WeakSet(), full_for, error
    machine.monkeypatch.setattr(tensorrt_session, "open_device_memory", Limited)


@pytest.mark.parametrize("error", [EngineError("no room to run"), torch.OutOfMemoryError("no room to run\nstack")])
def test_auto_gives_up_an_engine_that_does_not_run(machine: Machine, error: Exception) -> None:
    Plugins(machine)
    _limit(machine, 1, error)
    report = machine.build(machine.half, attention="auto")
    assert (report.manifest.lowering, set(report.manifest.times_s)) == ("native", {"native"})
    assert report.notes[0] == "plugin attention was given up: no room to run"
    assert machine.written == ["model.engine", "model.engine.layers.json", "model.engine.manifest.json"]


def test_auto_fails_where_no_engine_runs(machine: Machine) -> None:
    Plugins(machine)
    _limit(machine, 2, EngineError("no room to run"))
    with pytest.raises(EngineError) as raised:
        machine.build(machine.half, attention="auto")
    assert "plugin attention: no room to run; native attention: no room to run" in str(raised.value)
    assert machine.written == []


def test_auto_times_a_stripped_engine_with_its_weights(machine: Machine) -> None:
    Plugins(machine)
    machine.build(machine.half, attention="auto", settings=BuildSettings(strip_weights=True))
    assert machine.behaviour.names().count("refit_cuda_engine") == 2


def test_auto_goes_on_without_plugins_and_says_why(machine: Machine) -> None:
    Plugins(machine, error="no kernel for this pattern")
    report = machine.build(machine.half, attention="auto")
    assert (report.manifest.lowering, report.manifest.times_s) == ("native", {})
    assert report.notes == ("no plugin layers: no kernel for this pattern",)
    with pytest.raises(KernelError, match="no kernel for this pattern"):
        machine.build(machine.half, attention="plugin")


def test_auto_gives_up_a_lowering_that_does_not_build(machine: Machine) -> None:
    Plugins(machine)
    broken: list[bool] = []

    def during() -> None:
        # The plugin network is built first.
        machine.behaviour.build_error = "" if broken else "plugin failed"
        broken.append(True)

    machine.behaviour.during_build = during
    report = machine.build(machine.half, attention="auto")
    assert report.manifest.lowering == "native"
    assert "plugin attention was given up" in report.notes[0]
    assert "plugin failed" in report.notes[0]


def test_a_model_without_windows_is_all_native(machine: Machine) -> None:
    Plugins(machine)
    report = machine.build(_attention_file(machine.folder / "full.onnx", "Attention", ""), attention="auto")
    assert report.notes == ("the model has no window attention: all attention is TensorRT's own",)
    assert (report.manifest.plan, report.manifest.layer_check["attention_found"]) == (None, 1)
    assert [site.site for site in report.manifest.sites] == ["alone"]


# --- the command ---------------------------------------------------------------------------------


def _run(*args: str) -> Any:
    return CliRunner().invoke(main, ["build-engine", *args])


def test_the_command_builds_and_prints(machine: Machine) -> None:
    cache = str(machine.folder / "cache")
    options = ["--attention", "native", "--precision", "bf16", "--workspace", "2GiB", "--opt-level", "4"]
    result = _run(str(machine.folder / "half.onnx"), "-o", str(machine.engine), *options, "--timing-cache", cache)
    assert result.exit_code == 0, result.output
    assert "4 of 4 as expected" in result.stdout
    assert f"TensorRT {VERSION}, compute capability 9.0" in result.stdout
    assert "... Building Engine (0%)" in result.stderr
    assert machine.behaviour.last("set_memory_pool_limit")[2] == 2 << 30
    assert machine.behaviour.last("build")[2] == 4
    assert Path(cache).is_file()


def test_the_command_prints_json(machine: Machine) -> None:
    result = _run(str(machine.onnx), "-o", str(machine.engine), "--attention", "native", "--json")
    manifest = json.loads((machine.engine.parent / "model.engine.manifest.json").read_text())
    assert json.loads(result.stdout) == {"path": str(machine.engine), "notes": [], "manifest": manifest}


def test_the_command_takes_a_rewritten_program(machine: Machine, program: Program) -> None:
    program.save(machine.folder / "windows.pt2")
    result = _run(
        str(machine.folder / "windows.pt2"), "-o", str(machine.engine), "--precision", "fp16", "--attention", "native"
    )
    assert result.exit_code == 0, result.output
    assert read_manifest(machine.engine).precision == "float16"


@pytest.mark.parametrize("precision", ["fp16", "float16"])
def test_both_spellings_of_a_precision_are_taken(machine: Machine, precision: str) -> None:
    result = _run(str(machine.onnx), "-o", str(machine.engine), "--precision", precision)
    assert result.exit_code == 2
    assert "float16 was asked for" in result.stderr


def test_the_command_refuses_model_options_with_an_onnx_file(machine: Machine) -> None:
    options = ("--frames", "9", "--random-weights", "--seed", "0", "--dtype", "bf16", "--weights", "w.safetensors")
    result = _run(str(machine.onnx), "-o", str(machine.engine), *options)
    assert result.exit_code == 2
    expected = "is no model to load: leave out --weights, --random-weights, --seed, --dtype, --frames"
    assert expected in " ".join(result.stderr.split())
    assert machine.behaviour.calls == []
    assert machine.written == []


def test_the_command_refuses_an_engine_without_weights_before_loading(machine: Machine, program: Program) -> None:
    program.save(machine.folder / "windows.pt2")
    result = _run(str(machine.folder / "windows.pt2"), "-o", str(machine.engine), "--strip-weights")
    assert result.exit_code == 2
    assert "takes them from its ONNX file: export the model with 't3compile export'" in result.stderr
    assert "loading" not in result.stderr


@pytest.mark.parametrize("size", ["0", "much", "4TB", "-1GiB", "4 GiB B"])
def test_the_command_refuses_what_is_no_size(machine: Machine, size: str) -> None:
    result = _run(str(machine.onnx), "-o", str(machine.engine), "--workspace", size)
    assert result.exit_code == 2
    assert "is not a size" in result.stderr
    assert machine.behaviour.calls == []


def test_without_tensorrt_or_a_gpu_the_command_says_what_to_install(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(tensorrt_api, "find_cuda_device", lambda index=0: "no libcuda.so.1")
    result = _run(str(machine.onnx), "-o", str(machine.engine))
    assert result.exit_code == 2
    message = result.stderr.strip()
    assert message.splitlines() == [message]
    for text in (
        "building an engine needs the package 'tensorrt'",
        "pip install 't3compile[tensorrt]'",
        "an NVIDIA GPU with its driver",
        "no libcuda.so.1",
    ):
        assert text in message
    assert machine.written == []
    monkeypatch.setattr(tensorrt_api, "find_cuda_device", lambda index=0: DEVICE)
    message = _run(str(machine.onnx), "-o", str(machine.engine)).stderr
    assert "NVIDIA GPU" not in message
    machine.install(VERSION)
    monkeypatch.setattr(tensorrt_api, "find_cuda_device", lambda index=0: "the CUDA driver lists no device")
    message = _run(str(machine.onnx), "-o", str(machine.engine)).stderr
    assert "'tensorrt'" not in message
    assert "the CUDA driver lists no device" in message
