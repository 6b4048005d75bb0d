"""Model repositories: config.pbtxt by the server's own schema, files linked or copied, whole or not at all.

No server ran here: the schema is the one its client ships, and onnxruntime runs the model as the configuration says.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import t3compile
from t3compile.cli import main
from t3compile.errors import EngineError, ExportError, OutputError, T3CompileError
from t3compile.export import triton_server
from t3compile.export.engine_inputs import EngineInput
from t3compile.export.engine_manifest import EngineManifest, SourceFiles
from t3compile.export.triton_config import ServedTensor, ServerConfig
from t3compile.export.triton_server import deploy_triton_server
from t3compile.pipeline import detect, export_onnx, rewrite
from t3compile.plan import make_plan
from t3compile.program import trace
from tests.tiny_models import HandWrittenDiT

NUMPY_TYPES = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64}


@pytest.fixture(scope="session")
def schema() -> Any:
    """model_config_pb2 of tritonclient, without its client, which needs grpc."""
    found = importlib.util.find_spec("tritonclient")
    if found is None or not found.submodule_search_locations:
        pytest.skip("tritonclient is not installed: it carries the schema of config.pbtxt")
    path = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _parsed(schema: Any, folder: Path) -> Any:
    """The configuration as the server parses it; unknown fields and values are errors."""
    return text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), schema.ModelConfig())


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rewritten model as ONNX, its weights in windows.onnx.data."""
    torch.manual_seed(0)
    model = HandWrittenDiT(layers=1, grid=(2, 4, 4)).eval()
    program = trace(model, model.example_inputs())
    path = tmp_path_factory.mktemp("onnx") / "windows.onnx"
    export_onnx(rewrite(program, make_plan(detect(program), [(1, 2, 2)])), path, check=False)
    assert path.with_name("windows.onnx.data").is_file()
    return path


def _session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _identity(path: Path, *tensors: tuple[str, int, Sequence[int | str | None] | None], outputs: bool = True) -> Path:
    """An ONNX file with an Identity for each (name, dtype, shape)."""
    inputs = [helper.make_tensor_value_info(name, dtype, shape) for name, dtype, shape in tensors]
    results = [helper.make_tensor_value_info(f"{name}_out", dtype, shape) for name, dtype, shape in tensors]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name, _, _ in tensors]
    graph = helper.make_graph(nodes, "identity", inputs, results)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


# --- the ONNX Runtime backend --------------------------------------------------------------------


def test_every_field_is_as_the_model_says(schema: Any, windows: Path, tmp_path: Path) -> None:
    done = deploy_triton_server(windows, tmp_path / "repo")
    message = schema.ModelConfig
    expected = message(
        name="windows",
        backend="onnxruntime",
        max_batch_size=0,
        default_model_filename="model.onnx",
        input=[
            schema.ModelInput(name="x", data_type=schema.TYPE_FP32, dims=[1, 4, 2, 8, 8]),
            schema.ModelInput(name="t", data_type=schema.TYPE_FP32, dims=[1]),
            schema.ModelInput(name="text", data_type=schema.TYPE_FP32, dims=[1, 5, 16]),
        ],
        output=[schema.ModelOutput(name="output", data_type=schema.TYPE_FP32, dims=[1, 4, 2, 8, 8])],
        instance_group=[schema.ModelInstanceGroup(kind=schema.ModelInstanceGroup.KIND_AUTO, count=1)],
        optimization=schema.ModelOptimizationPolicy(
            execution_accelerators=schema.ModelOptimizationPolicy.ExecutionAccelerators(
                gpu_execution_accelerator=[
                    schema.ModelOptimizationPolicy.ExecutionAccelerators.Accelerator(name="cuda")
                ]
            )
        ),
    )
    expected.parameters["enable_mem_pattern"].string_value = "0"
    assert _parsed(schema, tmp_path / "repo" / "windows") == expected
    assert _files(tmp_path / "repo") == [
        "windows/1/model.onnx",
        "windows/1/windows.onnx.data",
        "windows/config.pbtxt",
    ]
    assert done.path == tmp_path / "repo" / "windows"
    assert done.version == 1


