"""Tracing by a chain of strategies: which one wins, what it freezes, and that the model is left as it was."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _get_graph_module_cls

import t3compile
import t3compile.export.torch_onnx as torch_onnx_module
import t3compile.program as program_module
import t3compile.tracing.export_nonstrict as export_nonstrict_module
from t3compile.errors import InputsError, TraceError
from t3compile.execute import execute
from t3compile.inputs import call_inputs, named_inputs, read_inputs
from t3compile.program import Program, functionalized, graph_fingerprint, traced_lightly
from t3compile.tracing.carry_values import reads_values
from t3compile.tracing.export_with_values import export_with_values
from t3compile.tracing.traced_call import make_call

X = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])

LINEAR = torch.ops.aten.linear.default

NON_STRICT = "torch.export, non-strict"
WARMED = "torch.export, non-strict, after one eager call"
STRICT = "torch.export, strict"
VALUES = "torch.export, non-strict, with real values beside"
MAKE_FX = "make_fx on real values"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(4, 4)


class SlicesText(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        longest = int(mask.sum(dim=1).max().item())
        return self.linear(x[:, :longest])


class GathersText(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        places = torch.nonzero(mask.flatten(), as_tuple=False).flatten()
        return self.linear(x.flatten(0, 1).index_select(0, places))


class IndexesByMask(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x[mask.bool()])


class SelectsByMask(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x).masked_select(mask.bool().unsqueeze(-1))


class WritesByMask(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[mask.bool()] = self.linear(x[mask.bool()])
        return out


class RepeatsByTensor(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x).repeat_interleave(mask[0] + 1, dim=1)


class SlicesByTensor(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        longest = mask.sum(dim=1).max()
        return self.linear(x)[:, :longest] + torch.arange(longest).unsqueeze(-1)


class ReadsAll(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out = self.linear(x)
        return out if mask.all() else out * mask.unsqueeze(-1)


class NumpyTable(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(6))

    def forward(self, x: Tensor) -> Tensor:
        table = np.sin(self.positions.numpy()[:, None] / np.array([1.0, 10.0, 100.0, 1000.0]))
        return self.linear(x) + torch.from_numpy(table).float()


class FillsCache(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(24.0).view(6, 4).sin()
        return self.linear(x) + self.table


class FillsNumpyCache(FillsCache):
    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.from_numpy(np.sin(torch.arange(24.0).view(6, 4).numpy()))
        return self.linear(x) + self.table


class Lists(Net):
    def forward(self, parts: list[Tensor], scale: float = 1.0) -> list[Tensor]:
        return [self.linear(part) * scale for part in parts]


class Cache:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.bias = torch.ones(4)


class TakesCache(Net):
    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        assert cache is not None
        assert not cache.seen
        cache.seen.append(x)
        return self.linear(x) + cache.bias


@dataclasses.dataclass
class Output:
    sample: Tensor
    name: str = "sample"


@dataclasses.dataclass
class Condition:
    text: Tensor
    scale: float


class Dataclasses(Net):
    def forward(self, x: Tensor, condition: Condition) -> Output:
        return Output(self.linear(x) * condition.scale + condition.text)


class ReadsTimestep(Net):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        if timestep.item() > 500:
            return self.linear(x)
        return x


class WritesBuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return self.linear(x) + self.steps


class OtherInExport(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2 if torch.compiler.is_compiling() else 1)


class Random(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * random.random()


def run(program: Program) -> list[Tensor]:
    return execute(program, named_inputs(program))


def eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return module(*args, **kwargs)


def state(module: nn.Module) -> tuple[dict[str, Tensor], bool, set[str]]:
    return {name: x.clone() for name, x in module.state_dict().items()}, module.training, set(vars(module))


CASES = [
    (Lists(), ([X, X + 1], 2.0), NON_STRICT, ()),
    (SlicesText(), (X, MASK), VALUES, ("mask",)),
    (GathersText(), (X, MASK), VALUES, ("mask",)),
    (IndexesByMask(), (X, MASK), VALUES, ("mask",)),
    (SelectsByMask(), (X, MASK), VALUES, ("mask",)),
    (WritesByMask(), (X, MASK), VALUES, ("mask",)),
    (RepeatsByTensor(), (X, MASK), VALUES, ("mask",)),
    (SlicesByTensor(), (X, MASK), VALUES, ("mask",)),
    (ReadsAll(), (X, MASK), VALUES, ("mask",)),
    (ReadsTimestep(), (X, torch.tensor([700.0])), VALUES, ("timestep",)),
    (NumpyTable(), (X,), STRICT, ()),
    (FillsCache(), (X,), NON_STRICT, ()),
    (FillsNumpyCache(), (X,), WARMED, ()),
    (WritesBuffer(), (X,), NON_STRICT, ()),
    (OtherInExport(), (X,), MAKE_FX, ()),
]


@pytest.mark.parametrize(
    ("module", "args", "traced_by", "frozen"), CASES, ids=[type(case[0]).__name__ for case in CASES]
)
def test_strategies(module: nn.Module, args: tuple[Any, ...], traced_by: str, frozen: tuple[str, ...]) -> None:
    module.train()
    before = state(module)
    reference = eager(copy.deepcopy(module), *args)
    program = t3compile.trace(module, args)
    after = state(module)
    assert all(torch.equal(after[0][name], x) for name, x in before[0].items())
    assert after[1:] == before[1:]

    assert program.traced_by == traced_by
    said = [note for note in program.notes if "is frozen" in note]
    assert [note.split("'")[1] for note in said] == list(frozen)
    order = [NON_STRICT, WARMED, STRICT, VALUES, MAKE_FX]
    failed = [note.split(" was not used: ")[0] for note in program.notes if " was not used: " in note]
    assert failed == order[: order.index(traced_by)]

    # The graph stands alone: static, and the outputs (not what is written to buffers) are eager's.
    leaves = reference if isinstance(reference, list) else [reference]
    for got, expected in zip(run(program)[-len(leaves) :], leaves, strict=True):
        torch.testing.assert_close(got, expected)
    for node in program.graph.nodes:
        assert not (node.op == "call_function" and reads_values(node.target, node.args)), node
    assert set(program.exported.state_dict) == set(module.state_dict())
    linear = next(node for node in program.graph.nodes if node.target is LINEAR)
    assert [path for path, _ in linear.meta["nn_module_stack"].values()][-1] == "linear"
    names = list(inspect.signature(module.forward).parameters)[: len(args)]
    if not isinstance(args[0], list):
        assert list(named_inputs(program)) == names


def targets(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[fx.Graph]:
    """The graphs that Python code is made of."""
    graphs: list[fx.Graph] = []
    python_code = fx.Graph.python_code

    def counting(graph: fx.Graph, *args: Any, **kwargs: Any) -> Any:
        graphs.append(graph)
        return python_code(graph, *args, **kwargs)

    monkeypatch.setattr(fx.Graph, "python_code", counting)
    return graphs


def test_fewer_graphs_on_the_way_are_compiled(monkeypatch: pytest.MonkeyPatch, compiled: list[fx.Graph]) -> None:
    program = t3compile.trace(WritesBuffer(), (X,))
    lightly = len(compiled)

    compiled.clear()
    for module in (program_module, export_nonstrict_module):
        monkeypatch.setattr(module, "traced_lightly", contextlib.nullcontext)
    plain = t3compile.trace(WritesBuffer(), (X,))
    assert lightly < 0.7 * len(compiled)
    assert any("stack_trace" in node.meta for node in plain.graph.nodes)
    if hasattr(fx.config, "do_not_emit_stack_traces"):
        assert not any("stack_trace" in node.meta for node in program.graph.nodes)
    assert graph_fingerprint(plain.graph) == graph_fingerprint(program.graph)


def test_export_compiles_fewer_graphs_too(monkeypatch: pytest.MonkeyPatch, compiled: list[fx.Graph]) -> None:
    program = t3compile.trace(nn.Linear(4, 4), (X,))
    compiled.clear()
    model = torch_onnx_module.export_graph(program.with_weights())
    lightly = len(compiled)

    compiled.clear()
    monkeypatch.setattr(torch_onnx_module, "traced_lightly", contextlib.nullcontext)
    plain = torch_onnx_module.export_graph(program.with_weights())
    assert lightly < 0.7 * len(compiled)
    assert ir.to_proto(model).SerializeToString() == ir.to_proto(plain).SerializeToString()


def test_tracing_lightly_leaves_torch_as_it_was() -> None:
    def settings() -> tuple[object, bool]:
        return _get_graph_module_cls(), bool(getattr(fx.config, "do_not_emit_stack_traces", False))

    before = settings()
    with traced_lightly():
        assert settings() != before
        with pytest.raises(TraceError):
            program_module.trace(nn.Identity(), (X, X))
        assert settings() != before
    assert settings() == before


def test_gather_by_a_run_of_places_is_a_slice() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]])

    def made(module: nn.Module, mask: Tensor) -> list[str]:
        exported, frozen = export_with_values(make_call(module.eval(), (X[:1], mask), {}))
        assert set(frozen) == {"input 'mask'"}
        return [str(node.target) for node in functionalized(exported).graph.nodes if node.op == "call_function"]

    for module in (GathersText(), IndexesByMask()):
        sliced = made(module, mask)
        assert "aten.slice.Tensor" in sliced
        assert not any("index" in target or "nonzero" in target for target in sliced)
        whole = made(module, torch.ones_like(mask))
        assert not any("index" in target or "slice" in target for target in whole)
        assert "aten.index_select.default" in made(module, torch.tensor([[1, 0, 1, 0, 0, 0]]))


def test_a_frozen_input_keeps_its_value_and_others_do_not() -> None:
    program = t3compile.trace(SlicesText(), (X, MASK))
    (out,) = execute(program, {"x": X * 2, "mask": torch.ones_like(MASK)})
    torch.testing.assert_close(out, eager(SlicesText(), X * 2, MASK))


def test_retrace_starts_with_the_winner() -> None:
    program = t3compile.trace(SlicesText(), (X, MASK))
    assert program.retrace is not None
    longer = program.retrace((X, torch.ones_like(MASK)), {})
    assert run(longer)[0].shape == (2, 6, 4)
    assert longer.traced_by == VALUES
    assert [note for note in longer.notes if "was not used" in note] == []


def test_make_fx_keeps_names_and_buffers() -> None:
    class Both(OtherInExport):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.ones(4), persistent=False)
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: Tensor, *, parts: list[Tensor]) -> dict[str, Tensor]:
            x = super().forward(x) + self.shift
            for block in self.blocks:
                x = block(x)
            return {"sample": x + parts[0] * parts[1]}

    module = Both()
    program = t3compile.trace(module, (X,), {"parts": [X, X + 1]})
    assert program.traced_by == MAKE_FX
    assert set(program.exported.state_dict) == set(module.state_dict())
    assert list(named_inputs(program)) == ["x", "parts_0", "parts_1"]
    stacks = [list(n.meta["nn_module_stack"].values())[-1][0] for n in program.graph.nodes if n.target is LINEAR]
    assert stacks == ["linear", "blocks.0", "blocks.1"]
    with torch.no_grad():
        again = program.module()(X, parts=[X, X + 1])
        assert torch.equal(again["sample"], module(X, parts=[X, X + 1])["sample"])


def test_objects_are_closed_over() -> None:
    cache = Cache()
    module = TakesCache()
    program = t3compile.trace(module, (X,), {"cache": cache})
    assert cache.seen == []
    assert program.notes == (
        "argument 'cache' (Cache) is closed over: the graph holds its example value, and the program takes None in "
        "its place",
    )
    assert list(named_inputs(program)) == ["x"]
    assert torch.equal(run(program)[0], eager(module, X, Cache()))
    assert program.retrace is not None
    assert run(program.retrace((X[:, :3],), {"cache": None}))[0].shape == (2, 3, 4)


def test_dataclasses_are_taken_and_given_as_dicts() -> None:
    module = Dataclasses()
    program = t3compile.trace(module, (X, Condition(X + 1, 3.0)))
    assert program.notes == ("argument 'condition' (Condition) is taken as a dict",)
    assert list(named_inputs(program)) == ["x", "condition_text"]
    assert torch.equal(run(program)[0], eager(module, X, Condition(X + 1, 3.0)).sample)
    assert set(eager(program.module(), X, {"text": X + 1, "scale": 3.0})) == {"sample", "name"}


def test_a_graph_that_is_not_the_function_is_refused() -> None:
    with pytest.raises(
        TraceError, match=r"Random by any strategy \(torch.export, non-strict: its graph is not eager's"
    ):
        t3compile.trace(Random(), (X,))


def test_a_forward_that_fails_is_told_at_once() -> None:
    with pytest.raises(TraceError, match="whose forward fails on the example inputs: RuntimeError: mat1 and mat2"):
        t3compile.trace(SlicesText(), (X[..., :3], MASK))


def test_too_large_or_weightless_models_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t3compile.tracing.trace_module.COMPARED_MACS", 10)
    assert "too many to run here" in t3compile.trace(OtherInExport(), (X,)).traced_by
    with FakeTensorMode(allow_non_fake_inputs=True):
        weightless = SlicesText()
    program = t3compile.trace(weightless, (X, MASK))
    assert program.traced_by == f"{VALUES} (not compared with eager: the weights are not in memory)"
    assert any(note.startswith("input 'mask' is frozen") for note in program.notes)
    assert targets(program)[0] == "aten.slice.Tensor"


def test_containers_and_objects_of_the_module_come_back() -> None:
    class Tables:
        def __init__(self) -> None:
            self.table: Tensor | None = None

    class Stateful(Net):
        def __init__(self) -> None:
            super().__init__()
            self.tables, self.cache, self.seen = Tables(), {"a": [1]}, []

        def forward(self, x: Tensor) -> Tensor:
            self.tables.table = x * 2
            self.cache["a"].append(2)
            self.seen.append(x)
            self.later = x
            return self.linear(x)

    module = Stateful()
    cache = module.cache
    t3compile.trace(module, (X,))
    assert module.tables.table is None
    assert module.cache is cache
    assert cache == {"a": [1]}
    assert module.seen == []
    assert not hasattr(module, "later")


# --- capture ------------------------------------------------------------------------------------


class Pipeline:
    """Calls its transformer twice, as guidance does."""

    def __init__(self, **modules: nn.Module) -> None:
        vars(self).update(modules)

    def __call__(self) -> Tensor:
        first = self.transformer(X, mask=MASK)
        return first + self.transformer(X * 2, mask=MASK)


def test_capture_records_and_leaves_the_pipeline_alone(tmp_path: Path) -> None:
    pipeline = Pipeline(transformer=SlicesText(), vae=nn.Linear(1, 1))
    expected = eager(pipeline)
    with t3compile.capture(pipeline) as record:
        assert torch.equal(eager(pipeline), expected)
    assert pipeline.transformer._forward_pre_hooks == {}
    assert torch.equal(record.args[0], X)
    assert torch.equal(record.kwargs["mask"], MASK)
    torch.testing.assert_close(run(record.trace())[0], eager(pipeline.transformer, X, MASK))
    named = read_inputs(record.save(tmp_path / "inputs.safetensors"))
    assert set(named) == {"0", "mask"}
    args, kwargs = call_inputs(pipeline.transformer, named, "SlicesText")
    assert torch.equal(args[0], X)
    assert torch.equal(kwargs["mask"], MASK)
    with t3compile.capture(pipeline.transformer, call=1) as second:
        eager(pipeline)
    assert torch.equal(second.args[0], X * 2)


def test_capture_copies_what_the_model_overwrites() -> None:
    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.zero_()

    with t3compile.capture(module := Overwrites()) as record:
        module(X.clone())
    assert torch.equal(record.args[0], X)


def test_capture_refuses() -> None:
    net = SlicesText()
    two = Pipeline(transformer=net, transformer_2=SlicesText())
    with pytest.raises(InputsError, match=r"transformer \(SlicesText\), transformer_2 \(SlicesText\); give component"):
        t3compile.capture(two).__enter__()
    with pytest.raises(InputsError, match="no module 'dit'"):
        t3compile.capture(two, "dit").__enter__()
    with pytest.raises(InputsError, match="not told by its name: none"):
        t3compile.capture(Pipeline()).__enter__()
    with pytest.raises(InputsError, match="was called 0 times"), t3compile.capture(two, "transformer_2"):
        net(X, MASK)
    assert two.transformer_2._forward_pre_hooks == {}
    with pytest.raises(InputsError, match="called 2 times"), t3compile.capture(two, "transformer", call=2):
        eager(two)
    with t3compile.capture(lists := Lists()) as record:
        lists([X])
    with pytest.raises(InputsError, match="argument '0' of the recorded call is list"):
        record.save("never.safetensors")
    with t3compile.capture(Pipeline(model=net)) as record:
        net(X, MASK)
    assert record.module is net


class _Table:
    """A lazy table as plain objects keep it, callable like a module."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None

    def __call__(self, index: Tensor) -> Tensor:
        if self.rows is None:
            self.rows = torch.arange(8.0).sqrt()
        return self.rows[index]


def test_caches_in_callable_plain_objects_are_put_back() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = _Table()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.table(torch.arange(4))

    model = Model().eval()
    x = torch.randn(2, 4)
    program = t3compile.trace(model, (x,))
    assert model.table.rows is None
    assert torch.equal(program.module()(x), model(x))


class _Cached(nn.Module):
    @functools.lru_cache(maxsize=8)  # noqa: B019
    def rows(self, count: int) -> Tensor:
        return torch.arange(float(count)).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.rows(4)


def test_what_functools_cached_meanwhile_is_forgotten() -> None:
    model = _Cached().eval()
    x = torch.randn(2, 4)
    program = t3compile.trace(model, (x,))
    assert _Cached.rows.cache_info().currsize == 0
    assert torch.equal(model(x), x * torch.arange(4.0).sqrt())
    assert torch.equal(program.module()(x), model(x))
