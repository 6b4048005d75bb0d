"""Loading: every kind of MODEL gives the module's output; bad and malicious files are refused with
a remedy.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from t3compile.errors import InputsError, ModelFileError, T3CompileError, TraceError, WeightsError
from t3compile.inputs import VideoSize, named_inputs
from t3compile.loading import load_program
from t3compile.ops import WINDOW_ATTENTION
from t3compile.plan import Plan
from t3compile.program import Program, trace
from t3compile.weights import NoWeights, TensorWeights
from tests.tiny_models import WAN_VAE_CONFIG, HandWrittenDiT, tiny_wan

SIZE = VideoSize(9, 64, 64, text_tokens=7)
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def dit() -> HandWrittenDiT:
    torch.manual_seed(0)
    return HandWrittenDiT(layers=1).eval()


@pytest.fixture(scope="module")
def saved(dit: HandWrittenDiT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .pt2 written by Program.save."""
    path = tmp_path_factory.mktemp("saved") / "dit.pt2"
    return trace(dit, dit.example_inputs()).save(path)


@pytest.fixture(scope="module")
def wan() -> nn.Module:
    return tiny_wan()[0]


@pytest.fixture
def folder(wan: Any, tmp_path: Path) -> Path:
    """A diffusers pipeline's transformer folder, with the VAE's configuration beside it."""
    path = tmp_path / "pipeline" / "transformer"
    wan.save_pretrained(path)
    (path.parent / "model_index.json").write_text("{}")
    (path.parent / "vae").mkdir()
    (path.parent / "vae" / "config.json").write_text(json.dumps(WAN_VAE_CONFIG))
    return path


def _run(program: Program) -> Tensor:
    args, kwargs = program.example_inputs
    with torch.no_grad():
        out = program.module()(*args, **kwargs)
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first


def _refused(model: Path | str, *needed: str, error: type = ModelFileError, **options: Any) -> None:
    """Loading fails in one sentence that names the path and the remedy."""
    with pytest.raises(error) as raised:
        load_program(model, **options)
    message = str(raised.value)
    for text in (str(model), *needed):
        assert text in message
    assert "\n" not in message


# --- .pt2 ---------------------------------------------------------------------------------------


def test_saved_program_comes_back_bit_for_bit(dit: HandWrittenDiT, saved: Path) -> None:
    program, loaded = trace(dit, dit.example_inputs()), load_program(saved)
    assert loaded.fingerprint() == program.fingerprint()
    assert [node.name for node in loaded.graph.nodes] == [node.name for node in program.graph.nodes]
    assert torch.equal(_run(loaded), dit(*dit.example_inputs()))
    again = load_program(loaded.save(saved.with_name("again.pt2")))
    assert again.fingerprint() == program.fingerprint()
    assert loaded.plan is None


def test_a_program_of_inputs_with_unusual_strides_comes_back(tmp_path: Path) -> None:
    """torch keeps ranges of symbols for such inputs, though no length depends on them."""

    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv3d(2, 4, (1, 2, 2), stride=(1, 2, 2))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.embed(x).flatten(2)
            return out

    model, x = Embed(), torch.randn(1, 2, 2, 8, 8).transpose(3, 4)
    program = trace(model, (x,))
    loaded = load_program(program.save(tmp_path / "model.pt2"))
    assert loaded.fingerprint() == program.fingerprint()
    assert torch.equal(_run(loaded), model(x))