def test_the_model_in_the_repository_runs_as_the_configuration_says(
    schema: Any, windows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the file's name, inputs, shapes and types of config.pbtxt alone, away from the original."""
    source = tmp_path / "source"
    shutil.copytree(windows.parent, source)
    deploy_triton_server(source / "windows.onnx", tmp_path / "repo", name="dit", version=3)
    shutil.rmtree(source)
    (tmp_path / "moved").mkdir()
    (tmp_path / "repo").rename(tmp_path / "moved" / "repo")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    folder = tmp_path / "moved" / "repo" / "dit"
    config = _parsed(schema, folder)
    (version,) = (entry for entry in folder.iterdir() if entry.is_dir())
    session = _session(version / config.default_model_filename)
    assert [(one.name, list(one.shape)) for one in session.get_inputs()] == [
        (one.name, list(one.dims)) for one in config.input
    ]
    generator = np.random.default_rng(0)
    inputs = {
        one.name: generator.standard_normal(tuple(one.dims)).astype(NUMPY_TYPES[schema.DataType.Name(one.data_type)])
        for one in config.input
    }
    outputs = session.run([one.name for one in config.output], inputs)
    assert [(list(array.shape), array.dtype) for array in outputs] == [
        (list(one.dims), NUMPY_TYPES[schema.DataType.Name(one.data_type)]) for one in config.output
    ]
    for got, expected in zip(outputs, _session(windows).run(None, inputs), strict=True):
        assert np.array_equal(got, expected)
        assert np.isfinite(got).all()


ONNX_TYPES = {
    TensorProto.BOOL: "TYPE_BOOL",
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.UINT16: "TYPE_UINT16",
    TensorProto.UINT32: "TYPE_UINT32",
    TensorProto.UINT64: "TYPE_UINT64",
    TensorProto.INT8: "TYPE_INT8",
    TensorProto.INT16: "TYPE_INT16",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.DOUBLE: "TYPE_FP64",
    TensorProto.BFLOAT16: "TYPE_BF16",
}


def test_every_data_type_has_its_name(schema: Any, tmp_path: Path) -> None:
    rows = [(f"i{dtype}", dtype, [2, 3]) for dtype in ONNX_TYPES]
    deploy_triton_server(_identity(tmp_path / "types.onnx", *rows), tmp_path / "repo")
    config = _parsed(schema, tmp_path / "repo" / "types")
    expected = {f"i{dtype}": name for dtype, name in ONNX_TYPES.items()}
    assert {one.name: schema.DataType.Name(one.data_type) for one in config.input} == expected
    given = {one.name.removesuffix("_out"): schema.DataType.Name(one.data_type) for one in config.output}
    assert given == expected


def test_open_dims_and_scalars(schema: Any, tmp_path: Path) -> None:
    rows: list[Any] = [("x", TensorProto.FLOAT, ["batch", None, 8]), ("t", TensorProto.FLOAT, [])]
    done = deploy_triton_server(_identity(tmp_path / "open.onnx", *rows), tmp_path / "repo")
    config = _parsed(schema, tmp_path / "repo" / "open")
    # The server has no scalars: its backend takes one element for them.
    assert [list(one.dims) for one in config.input] == [[-1, -1, 8], [1]]
    assert done.config.notes == ("'t' is a scalar: requests send it with shape [1]",)
    assert f"# {done.config.notes[0]}\n" in (done.path / "config.pbtxt").read_text()


def test_initializers_that_are_inputs_too_are_not_asked_for(schema: Any, tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "w", "y")]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "add", values[:2], values[2:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), tmp_path / "add.onnx")
    deploy_triton_server(tmp_path / "add.onnx", tmp_path / "repo")
    assert [one.name for one in _parsed(schema, tmp_path / "repo" / "add").input] == ["x"]


