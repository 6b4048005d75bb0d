"""Functional form by kind: what run_decompositions gives, found once per kind of call, and whole where it must be."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from t3compile.functionalize import functionalize_by_kind
from t3compile.program import functionalized
from tests.tiny_models import HandWrittenDiT, tiny_wan

X = torch.linspace(-1, 1, 96).reshape(2, 6, 8)

Function = Callable[[Tensor, Callable[[Tensor], Tensor]], object]


class Wraps(nn.Module):
    """A function of its input and one linear layer."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.linear = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(8))

    def forward(self, x: Tensor) -> object:
        return self.function(x, self.linear)


def export(module: nn.Module, *args: Tensor, **kwargs: Tensor) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module.eval(), args, kwargs, strict=False)


def by_kind(exported: ExportedProgram) -> fx.GraphModule:
    with torch.no_grad():
        made = functionalize_by_kind(exported)
    assert made is not None
    made[0].graph.lint()
    return made[0]


class _Digest(str):
    """A value that an argument refers to."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{self}>"


def digests_of(graph: fx.Graph) -> dict[fx.Node, _Digest]:
    """Of every value, all calls that it is made by, with the forms between them."""
    made: dict[fx.Node, _Digest] = {}
    for node in graph.nodes:
        if node.op != "output":
            tensors = [x for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, Tensor)]
            forms = [(x.dtype, tuple(x.shape), x.stride()) for x in tensors]
            used = fx.map_arg((node.args, node.kwargs), made.__getitem__)
            text = f"{node.name if node.op == 'placeholder' else node.target} {used} {forms}"
            made[node] = _Digest(hashlib.sha256(text.encode()).hexdigest())
    return made


def assert_same(graph: fx.Graph, whole: fx.Graph) -> None:
    """The same outputs by the same calls, however often and in whatever order, in the same modules."""
    made, expected = digests_of(graph), digests_of(whole)
    (outputs,), (expected_outputs,) = graph.output_node().args, whole.output_node().args
    assert [made.get(x, x) for x in outputs] == [expected.get(x, x) for x in expected_outputs]
    paths: dict[_Digest, set[str]] = {}
    for node, digest in expected.items():
        # torch loses the module of some calls that it replaces.
        paths.setdefault(digest, set()).update(path for path, _ in list(stack_of(node).values())[-1:])
    for node, digest in made.items():
        (path,) = [path for path, _ in list(stack_of(node).values())[-1:]] or [None]
        assert not paths[digest] or path in paths[digest]


def stack_of(node: fx.Node) -> dict[str, tuple[str, str]]:
    return dict(node.meta.get("nn_module_stack") or {})


def rotated(x: Tensor) -> Tensor:
    """Every pair turned a quarter, as diffusers' Wan writes it."""
    out = torch.empty_like(x)
    out[..., 0::2] = -x[..., 1::2]
    out[..., 1::2] = x[..., 0::2]
    return out


