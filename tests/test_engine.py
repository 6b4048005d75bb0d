"""Engines are called like the model; wrong inputs and foreign, damaged or malicious files are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from t3compile.errors import EngineError, InputsError, T3CompileError
from t3compile.export.compare_onnx import compare_onnx
from t3compile.export.measure import run_timed
from t3compile.pipeline import detect, export_onnx, load_engine, rewrite
from t3compile.plan import make_plan
from t3compile.program import Program, trace
from tests.tiny_models import HandWrittenDiT

INPUTS = "x [1, 4, 2, 8, 8] float32, t [1] float32, text [1, 5, 16] float32"
KINDS = ["model.onnx", "windows.pt2", "portable.pt2"]


@pytest.fixture(scope="module")
def model() -> HandWrittenDiT:
    torch.manual_seed(0)
    return HandWrittenDiT(layers=1, grid=(2, 4, 4)).eval()


@pytest.fixture(scope="module")
def rewritten(model: HandWrittenDiT) -> Program:
    program = trace(model, model.example_inputs())
    return rewrite(program, make_plan(detect(program), [(1, 2, 2)]))


@pytest.fixture(scope="module")
def folder(model: HandWrittenDiT, rewritten: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rewritten model in every form that runs."""
    path = tmp_path_factory.mktemp("engines")
    export_onnx(rewritten, path / "model.onnx", check=False)
    rewritten.save(path / "windows.pt2")
    program = trace(model, model.example_inputs())
    rewrite(program, make_plan(detect(program), [(1, 2, 2)]), portable=True).save(path / "portable.pt2")
    return path


@pytest.fixture(scope="module")
def engines(folder: Path) -> dict[str, Callable[..., Any]]:
    return {name: load_engine(folder / name) for name in KINDS}


@pytest.fixture(scope="module")
def expected(model: HandWrittenDiT, rewritten: Program) -> Tensor:
    with torch.no_grad():
        out: Tensor = rewritten.module()(*model.example_inputs())
    return out


# --- calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_calls_by_position_and_by_name_with_tensors_and_arrays(
    name: str, engines: dict[str, Callable[..., Any]], model: HandWrittenDiT, expected: Tensor
) -> None:
    engine = engines[name]
    x, t, text = model.example_inputs()
    by_position = engine(x, t, text)
    assert isinstance(by_position, Tensor)
    # float32 in another order: some rounding steps of values of size one.
    assert torch.allclose(by_position, expected, rtol=0, atol=1e-4)
    if name == "windows.pt2":
        assert torch.equal(by_position, expected)
    for again in (engine(text=text, x=x, t=t), engine(x, text=text, t=t)):
        assert torch.equal(again, by_position)
    from_arrays = engine(x.numpy(), t.numpy(), text=text.numpy())
    assert np.array_equal(np.asarray(from_arrays), by_position.numpy())
    assert isinstance(from_arrays, np.ndarray if name.endswith(".onnx") else Tensor)


def test_the_rewritten_model_is_not_the_full_one(model: HandWrittenDiT, engines: dict[str, Callable[..., Any]]) -> None:
    inputs = model.example_inputs()
    with torch.no_grad():
        full = model(*inputs)
    for engine in engines.values():
        assert (engine(*inputs) - full).abs().max() > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_inputs_are_not_changed_and_views_are_accepted(
    name: str, engines: dict[str, Callable[..., Any]], model: HandWrittenDiT
) -> None:
    x, t, text = model.example_inputs()
    before = x.clone()
    plain = engines[name](x, t, text)
    strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not strided.is_contiguous()
    assert torch.allclose(engines[name](strided, t, text), plain, rtol=0, atol=1e-5)
    assert torch.equal(x, before)


Wrong = Callable[[Tensor, Tensor, Tensor], tuple[tuple[Any, ...], dict[str, Any]]]
WRONG: list[tuple[str, Wrong, list[str]]] = [
    ("missing", lambda x, t, text: ((x,), {"text": text}), ["input 't' is missing", INPUTS]),
    ("unknown", lambda x, t, text: ((x, t, text), {"mask": t}), ["unknown input 'mask'", INPUTS]),
    (
        "shape",
        lambda x, t, text: ((x[..., :6], t, text), {}),
        ["input 'x' has shape [1, 4, 2, 8, 6], expected [1, 4, 2, 8, 8]"],
    ),
    ("rank", lambda x, t, text: ((x, t[0], text), {}), ["input 't' has shape [], expected [1]"]),
    (
        "double",
        lambda x, t, text: ((x, t, text.numpy().astype(np.float64)), {}),
        ["input 'text' has dtype float64, expected float32"],
    ),
    (
        "integer",
        lambda x, t, text: ((x, t.long(), text), {}),
        ["input 't' has dtype int64, expected float32"],
    ),
    (
        "bfloat16",
        lambda x, t, text: ((), {"x": x.bfloat16(), "t": t, "text": text}),
        ["input 'x' has dtype bfloat16, expected float32"],
    ),
    ("too many", lambda x, t, text: ((x, t, text, t), {}), ["4 inputs were given", "has 3", INPUTS]),
    ("twice", lambda x, t, text: ((x, t, text), {"t": t}), ["input 't' is given twice"]),
    ("none", lambda x, t, text: ((), {}), ["input 'x' is missing", INPUTS]),
    ("text", lambda x, t, text: ((x, t, "a cat"), {}), ["input 'text'", "expected"]),
    ("nothing", lambda x, t, text: ((x, t, None), {}), ["input 'text'", "expected"]),
]