@pytest.mark.parametrize(
    ("tensor", "texts"),
    [
        (("x", TensorProto.COMPLEX64, [2]), ["input 'x' has dtype complex64", "as real numbers [..., 2]"]),
        (("x", TensorProto.FLOAT8E4M3FN, [2]), ["input 'x' has dtype float8_e4m3fn", "no data type"]),
        (("x", TensorProto.STRING, [2]), ["input 'x' has dtype string"]),
        (("x", TensorProto.FLOAT, [2, 0]), ["input 'x' has shape [2, 0]", "refuses empty tensors"]),
        (("x", TensorProto.FLOAT, None), ["input 'x' has no shape"]),
    ],
)
def test_what_the_server_cannot_serve_is_refused(tensor: Any, texts: list[str], tmp_path: Path) -> None:
    path = _identity(tmp_path / "odd.onnx", tensor)
    with pytest.raises(ExportError) as raised:
        deploy_triton_server(path, tmp_path / "repo")
    assert [text for text in texts if text not in str(raised.value)] == []
    assert _files(tmp_path) == ["odd.onnx"]


def test_a_sequence_is_refused(tmp_path: Path) -> None:
    sequence = helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [2])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    zero = helper.make_tensor("i", TensorProto.INT64, [], [0])
    graph = helper.make_graph([helper.make_node("SequenceAt", ["x", "i"], ["y"])], "at", [sequence], [result], [zero])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), tmp_path / "sequence.onnx")
    with pytest.raises(ExportError, match=r"input 'x' is .* serves tensors alone"):
        deploy_triton_server(tmp_path / "sequence.onnx", tmp_path / "repo")


@pytest.mark.parametrize(
    ("device", "accelerator", "kind", "asked"),
    [
        ("auto", None, "KIND_AUTO", "cuda"),
        ("cpu", None, "KIND_CPU", None),
        ("gpu", None, "KIND_GPU", "cuda"),
        ("gpu", "tensorrt", "KIND_GPU", "tensorrt"),
    ],
)
def test_device_and_accelerator(
    device: Any, accelerator: Any, kind: str, asked: str | None, schema: Any, windows: Path, tmp_path: Path
) -> None:
    deploy_triton_server(windows, tmp_path / "repo", device=device, accelerator=accelerator, instances=2)
    config = _parsed(schema, tmp_path / "repo" / "windows")
    (group,) = config.instance_group
    assert (schema.ModelInstanceGroup.Kind.Name(group.kind), group.count) == (kind, 2)
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert [one.name for one in accelerators] == ([] if asked is None else [asked])
    assert all(not one.parameters for one in accelerators)
    assert not config.optimization.execution_accelerators.cpu_execution_accelerator


@pytest.mark.parametrize(("dtype", "mode"), [(TensorProto.FLOAT16, "FP16"), (TensorProto.BFLOAT16, "BF16")])
def test_tensorrt_may_compute_in_the_weights_precision(dtype: int, mode: str, schema: Any, tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, dtype, [2]) for name in "xy")
    weight = helper.make_tensor("w", dtype, [2], [1.0, 2.0])
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "add", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), tmp_path / "half.onnx")
    deploy_triton_server(tmp_path / "half.onnx", tmp_path / "repo", device="gpu", accelerator="tensorrt")
    config = _parsed(schema, tmp_path / "repo" / "half")
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert dict(accelerator.parameters) == {"precision_mode": mode}


# --- the TensorRT backend ------------------------------------------------------------------------

ENGINE = b"ftrt" + bytes(range(64))
SPECS = (EngineInput("latents", (1, 16, 21, 272, 480), "bfloat16"), EngineInput("timestep", (1,), "int64"))
MANIFEST = EngineManifest(
    t3compile_version="0.1.0",
    tensorrt_version="10.13.3.9",
    compute_capability="9.0",
    gpu="",
    driver_cuda="",
    precision="bfloat16",
    lowering="native",
    inputs=SPECS,
    outputs=(EngineInput("output", (1, 16, 21, 272, 480), "float16"),),
    sites=(),
    plugins=(),
    onnx=SourceFiles("dit.onnx", "0" * 64, {}),
    engine_sha256=hashlib.sha256(ENGINE).hexdigest(),
    engine_bytes=len(ENGINE),
    stripped=False,
    weight_streaming=False,
    settings={},
    layer_check={},
    times_s={},
    metadata={},
    plan=None,
).to_json()