def rotated_behind_text(x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
    """As CogVideoX: read and written in part."""
    q = linear(x)
    q[:, 2:] = rotated(q[:, 2:])
    return q + x


def writes_on_and_on(x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
    h = linear(x)
    for _ in range(3):
        h += linear(h.relu())
    return h


def two_written(x: Tensor, linear: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    a, b = linear(x), linear(-x)
    a[:, 0] = b[:, 1]
    b[:, 0] = a[:, 1] * 2
    a.mul_(b)
    return a, b.transpose(1, 2)


def written_parts(x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
    a, b, _ = linear(x).chunk(3, dim=1)
    a.add_(b)
    return torch.cat([b, a.contiguous()], dim=1)


def views_before_writes(x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
    h = linear(x)
    view = h.transpose(1, 2).unflatten(1, (2, 4))
    h.relu_()
    return view.reshape(2, -1) + h.flatten(1)


def plain(x: Tensor, linear: Callable[[Tensor], Tensor]) -> object:
    h = linear(x).to(torch.float64).unflatten(-1, (2, 4)).transpose(1, 2)
    a, b = h.contiguous().chunk(2, dim=-1)
    return {"sum": (a + b).reshape(2, -1), "same": x, "half": torch.dropout(x, 0.5, train=False).half()}


FUNCTIONS: tuple[Function, ...] = (
    plain,
    lambda x, linear: rotated(linear(x)),
    rotated_behind_text,
    writes_on_and_on,
    two_written,
    written_parts,
    views_before_writes,
)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_by_kind_is_what_torch_makes_of_the_whole(function: Function) -> None:
    exported = export(Wraps(function), X)
    assert_same(by_kind(exported).graph, exported.run_decompositions({}).graph)


@pytest.mark.parametrize("model", ["wan", "hand-written"])
def test_models_by_kind_are_what_torch_makes_of_them(model: str) -> None:
    exported = export_model(model, layers=2)
    assert_same(by_kind(exported).graph, exported.run_decompositions({}).graph)


@pytest.mark.parametrize("model", ["wan", "hand-written"])
def test_blocks_add_no_calls_to_trace(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decompose = ExportedProgram.run_decompositions
    traced: list[int] = []

    def counted(self: ExportedProgram, table: object) -> ExportedProgram:
        traced.append(len(self.graph.nodes))
        return decompose(self, table)  # type: ignore[arg-type]

    few, many = export_model(model, layers=2), export_model(model, layers=5)
    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    by_kind(few)
    by_kind(many)
    assert traced[0] == traced[1] < len(few.graph.nodes) < len(many.graph.nodes)


def export_model(model: str, layers: int) -> ExportedProgram:
    if model == "wan":
        module, inputs = tiny_wan(layers)
        return export(module, **inputs)
    written = HandWrittenDiT(layers)
    return export(written, *written.example_inputs())


_STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "later rows": lambda a, b: a[..., 1:, :] if a.shape[-2] > 1 else a,
    "every second": lambda a, b: a[..., ::2],
    "transpose": lambda a, b: a.transpose(-1, -2),
    "reshape": lambda a, b: a.reshape(2, -1, a.shape[-1]),
    "contiguous": lambda a, b: a.contiguous(),
    "same dtype": lambda a, b: a.to(torch.float32),
    "first half": lambda a, b: a.chunk(2, dim=-1)[0],
    "sum": lambda a, b: a + b.mean(),
    "relu": lambda a, b: a.relu(),
    "halve in place": lambda a, b: a.mul_(0.5),
    "add in place": lambda a, b: a.add_(b.amax()),
    "write all": lambda a, b: a.copy_(b.mean().expand_as(a)),
    "write a row": lambda a, b: a[..., :1, :].fill_(0.25),
}


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(_STEPS)), st.integers(0, 7), st.integers(0, 7)), min_size=3, max_size=9),
    st.booleans(),
)
def test_views_and_writes_in_any_order_compute_what_eager_does(
    steps: list[tuple[str, int, int]], from_file: bool
) -> None:
    def function(x: Tensor, linear: Callable[[Tensor], Tensor]) -> list[Tensor]:
        made = [linear(x), x * 2]
        for name, a, b in steps:
            made.append(_STEPS[name](made[a % len(made)], made[b % len(made)]))
        return made

    module = Wraps(function)
    exported = saved_and_loaded(export(module, X)) if from_file else export(module, X)
    by_kind(exported)
    with torch.no_grad():
        assert [x.tolist() for x in functionalized(exported).module()(X)] == [x.tolist() for x in module(X)]


def writes_input(x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
    x[:, 0].mul_(2)
    return linear(x.to(torch.float64).to(torch.float32))


def holds_a_graph(x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return linear(x.float())


class Counts(Wraps):
    """Writes a buffer."""

    def forward(self, x: Tensor) -> object:
        self.count.add_(1)
        return self.linear(x) + self.count


def reads_memory(x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
    return linear(x)[1:].as_strided((8,), (1,), 0)


@pytest.mark.parametrize(
    "make", [partial(Counts, plain), *(partial(Wraps, f) for f in (writes_input, holds_a_graph, reads_memory))]
)
def test_what_reaches_beyond_calls_is_left_to_torch(make: Callable[[], Wraps]) -> None:
    exported = export(make(), X)
    assert functionalize_by_kind(exported) is None
    whole = functionalized(exported)
    assert not any("_assert_tensor_metadata" in str(node.target) for node in whole.graph.nodes)
    with torch.no_grad():
        assert torch.equal(whole.module()(X.clone()), make()(X.clone()))


def test_symbolic_shapes_are_left_to_torch() -> None:
    batch = Dim("batch", min=2, max=8)
    exported = torch.export.export(nn.Linear(8, 8), (X,), dynamic_shapes={"input": {0: batch}}, strict=False)
    assert functionalize_by_kind(exported) is None


def saved_and_loaded(exported: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    return torch.export.load(file)


def assert_equal(made: object, expected: object) -> None:
    (one, form), (other, expected_form) = pytree.tree_flatten(made), pytree.tree_flatten(expected)
    assert form == expected_form
    assert all(map(torch.equal, one, other))


def halved_and_gated(x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
    h = linear(x)
    a, b = h.chunk(2, dim=-1)
    a.mul_(b.sigmoid())
    return h


def filled(x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
    z = x.new_zeros(2, 12, 8)
    z.narrow(1, 0, 6).copy_(linear(x))
    z.narrow(1, 6, 6).copy_(x)
    return z


def read_between(x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
    h = linear(x)
    view = h.flatten(1)
    h.mul_(2)
    between = h * 3
    view.add_(1)
    return between


def written_where_it_is(x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
    h = linear(x)
    h.to(torch.float32).mul_(2)
    return h


@pytest.mark.parametrize("function", [*FUNCTIONS, halved_and_gated, filled, read_between, written_where_it_is])
def test_files_give_the_graph_that_was_saved(function: Function) -> None:
    """Though tensors that are read from a file do not share memory as they did."""
    exported = export(Wraps(function), X)
    loaded = saved_and_loaded(exported)
    assert_same(by_kind(loaded).graph, by_kind(exported).graph)
    with torch.no_grad():
        assert_equal(functionalized(loaded).module()(X), Wraps(function)(X))


def writes_input_as_another(x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
    x.reshape(-1).mul_(2)
    return linear(x)


def test_files_that_write_an_input_are_left_to_torch() -> None:
    loaded = saved_and_loaded(export(Wraps(writes_input_as_another), X))
    assert functionalize_by_kind(loaded) is None
    with torch.no_grad():
        assert torch.equal(functionalized(loaded).module()(X.clone()), Wraps(writes_input_as_another)(X.clone()))


def drawn_late(x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
    a = linear(x)
    r = torch.rand_like(x)
    a.normal_()
    return a + r


def drawn_crosswise(x: Tensor, linear: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    a, b = torch.empty_like(x), torch.empty_like(x)
    b.normal_()
    a.uniform_()
    b.mul_(2)
    return linear(x) + a, x + b


@pytest.mark.parametrize("function", [drawn_late, drawn_crosswise])
def test_draws_keep_their_order(function: Function) -> None:
    exported = export(Wraps(function), X)
    by_kind(exported)
    with torch.no_grad():
        module = Wraps(function)
        torch.manual_seed(7)
        eager = module(X)
        torch.manual_seed(7)
        assert_equal(functionalized(exported).module()(X), eager)


def test_signatures_of_modules_within_are_kept() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            inner: Tensor = self.inner(x.reshape(2, 6, 8).contiguous())
            return inner * 2

    exported = torch.export.export(Outer(), (X,), strict=False, preserve_module_call_signature=("inner",))
    assert functionalize_by_kind(exported) is None
    with torch.no_grad():
        assert torch.equal(functionalized(exported).module()(X), exported.module()(X))