def test_kind_is_told_by_content_not_suffix(saved: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "model.onnx"
    renamed.write_bytes(saved.read_bytes())
    assert load_program(renamed).fingerprint() == load_program(saved).fingerprint()


def test_plain_torch_export_gets_the_form_of_trace(tmp_path: Path) -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out = torch.empty_like(x)
            out[..., 0] = x[..., 1]
            out[..., 1] = x.to(torch.float64).to(torch.float32)[..., 0]
            return out

    x = torch.randn(3, 2)
    exported = torch.export.export(InPlace(), (x,))
    torch.export.save(exported, tmp_path / "raw.pt2")
    loaded = load_program(tmp_path / "raw.pt2")
    assert loaded.fingerprint() == trace(InPlace(), (x,)).fingerprint()
    assert torch.equal(_run(loaded), x.flip(-1))
    targets = [node.target for node in loaded.graph.nodes if node.op == "call_function"]
    assert not any(target._schema.is_mutable for target in targets)


def test_harmless_peculiarities_of_plain_exports_load(tmp_path: Path) -> None:
    """Shared submodules, names with a dash, no_grad and autocast regions, nested outputs."""

    class Peculiar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"a-b": nn.Linear(2, 2)})

        def forward(self, x: Tensor, *, pair: list[Tensor]) -> dict[str, Any]:
            with torch.no_grad():
                y = self.parts["a-b"](self.parts["a-b"](x)) + pair[0]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = y @ pair[1]
            return {"y": y, "rest": [z, {"scale": 2.0}]}

    x, pair = torch.randn(2, 2), [torch.randn(2, 2), torch.randn(2, 2)]
    model = Peculiar()
    torch.export.save(torch.export.export(model, (x,), {"pair": pair}), tmp_path / "raw.pt2")
    loaded = load_program(tmp_path / "raw.pt2")
    out, expected = loaded.module()(x, pair=pair), model(x, pair=pair)
    assert torch.equal(out["y"], expected["y"])
    assert torch.equal(out["rest"][0], expected["rest"][0])
    assert load_program(loaded.save(tmp_path / "again.pt2")).fingerprint() == loaded.fingerprint()