def _engine(folder: Path, **changes: Any) -> Path:
    path = folder / "model.engine"
    path.write_bytes(ENGINE)
    (folder / "model.engine.manifest.json").write_text(json.dumps({**MANIFEST, **changes}))
    return path


def test_an_engine_is_served_by_its_manifest(schema: Any, tmp_path: Path) -> None:
    done = deploy_triton_server(_engine(tmp_path), tmp_path / "repo", name="dit", version=2)
    expected = schema.ModelConfig(
        name="dit",
        backend="tensorrt",
        default_model_filename="model.plan",
        input=[
            schema.ModelInput(name="latents", data_type=schema.TYPE_BF16, dims=[1, 16, 21, 272, 480]),
            schema.ModelInput(name="timestep", data_type=schema.TYPE_INT64, dims=[1]),
        ],
        output=[schema.ModelOutput(name="output", data_type=schema.TYPE_FP16, dims=[1, 16, 21, 272, 480])],
        instance_group=[schema.ModelInstanceGroup(kind=schema.ModelInstanceGroup.KIND_GPU, count=1)],
    )
    assert _parsed(schema, tmp_path / "repo" / "dit") == expected
    assert (tmp_path / "repo" / "dit" / "2" / "model.plan").read_bytes() == ENGINE
    # The C++ program finds the engine there, too.
    manifest = tmp_path / "repo" / "dit" / "2" / "model.plan.manifest.json"
    assert json.loads(manifest.read_text()) == json.loads(json.dumps(MANIFEST))
    assert done.config.notes == ("built for TensorRT 10.13.3.9 and compute capability 9.0: the server needs the same",)


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"inputs": None}, EngineError, "is not an engine's manifest, or is damaged"),
        ({"outputs": [{"name": "y"}]}, EngineError, "is not an engine's manifest, or is damaged"),
        (
            {"inputs": [{"name": "t", "shape": [], "dtype": "float32"}]},
            ExportError,
            "input 't' is a scalar, which the server's tensorrt backend cannot serve",
        ),
        (
            {"inputs": [{"name": "t", "shape": [1], "dtype": "float64"}]},
            ExportError,
            "input 't' has dtype float64, which the server's tensorrt backend does not know",
        ),
        (
            {"outputs": [{"name": "y", "shape": [1], "dtype": "complex64"}]},
            ExportError,
            "output 'y' has dtype complex64, for which Triton Inference Server has no data type",
        ),
        ({"stripped": True}, ExportError, "has no weights"),
        ({"engine_bytes": 7}, EngineError, "has 68 bytes and its manifest describes an engine of 7"),
        ({"engine_sha256": "0" * 64}, EngineError, "expected 000000000000..."),
    ],
)
def test_an_engine_that_cannot_be_served_is_refused(
    changes: dict[str, Any], error: type[T3CompileError], reason: str, tmp_path: Path
) -> None:
    path = _engine(tmp_path, **changes)
    with pytest.raises(error) as raised:
        deploy_triton_server(path, tmp_path / "repo")
    assert reason in str(raised.value)
    assert not (tmp_path / "repo").exists()


def test_an_engine_without_a_readable_manifest_is_refused(tmp_path: Path) -> None:
    path = _engine(tmp_path)
    manifest = tmp_path / "model.engine.manifest.json"
    for text, reason in (("{", "is damaged"), ("[]", "is damaged")):
        manifest.write_text(text)
        with pytest.raises(EngineError, match=reason):
            deploy_triton_server(path, tmp_path / "repo")
    manifest.unlink()
    with pytest.raises(EngineError, match=r"no manifest 'model.engine.manifest.json' beside it"):
        deploy_triton_server(path, tmp_path / "repo")