@pytest.mark.parametrize("name", ["model.onnx", "windows.pt2"])
@pytest.mark.parametrize(("wrong", "texts"), [pytest.param(*case[1:], id=case[0]) for case in WRONG])
def test_wrong_inputs_are_named(
    name: str, wrong: Wrong, texts: list[str], engines: dict[str, Callable[..., Any]], model: HandWrittenDiT
) -> None:
    args, kwargs = wrong(*model.example_inputs())
    with pytest.raises(InputsError) as raised:
        engines[name](*args, **kwargs)
    message = str(raised.value)
    assert [text for text in texts if text not in message] == []
    assert "\n" not in message


def test_several_outputs_come_in_order_under_their_names(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"plus": x + 1, "times": x * 2}

    program = trace(Two(), (torch.arange(3.0),))
    export_onnx(program, tmp_path / "two.onnx")
    program.save(tmp_path / "two.pt2")
    for name in ("two.onnx", "two.pt2"):
        engine = load_engine(tmp_path / name)
        plus, times = engine(torch.ones(3))
        assert torch.equal(plus, torch.full((3,), 2.0))
        assert torch.equal(times, torch.full((3,), 2.0))
        result = run_timed(engine, {"0" if name.endswith("pt2") else "x": torch.ones(3)}, repeat=3)
        assert result.names == ("output_0", "output_1")
        assert len(result.times_s) == 3
        assert result.peak_bytes > 2**20


def test_comparison_fails_on_nan_and_on_another_model(tmp_path: Path) -> None:
    class Shifted(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.tensor([shift]))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x + self.shift

    x = torch.tensor([0.5, 0.25])
    program = trace(Shifted(0.1), (x,))
    for shift, passes in ((0.1, True), (0.1001, False), (float("nan"), False), (float("inf"), False)):
        path = tmp_path / "shifted.onnx"
        export_onnx(trace(Shifted(shift), (x,)), path, check=False)
        untouched, shifted = compare_onnx(path, program, {"x": x})
        assert untouched.passed
        assert shifted.passed is passes, shift


def test_each_output_is_compared_by_itself(tmp_path: Path) -> None:
    """A small output must not hide behind the rounding of a large one."""

    class Scaled(nn.Module):
        def __init__(self, small: float) -> None:
            super().__init__()
            self.small = nn.Parameter(torch.tensor([small]))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.sin() * 1e6, x * self.small

    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "scaled.onnx"
    export_onnx(trace(Scaled(2e-6), (x,)), path, check=False)
    large, small = compare_onnx(path, trace(Scaled(1e-6), (x,)), {"x": x})
    assert large.passed
    assert not small.passed