def test_diffusers_output_classes_load_in_a_fresh_process(wan: nn.Module, tmp_path: Path) -> None:
    _, inputs = tiny_wan()
    torch.export.save(torch.export.export(wan, (), inputs), tmp_path / "wan.pt2")
    code = (
        "from t3compile.loading import load_program; p = load_program('wan.pt2'); "
        "print(p.module()(**p.example_inputs[1]).sample.shape)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "[1, 4, 3, 8, 8]" in done.stdout, done.stderr


def test_plan_and_window_op_are_kept(tmp_path: Path) -> None:
    class Windowed(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            out: Tensor = WINDOW_ATTENTION(q, q, q, [2, 2, 2], [2, 1, 1], "local+dilated")
            return out

    program = trace(Windowed(), (torch.randn(1, 1, 8, 4),))
    plan = Plan(program.fingerprint(), "custom", ())
    path = replace(program, plan=plan).save(tmp_path / "windowed.pt2")
    loaded = load_program(path)
    assert loaded.plan == plan
    assert torch.equal(_run(loaded), _run(program))


def test_inputs_replace_those_of_the_archive(dit: HandWrittenDiT, saved: Path) -> None:
    x, t, text = dit.example_inputs()
    loaded = load_program(saved, inputs={"x": x + 1, "t": t, "text": text})
    assert torch.equal(_run(loaded), dit(x + 1, t, text))
    with pytest.raises(InputsError, match=r"input 'x' has shape \[2, 4, 3, 8, 8\], expected \[1"):
        load_program(saved, inputs={"x": torch.cat([x, x]), "t": t, "text": text})


def test_dynamic_shapes_are_refused(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=2, max=8)
    exported = torch.export.export(nn.Linear(2, 2), (torch.ones(4, 2),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, tmp_path / "dynamic.pt2")
    _refused(tmp_path / "dynamic.pt2", "static shapes")
    _refused(tmp_path / "dynamic.pt2", "static shapes", trust_pickle=True)


# --- malicious .pt2 -----------------------------------------------------------------------------


class _Touch:
    """Unpickling this creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


Records = dict[str, bytes]


def _unpack(path: Path) -> Records:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def _pack(path: Path, records: Records, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(f"evil/{name}", content)
    return path


def _edit(records: Records, name: str, change: Callable[[Any], None]) -> None:
    content = json.loads(records[name])
    change(content)
    records[name] = json.dumps(content).encode()


def _graph(change: Callable[[Any], None]) -> Callable[[Records, Path], None]:
    return lambda records, _: _edit(records, "models/model.json", lambda program: change(program["graph_module"]))


def _pickled(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(_Touch(marker), buffer)
    return buffer.getvalue()


def _pickle_weight(records: Records, marker: Path) -> None:
    def change(config: Any) -> None:
        first = next(iter(config["config"].values()))
        first["use_pickle"] = True
        records[f"data/weights/{first['path_name']}"] = _pickled(marker)

    _edit(records, "data/weights/model_weights_config.json", change)


def _opaque_constant(records: Records, marker: Path) -> None:
    def change(config: Any) -> None:
        payload = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}
        config["config"]["evil"] = {**payload, "tensor_meta": None}

    records["data/constants/opaque_obj_0"] = pickle.dumps(_Touch(marker))
    _edit(records, "data/constants/model_constants_config.json", change)


def _lying_constant(records: Records, marker: Path) -> None:
    """A custom object that says it is no pickle."""
    _opaque_constant(records, marker)
    _edit(
        records,
        "data/constants/model_constants_config.json",
        lambda config: config["config"]["evil"].update(use_pickle=False),
    )


def _sample_inputs(records: Records, marker: Path) -> None:
    records["data/sample_inputs/model.pt"] = _pickled(marker)


def _legacy_weights(records: Records, marker: Path) -> None:
    records["data/weights/model.pt"] = _pickled(marker)


def _compiled_library(records: Records, marker: Path) -> None:
    records["data/aotinductor/model/evil.so"] = b"\x7fELF"


def _set_target(target: str) -> Callable[[Records, Path], None]:
    return _graph(lambda module: module["graph"]["nodes"][3].update(target=target))


def _set_spec(spec: str, kind: str, context: Any) -> Callable[[Records, Path], None]:
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    tree = {"type": kind, "context": json.dumps(context), "children_spec": [leaf]}
    return _graph(lambda module: module["module_call_graph"][0]["signature"].update({spec: json.dumps([1, tree])}))


def _expression(records: Records, marker: Path) -> None:
    text = f"__import__('pathlib').Path({str(marker)!r}).touch()"

    def change(module: Any) -> None:
        meta = next(iter(module["graph"]["tensor_values"].values()))
        meta["sizes"][0] = {"as_expr": {"expr_str": text, "hint": {"as_int": 1}}}

    _graph(change)(records, marker)


def _hidden_expression(records: Records, marker: Path) -> None:
    """The same under a tensor whose name looks like free text."""
    _expression(records, marker)

    def change(module: Any) -> None:
        values = module["graph"]["tensor_values"]
        values["metadata"] = values.pop(next(iter(values)))

    _graph(change)(records, marker)


def _as_operator(records: Records, marker: Path) -> None:
    arg = {"as_string_to_argument": {"metadata": {"as_operator": "torch.os.system"}}}
    _graph(lambda module: module["graph"]["nodes"][3]["inputs"].append({"name": "evil", "arg": arg, "kind": 2}))(
        records, marker
    )


def _second_model(records: Records, marker: Path) -> None:
    records["models/other.json"] = records["models/model.json"]


ATTACKS: dict[str, Callable[[Records, Path], None]] = {
    "pickled weight": _pickle_weight,
    "opaque constant": _opaque_constant,
    "lying constant": _lying_constant,
    "sample inputs": _sample_inputs,
    "legacy weights": _legacy_weights,
    "compiled library": _compiled_library,
    "expression": _expression,
    "hidden expression": _hidden_expression,
    "operator argument": _as_operator,
    "second model": _second_model,
    "call torch.os.system": _set_target("torch.os.system"),
    "call torch.load": _set_target("torch.load"),
    "call load_library": _set_target("torch.ops.load_library"),
    "call from_file": _set_target("torch.ops.aten.from_file.default"),
    "call dunder": _set_target("torch.ops.aten.__class__.mro"),
    "call operator.call": _set_target("_operator.call"),
    "call custom": _set_target("torch.ops.evil.op.default"),
    "node name": _graph(lambda m: m["graph"]["nodes"][3].update(name="x; import os")),
    "number as name": _graph(lambda m: m["graph"]["nodes"][3].update(name=[5])),
    "tensor name": _graph(lambda m: m["graph"]["tensor_values"].update({"a(b)": {}})),
    "parameter name": _graph(lambda m: m["signature"]["input_specs"][0]["parameter"].update(parameter_name="a=b\nc")),
    "forward name": _graph(
        lambda m: m["module_call_graph"][0]["signature"].update(forward_arg_names=["x=os.system(1)"])
    ),
    "keyword name": _set_spec("in_spec", "builtins.dict", ["x, y=__import__('os')"]),
    "factory of a dict": _set_spec(
        "out_spec",
        "collections.defaultdict",
        {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []},
    ),
    "enum in a tree": _set_spec("out_spec", "builtins.dict", [{"__enum__": True, "fqn": "antigravity:x", "name": "y"}]),
    "unknown container": _set_spec("out_spec", "collections.deque", None),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_malicious_archives_are_refused(saved: Path, tmp_path: Path, attack: str) -> None:
    marker, records = tmp_path / "ran", _unpack(saved)
    ATTACKS[attack](records, marker)
    reasons = {
        "expression": "static shapes",
        "hidden expression": "static shapes",
        "second model": "2 exported models",
    }
    _refused(_pack(tmp_path / "evil.pt2", records), reasons.get(attack, "add --trust-pickle"))
    assert not marker.exists()
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("attack", ["pickled weight", "sample inputs"])
def test_the_attacks_are_live_when_trusted(saved: Path, tmp_path: Path, attack: str) -> None:
    marker, records = tmp_path / "ran", _unpack(saved)
    ATTACKS[attack](records, marker)
    with pytest.raises(T3CompileError):
        load_program(_pack(tmp_path / "evil.pt2", records), trust_pickle=True)
    assert marker.exists()


def test_guard_text_of_the_file_never_runs(saved: Path, tmp_path: Path) -> None:
    marker, records = tmp_path / "ran", _unpack(saved)
    guard = f"__import__('pathlib').Path({str(marker)!r}).touch() is None"
    _edit(records, "models/model.json", lambda program: program.update(guards_code=[guard]))
    _run(load_program(_pack(tmp_path / "evil.pt2", records)))
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_two_readers_could_see_differently_are_refused(saved: Path, tmp_path: Path) -> None:
    records = _unpack(saved)
    _refused(_pack(tmp_path / "bomb.pt2", records, zipfile.ZIP_DEFLATED), "copy or save it again")
    records["MODELS/MODEL.JSON"] = records["models/model.json"]
    _refused(_pack(tmp_path / "twice.pt2", records), "copy or save it again")
    records = _unpack(saved)
    records["../outside"] = b""
    _refused(_pack(tmp_path / "outside.pt2", records), "copy or save it again")
    _pack(tmp_path / "appended.pt2", _unpack(saved))
    with zipfile.ZipFile(tmp_path / "appended.pt2", "a") as archive:
        archive.writestr("evil/models/model.json", b"{}")
    _refused(tmp_path / "appended.pt2", "copy or save it again")


def test_damaged_plan_and_json_are_refused(saved: Path, tmp_path: Path) -> None:
    records = _unpack(saved)
    _refused(
        _pack(tmp_path / "plan.pt2", {**records, "extra/t3compile_plan.json": b"{}"}),
        "rewrite the model again",
    )
    _refused(_pack(tmp_path / "json.pt2", {**records, "models/model.json": b"{"}), "copy it again")
    del records["data/weights/model_weights_config.json"]
    _refused(_pack(tmp_path / "no_weights.pt2", records), "save it again")


# --- .pt ----------------------------------------------------------------------------------------


def _linear_graph() -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("0", (x,)))
    return graph


def test_pickled_dict_with_inputs(dit: HandWrittenDiT, tmp_path: Path) -> None:
    path = tmp_path / "dit.pt"
    torch.save({"module": dit, "args": dit.example_inputs(), "kwargs": {}}, path)
    _refused(path, "--trust-pickle")
    program = load_program(path, trust_pickle=True)
    assert torch.equal(_run(program), dit(*dit.example_inputs()))


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_module_with_inputs_file(dit: HandWrittenDiT, tmp_path: Path, legacy: bool) -> None:
    path, inputs = tmp_path / "dit.pt", tmp_path / "inputs.npz"
    torch.save(dit, path, _use_new_zipfile_serialization=not legacy)
    x, t, text = dit.example_inputs()
    np.savez(inputs, x=x.numpy(), t=t.numpy(), text=text.numpy())
    program = load_program(path, trust_pickle=True, inputs=inputs)
    assert torch.equal(_run(program), dit(x, t, text))
    _refused(path, "missing x, t, text", "--inputs", error=InputsError, trust_pickle=True)


def test_pickled_graph_module(tmp_path: Path) -> None:
    module = fx.GraphModule(nn.Sequential(nn.Linear(2, 2)), _linear_graph())
    torch.save(module, tmp_path / "fx.pt")
    x = torch.randn(3, 2)
    program = load_program(tmp_path / "fx.pt", trust_pickle=True, inputs={"x": x})
    assert torch.equal(_run(program), module(x))


def test_untrusted_pickle_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"module": _Touch(marker)}, tmp_path / "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(_Touch(marker)))
    for name in ("evil.pt", "evil.pkl"):
        _refused(tmp_path / name)
    assert not marker.exists()


def test_missing_code_of_a_pickle(dit: HandWrittenDiT, tmp_path: Path) -> None:
    torch.save(dit, tmp_path / "dit.pt")
    records = _unpack(tmp_path / "dit.pt")
    records["data.pkl"] = records["data.pkl"].replace(b"tests.tiny_models", b"tests.gone_models")
    _refused(_pack(tmp_path / "gone.pt", records), "tests.gone_models", trust_pickle=True)


# --- factory ------------------------------------------------------------------------------------

FACTORIES = """
import torch
from torch import nn
x = torch.ones(1, 2)
def make():
    torch.manual_seed(0)
    return nn.Linear(2, 2)
def pair():
    return make(), (x,)
def triple():
    return make(), (), {"input": x}
def mapping():
    return {"module": make(), "args": [x]}
def training():
    return nn.Sequential(make(), nn.Dropout(0.5)).train(), (x,)
def fails():
    raise ValueError("no weights here")
def number():
    return 3
def untraceable():
    class Untraceable(nn.Module):
        def forward(self, x):
            return x * __import__("random").random()
    return Untraceable(), (x,)
value = 5
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "made_models.py").write_text(FACTORIES)
    (tmp_path / "broken_models.py").write_text("raise KeyError('gone')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "made_models", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["pair", "triple", "mapping", "training", "make"])
def test_factories(factories: Path, name: str) -> None:
    inputs = {"input": torch.ones(1, 2)} if name == "make" else None
    program = load_program(f"made_models:{name}", inputs=inputs)
    torch.manual_seed(0)
    assert torch.equal(_run(program), nn.Linear(2, 2)(torch.ones(1, 2)))
    assert str(factories) not in sys.path


@pytest.mark.parametrize(
    ("name", "message", "error"),
    [
        ("made_models:fails", "raised ValueError: no weights here", ModelFileError),
        ("made_models:absent", "has no attribute 'absent'", ModelFileError),
        ("made_models:value", "not callable", ModelFileError),
        ("made_models:number", "gives int; expected an nn.Module", ModelFileError),
        ("absent_models:make", "no module named 'absent_models'", ModelFileError),
        ("broken_models:make", "raised KeyError: 'gone'", ModelFileError),
        ("made_models:make", "missing input", InputsError),
        ("made_models:untraceable", "torch.export could not trace", TraceError),
    ],
)
def test_factory_failures(factories: Path, name: str, message: str, error: type) -> None:
    _refused(name, message, error=error)


# --- diffusers ----------------------------------------------------------------------------------


def _expected(wan: nn.Module, program: Program) -> Tensor:
    with torch.no_grad():
        out: Tensor = wan(**named_inputs(program), return_dict=False)[0]
    return out


def test_diffusers_folder(wan: nn.Module, folder: Path) -> None:
    program = load_program(folder, size=SIZE)
    torch.testing.assert_close(_run(program), _expected(wan, program))
    assert program.notes == ()
    assert isinstance(program.weights, TensorWeights)
    through_pipeline = load_program(folder.parent, size=SIZE)
    assert through_pipeline.fingerprint() == program.fingerprint()


def test_diffusers_program_saves_and_retraces(folder: Path, tmp_path: Path) -> None:
    program = load_program(folder, size=SIZE)
    loaded = load_program(program.save(tmp_path / "wan.pt2"))
    assert loaded.fingerprint() == program.fingerprint()
    for name, tensor in program.load_weights().items():
        assert torch.equal(loaded.weights.load(name), tensor)
    assert program.retrace is not None
    smaller = {**named_inputs(program), "hidden_states": torch.randn(1, 4, 2, 4, 4)}
    assert _run(program.retrace((), smaller)).shape == (1, 4, 2, 4, 4)


def test_diffusers_inputs_file(wan: nn.Module, folder: Path, tmp_path: Path) -> None:
    _, inputs = tiny_wan(grid=(2, 3, 5), batch=2)
    save_file(inputs, tmp_path / "inputs")
    program = load_program(folder, inputs=tmp_path / "inputs")
    torch.testing.assert_close(_run(program), _expected(wan, program))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_dtype_is_as_in_from_pretrained(folder: Path, name: str) -> None:
    dtype = getattr(torch, name)
    wan_class: Any = diffusers.WanTransformer3DModel
    reference = wan_class.from_pretrained(folder, torch_dtype=dtype).eval()
    program = load_program(folder, size=SIZE, dtype=name)
    assert torch.equal(_run(program), _expected(reference, program))
    for parameter, tensor in reference.named_parameters():
        assert program.exported.state_dict[parameter].dtype == tensor.dtype, parameter
        assert torch.equal(program.weights.load(parameter), tensor)


def test_dtype_follows_the_files(wan: Any, folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    program = load_program(folder, size=SIZE)
    assert program.exported.state_dict["proj_out.weight"].dtype == torch.bfloat16
    assert program.exported.state_dict["scale_shift_table"].dtype == torch.float32


def test_without_weights_everything_works_up_to_the_first_value(folder: Path) -> None:
    with_weights = load_program(folder, size=SIZE)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    program = load_program(folder, size=SIZE)
    assert isinstance(program.weights, NoWeights)
    assert program.fingerprint() == with_weights.fingerprint()
    with pytest.raises(WeightsError, match="--random-weights"):
        program.load_weights()


def test_random_weights_are_seeded(folder: Path) -> None:
    first, again, other = (_run(load_program(folder, size=SIZE, random_weights=True, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.isfinite(first).all()


def _shard(folder: Path) -> list[Path]:
    """Split the folder's single weights file in two, with an index."""
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = [f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: names[i % 2] for i, name in enumerate(tensors)}
    for shard in names:
        part = {name: tensors[name] for name, place in weight_map.items() if place == shard}
        save_file(part, folder / shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return [folder / name for name in names]


@pytest.mark.parametrize("indexed", [True, False])
def test_sharded_folder(wan: nn.Module, folder: Path, indexed: bool) -> None:
    shards = _shard(folder)
    if not indexed:
        (folder / INDEX).unlink()
    program = load_program(folder, size=SIZE)
    torch.testing.assert_close(_run(program), _expected(wan, program))
    shards[1].unlink()
    _refused(folder, shards[1].name, "download it again", error=WeightsError, size=SIZE)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", 3])
def test_shard_names_stay_in_the_folder(folder: Path, name: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    _refused(folder, "not a file of its own folder", error=WeightsError, size=SIZE)


def test_several_sets_of_weights_need_a_choice(wan: Any, folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    fp16 = folder / "diffusion_pytorch_model.fp16.safetensors"
    save_file(load_file(file), fp16)
    file.rename(folder / "diffusion_pytorch_model.bf16.safetensors")
    _refused(folder, "--weights", error=WeightsError, size=SIZE)
    assert load_program(folder, size=SIZE, weights=fp16).fingerprint()


# Wan's original names, longest first, for diffusers' names.
ORIGINAL_NAMES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    ".to_out.0.": ".o.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_out": "head.head",
    "norm2": "norm3",
}


def _original_naming(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        original = "head.modulation" if name == "scale_shift_table" else name
        for ours, theirs in ORIGINAL_NAMES.items():
            original = original.replace(ours, theirs)
        renamed[original.replace("scale_shift_table", "modulation")] = tensor
    return renamed


@pytest.fixture
def checkpoint(folder: Path, tmp_path: Path) -> dict[str, Tensor]:
    """The folder's weights in Wan's original naming; the folder then has none."""
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = _original_naming(load_file(file))
    file.unlink()
    return tensors


def test_weights_in_the_original_naming(
    wan: nn.Module, folder: Path, checkpoint: dict[str, Tensor], tmp_path: Path
) -> None:
    assert "blocks.0.self_attn.q.weight" in checkpoint
    assert "head.head.weight" in checkpoint
    save_file(checkpoint, tmp_path / "t3.safetensors")
    program = load_program(folder, size=SIZE, weights=tmp_path / "t3.safetensors")
    torch.testing.assert_close(_run(program), _expected(wan, program))
    # A bare state_dict, as the refusal of it as MODEL advises; and in several files.
    torch.save({"state_dict": checkpoint}, tmp_path / "t3.pt")
    again = load_program(folder, size=SIZE, weights=str(tmp_path / "t3.pt"))
    assert torch.equal(_run(again), _expected(wan, again))
    names = list(checkpoint)
    parts = [tmp_path / "a", tmp_path / "b"]
    for part, some in zip(parts, (names[::2], names[1::2]), strict=True):
        save_file({name: checkpoint[name] for name in some}, part)
    split = load_program(folder, size=SIZE, weights=parts)
    assert split.fingerprint() == program.fingerprint()


def test_weights_that_do_not_fit_are_listed(folder: Path, checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint["blocks.9.ffn.0.bias"] = checkpoint.pop("blocks.1.ffn.0.bias")
    checkpoint["head.head.bias"] = torch.zeros(3)
    file = tmp_path / "t3.safetensors"
    save_file(checkpoint, file)
    with pytest.raises(WeightsError) as raised:
        load_program(folder, size=SIZE, weights=file)
    message = str(raised.value)
    assert "1 missing: blocks.1.ffn.net.0.proj.bias" in message
    assert "1 unexpected: blocks.9.ffn.net.0.proj.bias" in message
    assert "proj_out.bias (3,) instead of (16,)" in message


def test_truncated_and_foreign_weights(folder: Path, checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "t3.safetensors"
    save_file(checkpoint, file)
    file.write_bytes(file.read_bytes()[:-10])
    for path in (file, tmp_path / "absent", tmp_path):
        with pytest.raises(WeightsError, match=str(path)):
            load_program(folder, size=SIZE, weights=path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="neither a safetensors file nor a state_dict"):
        load_program(folder, size=SIZE, weights=tmp_path / "list.pt")


def test_weights_larger_than_memory_are_not_read(tmp_path: Path) -> None:
    """A sparse file of a 14B width, in the original naming: bigger than this machine may have
    memory.
    """
    config = {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "ffn_dim": 13824,
        "num_layers": 1,
    }
    wan_class: Any = diffusers.WanTransformer3DModel
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        parameters = dict(wan_class.from_config(config).named_parameters())
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in _original_naming(parameters).items():
        begin, end = end, end + 4 * tensor.numel()
        entry = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[name] = entry
    # As many more bytes as are needed for 64 GB; an ignored tensor of Wan's image-to-video files.
    begin, end = end, 64_000_000_000
    header["norm_added_q"] = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (tmp_path / "t3.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    program = load_program(tmp_path, size=VideoSize(81, 2176, 3840), weights=tmp_path / "t3.safetensors")
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert sum(tensor.numel() for tensor in program.exported.state_dict.values()) > 400_000_000
    # The example inputs alone are 190 MB; the weights would be 2 GB.
    assert grown_kib < 900_000
    assert not program.weights.load("proj_out.bias").any()


def test_diffusers_folder_mistakes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    _refused(tmp_path / "plain", "no config.json")
    config = json.loads((folder / "config.json").read_text())
    for text, needed in (
        (json.dumps({**config, "_class_name": "WanModel"}), "'WanModel'"),
        (json.dumps({**config, "_class_name": "os"}), "no model of diffusers"),
        (json.dumps({**config, "patch_size": "x"}), "mend the configuration"),
        (json.dumps({"model_type": "t2v"}), "_class_name"),
        ("{", "copy it again"),
        ("[]", "copy it again"),
    ):
        (folder / "config.json").write_text(text)
        _refused(folder, needed, size=SIZE)
    (folder / "config.json").unlink()
    _refused(folder.parent, "transformer")


def test_options_exclude_each_other(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="exclude each other"):
        load_program(folder, weights=tmp_path / "x", random_weights=True)
    with pytest.raises(InputsError, match="exclude each other"):
        load_program(folder, size=SIZE, inputs={"x": torch.ones(1)})
    with pytest.raises(WeightsError, match="--seed 3 is for --random-weights"):
        load_program(folder, size=SIZE, seed=3)
    with pytest.raises(ModelFileError, match="'int8' is not one of"):
        load_program(folder, size=SIZE, dtype="int8")


# --- options and foreign files ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("weights", "x.safetensors"),
        ("random_weights", True),
        ("seed", 1),
        ("dtype", "float16"),
        ("size", SIZE),
    ],
)
def test_options_that_do_not_apply_are_an_error(saved: Path, option: str, value: Any) -> None:
    flag = "--frames" if option == "size" else f"--{option.replace('_', '-')}"
    _refused(saved, flag, "cannot be applied", **{option: value})
    _refused("made_models:make", flag, "cannot be applied", **{option: value})


class _Scripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def _write_foreign(folder: Path, dit: nn.Module, saved: Path) -> dict[str, tuple[Path, str]]:
    weights = dit.state_dict()
    torch.save(weights, folder / "weights.pt")
    torch.save({"state_dict": weights}, folder / "nested.pt")
    torch.save(weights, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"args": (torch.ones(1),)}, folder / "inputs.pt")
    save_file(weights, folder / "weights.safetensors")
    torch.jit.save(torch.jit.script(_Scripted()), folder / "script.pt")
    content = saved.read_bytes()
    (folder / "cut.pt2").write_bytes(content[: len(content) // 2])
    legacy = (folder / "legacy.pt").read_bytes()
    (folder / "cut.pt").write_bytes(legacy[: len(legacy) // 2])
    (folder / "empty.pt2").touch()
    (folder / "text.pt2").write_text("not a model")
    (folder / "pointer.pt2").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1")
    (folder / "model.onnx").write_bytes(b"\x08\x0b\x12\x07pytorch")
    np.savez(folder / "arrays.npz", x=np.ones(1))
    with zipfile.ZipFile(folder / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with zipfile.ZipFile(folder / "old.pt2", "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
    remedies = {
        "weights.pt": "--weights",
        "nested.pt": "--weights",
        "legacy.pt": "--weights",
        "weights.safetensors": "--weights",
        "inputs.pt": "--inputs",
        "arrays.npz": "--inputs",
        "script.pt": "export the original module",
        "cut.pt2": "copy it again",
        "cut.pt": "copy it again",
        "empty.pt2": "copy it again",
        "pointer.pt2": "git lfs pull",
        "text.pt2": "MODEL is",
        "other.zip": "MODEL is",
        "absent.pt2": "MODEL is",
        "model.onnx": "t3compile run",
        "old.pt2": "save it again",
    }
    return {name: (folder / name, remedy) for name, remedy in remedies.items()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_foreign_and_damaged_files(dit: HandWrittenDiT, saved: Path, tmp_path: Path) -> None:
    for path, remedy in _write_foreign(tmp_path, dit, saved).values():
        _refused(path, remedy)
        _refused(path, remedy, trust_pickle=True)