def test_weight_streaming_is_told(tmp_path: Path) -> None:
    done = deploy_triton_server(_engine(tmp_path, weight_streaming=True), tmp_path / "repo")
    assert "weight streaming is off in the server" in done.config.notes[1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": "cpu"}, "a TensorRT engine runs on a GPU alone"),
        ({"accelerator": "cuda"}, "the accelerator 'cuda' is for .onnx files"),
    ],
)
def test_options_that_an_engine_does_not_have(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = _engine(tmp_path)
    with pytest.raises(ExportError, match=reason):
        deploy_triton_server(path, tmp_path / "repo", **options)


# --- names and options ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", ".hidden", "two words", "é", "a" * 201, "a\n"])
def test_names_that_are_no_plain_folders_are_refused(name: str, windows: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be a model's name"):
        deploy_triton_server(windows, tmp_path / "repo", name=name)
    assert _files(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"version": 0}, "version is 0, expected 1 or more"),
        ({"instances": 0}, "instances is 0, expected 1 or more"),
        ({"device": "tpu"}, "device 'tpu' is unknown; known: auto, cpu, gpu"),
        ({"device": "cpu", "accelerator": "cuda"}, "the accelerator 'cuda' needs a GPU"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], reason: str, windows: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=reason):
        deploy_triton_server(windows, tmp_path / "repo", **options)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_survives_the_text_format(schema: Any, text: str) -> None:
    tensor = ServedTensor(text, "TYPE_FP32", (1,))
    config = ServerConfig(
        "m", "onnxruntime", "f", (tensor,), (tensor,), "KIND_CPU", parameters=((text, text),), notes=(text,)
    )
    parsed = text_format.Parse(config.to_pbtxt(), schema.ModelConfig())
    assert [one.name for one in parsed.input] == [text]
    assert parsed.parameters[text].string_value == text
    assert len(parsed.parameters) == 1


# --- files ---------------------------------------------------------------------------------------


def test_files_are_links_and_copies_where_asked_or_needed(
    windows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inodes(model: Path) -> list[bool]:
        pairs = (("model.onnx", "windows.onnx"), ("windows.onnx.data", "windows.onnx.data"))
        return [(model / "1" / name).stat().st_ino == windows.with_name(old).stat().st_ino for name, old in pairs]

    linked = deploy_triton_server(windows, tmp_path / "repo", name="linked", link=True)
    assert linked.linked
    assert inodes(linked.path) == [True, True]
    copied = deploy_triton_server(windows, tmp_path / "repo", name="copied")
    assert not copied.linked
    assert inodes(copied.path) == [False, False]

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    fallen_back = deploy_triton_server(windows, tmp_path / "repo", name="other_disk", link=True)
    assert not fallen_back.linked
    assert inodes(fallen_back.path) == [False, False]
    for name in ("copied", "other_disk"):
        copy = tmp_path / "repo" / name / "1" / "windows.onnx.data"
        assert copy.read_bytes() == windows.with_name("windows.onnx.data").read_bytes()
    # A server under another user must be able to read what was made.
    mask = os.umask(0)
    os.umask(mask)
    for folder in (tmp_path / "repo", tmp_path / "repo" / "linked", tmp_path / "repo" / "linked" / "1"):
        assert folder.stat().st_mode & 0o777 == 0o777 & ~mask


def test_data_in_a_folder_below_keeps_its_place(tmp_path: Path) -> None:
    model = onnx.load(_weighted(tmp_path / "source", "weights/part 1.bin"), load_external_data=False)
    assert model.graph.initializer[0].external_data[0].value == "weights/part 1.bin"
    deploy_triton_server(tmp_path / "source" / "model.onnx", tmp_path / "repo")
    assert _files(tmp_path / "repo" / "model" / "1") == ["model.onnx", "weights/part 1.bin"]
    shutil.rmtree(tmp_path / "source")
    (output,) = _session(tmp_path / "repo" / "model" / "1" / "model.onnx").run(None, {"x": np.ones(2, np.float32)})
    assert output.tolist() == [2.0, 3.0]


def _weighted(folder: Path, location: str, *, at: Path | None = None) -> Path:
    """x + [1, 2], the weight in the file `location`, which is written `at` or where it says."""
    folder.mkdir()
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], np.array([1, 2], np.float32).tobytes(), raw=True)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "add", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    data = folder / location if at is None else at
    data.parent.mkdir(exist_ok=True)
    data.write_bytes(weight.raw_data)
    stored = model.graph.initializer[0]
    stored.ClearField("raw_data")
    stored.data_location = TensorProto.EXTERNAL
    stored.external_data.add(key="location", value=location)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("location", "error", "reason"),
    [
        ("../secret", EngineError, "external data outside its folder"),
        ("/etc/hostname", EngineError, "external data outside its folder"),
        ("../source/data", EngineError, "not by a plain path below it"),
        ("model.onnx", ExportError, "the model's own name in a repository"),
    ],
)
def test_external_data_stays_in_its_folder(
    location: str, error: type[T3CompileError], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    path = _weighted(tmp_path / "source", location, at=tmp_path / "source" / "data")
    # A name other than the one in a repository, so that only the data is in the way.
    path = path.rename(path.with_name("windows.onnx"))
    if location == "model.onnx":
        (path.parent / "data").rename(path.parent / "model.onnx")
    with pytest.raises(error, match=reason):
        deploy_triton_server(path, tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_a_link_in_a_model_cache_is_followed_to_its_file(tmp_path: Path) -> None:
    _weighted(tmp_path / "blobs", "data")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "dit.onnx").symlink_to(tmp_path / "blobs" / "model.onnx")
    deploy_triton_server(tmp_path / "snapshot" / "dit.onnx", tmp_path / "repo")
    placed = tmp_path / "repo" / "dit" / "1" / "model.onnx"
    assert not placed.is_symlink()
    (output,) = _session(placed).run(None, {"x": np.zeros(2, np.float32)})
    assert output.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_text("no model"), "is not an ONNX model"),
    ],
)
def test_other_files_are_refused(make: Callable[[Path], Any], reason: str, tmp_path: Path) -> None:
    make(tmp_path / "model.onnx")
    with pytest.raises(EngineError, match=reason):
        deploy_triton_server(tmp_path / "model.onnx", tmp_path / "repo")