def test_a_model_that_fails_at_run_time_is_one_sentence(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save_model

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "reshape",
        [value("x", TensorProto.FLOAT, [4]), value("shape", TensorProto.INT64, [1])],
        [value("y", TensorProto.FLOAT, ["n"])],
    )
    path = tmp_path / "reshape.onnx"
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    engine = load_engine(path)
    with pytest.raises(EngineError, match=r"onnxruntime cannot run '.*reshape\.onnx'"):
        engine(np.zeros(4, np.float32), np.array([3]))


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime must not see the file."""

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("onnxruntime was given the file")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)


def _refused(path: Path, *texts: str, error: type[T3CompileError] = EngineError, **options: Any) -> None:
    with pytest.raises(error) as raised:
        load_engine(path, **options)
    message = str(raised.value)
    assert [text for text in (path.name, *texts) if text not in message] == []
    assert "\n" not in message


def test_kind_is_told_by_content(folder: Path, tmp_path: Path, model: HandWrittenDiT) -> None:
    (tmp_path / "renamed.onnx").write_bytes((folder / "windows.pt2").read_bytes())
    engine = load_engine(tmp_path / "renamed.onnx")
    assert engine.runtime == "torch"  # type: ignore[attr-defined]
    assert load_engine(folder / "model.onnx").runtime == "onnxruntime-cpu"  # type: ignore[attr-defined]
    (tmp_path / "model.pt2").write_bytes((folder / "model.onnx").read_bytes())
    (tmp_path / "model.onnx.data").write_bytes((folder / "model.onnx.data").read_bytes())
    assert load_engine(tmp_path / "model.pt2").runtime == "onnxruntime-cpu"  # type: ignore[attr-defined]


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("content", [b"", b"hello, world", b"\x00" * 64, b"\x08\x0a", bytes(range(256)) * 8])
def test_foreign_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    path.write_bytes(content)
    _refused(path, "is not a file of a kind that can be run", "or is damaged")


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("content", [b"\x08\x0a\x12\x04", b"\x08\x0a\x12\x00", b"\x08\x0a\x42" + bytes(range(64))])
def test_what_only_begins_like_onnx_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    path.write_bytes(content)
    _refused(path, "is not an ONNX model")


@pytest.mark.usefixtures("no_session")
def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    _refused(tmp_path / "none.onnx", "does not exist")
    with pytest.raises(T3CompileError):
        load_engine(tmp_path)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(keep: float, folder: Path, tmp_path: Path) -> None:
    content = (folder / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(content[: int(len(content) * keep)])
    (tmp_path / "model.onnx.data").write_bytes((folder / "model.onnx.data").read_bytes())
    with pytest.raises(EngineError, match=r"model\.onnx"):
        load_engine(tmp_path / "model.onnx")


def test_truncated_external_data_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    data = (folder / "model.onnx.data").read_bytes()
    (tmp_path / "model.onnx.data").write_bytes(data[: len(data) // 2])
    with pytest.raises(EngineError, match=r"model\.onnx"):
        load_engine(tmp_path / "model.onnx")


@pytest.mark.usefixtures("no_session")
def test_missing_external_data_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    _refused(tmp_path / "model.onnx", "needs its external data 'model.onnx.data'", "copy both files")


def _point_outside(folder: Path, target: Path, location: str) -> None:
    """The exported model with its weights' file under another name."""
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    target.write_bytes(proto.SerializeToString())


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("location", ["../secret", "sub/../../secret", "{absolute}"])
def test_external_data_outside_the_folder_is_refused(location: str, folder: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    (inner / "sub").mkdir(parents=True)
    secret = tmp_path / "secret"
    secret.write_bytes((folder / "model.onnx.data").read_bytes())
    _point_outside(folder, inner / "model.onnx", location.format(absolute=secret))
    _refused(inner / "model.onnx", "external data outside its folder", "secret")


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("is_folder", [False, True])
def test_symlinks_out_of_the_folder_are_refused(is_folder: bool, folder: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "weights").write_bytes((folder / "model.onnx.data").read_bytes())
    if is_folder:
        (inner / "link").symlink_to(tmp_path / "outside", target_is_directory=True)
    else:
        (inner / "link").symlink_to(tmp_path / "outside" / "weights")
    _point_outside(folder, inner / "model.onnx", "link/weights" if is_folder else "link")
    _refused(inner / "model.onnx", "external data outside its folder")


@pytest.mark.usefixtures("no_session")
def test_external_data_outside_is_refused_inside_functions_and_constants(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(64))
    inner = tmp_path / "inner"
    inner.mkdir()
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [2], np.zeros(2, np.float32))
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "../secret"), ("offset", "0"), ("length", "8")):
        tensor.external_data.add(key=key, value=value)
    constant = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    add = onnx.helper.make_node("Add", ["x", "c"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in ("x", "y")]
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("t3", 1)]
    in_graph = onnx.helper.make_graph([constant, add], "g", values[:1], values[1:])
    function = onnx.helper.make_function("t3", "F", ["x"], ["y"], [constant, add], opsets[:1])
    call = onnx.helper.make_graph([onnx.helper.make_node("F", ["x"], ["y"], domain="t3")], "g", values[:1], values[1:])
    for name, graph, functions in (("graph.onnx", in_graph, []), ("function.onnx", call, [function])):
        proto = onnx.helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
        (inner / name).write_bytes(proto.SerializeToString())
        _refused(inner / name, "external data outside its folder")


def test_a_model_of_unknown_operators_is_one_sentence(tmp_path: Path) -> None:
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("NoSuch", ["x"], ["y"])], "g", values[:1], values[1:])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    (tmp_path / "odd.onnx").write_bytes(proto.SerializeToString())
    _refused(tmp_path / "odd.onnx", "onnxruntime cannot load", "NoSuch")