# --- models that are there already ---------------------------------------------------------------


def test_a_model_is_replaced_only_by_force_and_lower_versions_stay(schema: Any, windows: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    deploy_triton_server(windows, repository, name="dit")
    before = _files(repository), (repository / "dit" / "config.pbtxt").read_text()
    with pytest.raises(OutputError, match="has a model 'dit' already, with version 1: give --force or another --name"):
        deploy_triton_server(windows, repository, name="dit", version=2)
    assert (_files(repository), (repository / "dit" / "config.pbtxt").read_text()) == before

    (repository / "dit" / "labels.txt").write_text("mine")
    kept = (repository / "dit" / "1" / "model.onnx").stat().st_ino
    deploy_triton_server(_engine(tmp_path), repository, name="dit", version=2, force=True)
    assert _files(repository / "dit") == [
        "1/model.onnx",
        "1/windows.onnx.data",
        "2/model.plan",
        "2/model.plan.manifest.json",
        "config.pbtxt",
        "labels.txt",
    ]
    assert (repository / "dit" / "1" / "model.onnx").stat().st_ino == kept
    assert _parsed(schema, repository / "dit").backend == "tensorrt"

    with pytest.raises(OutputError, match="has version 2 of 'dit', which the server takes before 1: give --version 3"):
        deploy_triton_server(windows, repository, name="dit", force=True)
    # The same version is replaced whole: nothing of the engine stays.
    deploy_triton_server(windows, repository, name="dit", version=2, force=True)
    assert _files(repository / "dit" / "2") == ["model.onnx", "windows.onnx.data"]
    assert _parsed(schema, repository / "dit").backend == "onnxruntime"
    assert sorted(entry.name for entry in repository.iterdir()) == ["dit"]


def test_a_model_can_be_deployed_over_itself(tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    deploy_triton_server(_weighted(tmp_path / "source", "data"), repository, name="dit")
    deploy_triton_server(repository / "dit" / "1" / "model.onnx", repository, name="dit", instances=3, force=True)
    assert _files(repository) == ["dit/1/data", "dit/1/model.onnx", "dit/config.pbtxt"]
    (output,) = _session(repository / "dit" / "1" / "model.onnx").run(None, {"x": np.zeros(2, np.float32)})
    assert output.tolist() == [1.0, 2.0]


def test_what_is_no_model_folder_is_not_replaced(windows: Path, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "file").write_text("mine")
    (tmp_path / "repo" / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(OutputError, match="is in the way"):
            deploy_triton_server(windows, tmp_path / "repo", name=name, force=True)
    assert (tmp_path / "repo" / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_deployment_leaves_what_was(
    error: BaseException, there: bool, windows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repo"
    if there:
        deploy_triton_server(windows, repository, name="dit")
    before = {name: (tmp_path / name).read_bytes() for name in _files(tmp_path)}
    place, calls = triton_server._place, []

    def interrupted(source: Path, target: Path, link: bool = True) -> bool:
        calls.append(target)
        if str(target).endswith("2/windows.onnx.data"):
            raise error
        return place(source, target, link)

    monkeypatch.setattr(triton_server, "_place", interrupted)
    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
        deploy_triton_server(windows, repository, name="dit", version=2, force=True)
    assert len(calls) > 1
    assert {name: (tmp_path / name).read_bytes() for name in _files(tmp_path)} == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == (["repo"] if there else [])


def test_a_failed_swap_brings_the_old_model_back(
    windows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repo"
    deploy_triton_server(windows, repository, name="dit")
    rename, moved = os.rename, []

    def second_fails(source: Any, target: Any) -> None:
        moved.append(target)
        if len(moved) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OutputError, match="Input/output error"):
        deploy_triton_server(windows, repository, name="dit", instances=5, force=True)
    assert len(moved) == 3
    assert "count: 1\n" in (repository / "dit" / "config.pbtxt").read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["repo"]


def test_a_polling_server_never_sees_an_unfinished_model(
    windows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repo"
    repository.mkdir()
    rename, seen = os.rename, []

    def watched(source: Any, target: Any) -> None:
        seen.append(sorted(entry.name for entry in repository.iterdir()))
        rename(source, target)

    monkeypatch.setattr(os, "rename", watched)
    deploy_triton_server(windows, repository, name="dit")
    assert seen == [[]]
    assert _files(repository / "dit") == ["1/model.onnx", "1/windows.onnx.data", "config.pbtxt"]


def test_a_repository_that_cannot_be_written_is_refused(windows: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        deploy_triton_server(windows, tmp_path / "no" / "where")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    for name in ("file", "gone"):
        with pytest.raises(OutputError) as raised:
            deploy_triton_server(windows, tmp_path / name)
        expected = f"cannot write '{tmp_path / name}': it is in the way; give a folder, or a name that is free"
        assert str(raised.value) == expected
    (tmp_path / "gone").unlink()
    assert _files(tmp_path) == ["file"]


def test_a_full_disk_is_told_before_copying(windows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OutputError, match="make room or write elsewhere"):
        deploy_triton_server(windows, tmp_path / "repo")
    assert not (tmp_path / "repo").exists()
    assert deploy_triton_server(windows, tmp_path / "repo", link=True).linked


# --- the command line ----------------------------------------------------------------------------


def test_the_command_says_what_it_wrote(windows: Path, tmp_path: Path) -> None:
    arguments = ["deploy", "triton-server", str(windows), "-o", str(tmp_path / "repo"), "--name", "dit"]
    done = CliRunner().invoke(main, [*arguments, "--device", "cpu", "--instances", "2", "--json"])
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["path"] == str(tmp_path / "repo" / "dit")
    assert (result["backend"], result["kind"], result["instances"]) == ("onnxruntime", "KIND_CPU", 2)
    assert result["inputs"][1] == {"name": "t", "data_type": "TYPE_FP32", "dims": [1]}
    assert (result["accelerator"], result["linked"]) == (None, False)
    assert "weights copied" in done.stderr
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 2
    assert again.stderr.startswith("error: the repository has a model 'dit' already")
    table = CliRunner().invoke(main, [*arguments, "--force", "--link"])
    assert table.exit_code == 0, table.stderr
    assert "[1, 4, 2, 8, 8]" in table.stdout
    assert "weights linked" in table.stderr


def test_it_is_public() -> None:
    assert t3compile.deploy_triton_server is deploy_triton_server
