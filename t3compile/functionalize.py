"""The functional form of a traced graph, found once for calls that are alike: a model's blocks repeat the same few.

torch's ``run_decompositions`` traces every call of a graph once more. Here it is given one call of each kind, and what
it makes of them is put in place of all.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, fx
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

# Static shapes and dtypes are in the graph's metadata; these run-time checks only hinder later passes.
METADATA_ASSERTION = torch.ops.aten._assert_tensor_metadata.default
# What later passes and torch.export.save read: of the call's place in the model, and of its functional form.
_OF_PLACE = ("nn_module_stack", "torch_fn", "stack_trace")
_OF_FORM = ("val", "tensor_meta")


class _NotByKindError(Exception):
    """The functional form of this graph cannot be put together from those of its calls."""


@dataclass(frozen=True)
class _Unit:
    """Calls that become functional together, in order. ``results`` are read by others; units of one ``kind`` have
    one functional form.
    """

    calls: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    kind: str


@dataclass(frozen=True)
class _Form:
    """A unit's functional calls in order, each with the number of the unit's call that it comes from."""

    inputs: tuple[fx.Node, ...]
    calls: tuple[tuple[fx.Node, int], ...]
    results: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Use:
    """In a kind: one of a unit's inputs, or of its calls, by number."""

    number: int
    is_input: bool


def functionalize_by_kind(exported: ExportedProgram) -> tuple[fx.GraphModule, list[Any]] | None:
    """The outputs of ``exported.run_decompositions({})`` by the same calls, and the verifiers of that program.

    Metadata assertions go, and views of a written tensor that torch takes again for every reader are taken once. None
    where it takes the whole graph, for instance because inputs, buffers or constants are written, a call holds a graph
    of its own or computes with numbers, a module's signature is kept, a shape is symbolic, or a tensor is not a plain
    strided one.
    """
    try:
        _require_one_signature(exported)
        units = _units(exported.graph)
        kinds = {unit.kind: unit for unit in units}
        program, origins = _side_by_side(list(kinds.values()), exported)
        functional = program.run_decompositions({})
        forms = dict(zip(kinds, _forms(functional, list(kinds.values()), origins), strict=True))
        for unit in units:
            _require_same_results(unit, forms[unit.kind])
    except _NotByKindError:
        return None
    return _with_forms(exported.graph_module, units, forms), list(functional.verifiers)


def _require_one_signature(exported: ExportedProgram) -> None:
    if any(entry.fqn and entry.signature is not None for entry in exported.module_call_graph):
        raise _NotByKindError("the signature of a module within names calls")


def _units(graph: fx.Graph) -> list[_Unit]:
    """All calls of the graph that anything reads, in an order in which the units can be made."""
    import networkx  # torch.export imports it too; what traces nothing starts an eighth of a second sooner

    for node in graph.nodes:
        _require_plain(node)
    calls = [node for node in graph.nodes if node.op == "call_function" and node.target is not METADATA_ASSERTION]
    place = {node: i for i, node in enumerate(graph.nodes)}
    needs = networkx.DiGraph()
    needs.add_nodes_from(calls)
    needs.add_edges_from((used, node) for node in calls for used in node.all_input_nodes if used in needs)
    for one, other in [*_taken_apart(calls), *_written_together(graph, place)]:
        needs.add_edges_from([(one, other), (other, one)])
    # Under a seed, the order of draws is part of the result.
    needs.add_edges_from(itertools.pairwise(node for node in calls if _is_random(node)))
    units = networkx.condensation(needs)
    members = {unit: sorted(units.nodes[unit]["members"], key=place.__getitem__) for unit in units}
    order = networkx.lexicographical_topological_sort(units, key=lambda unit: place[members[unit][0]])
    made = [_unit(members[unit]) for unit in order]
    return [unit for unit in made if unit is not None]


def _require_plain(node: fx.Node) -> None:
    if node.op not in ("placeholder", "call_function", "output"):
        raise _NotByKindError("a call holds a graph of its own")
    if node.op == "call_function" and node.target is not getitem and not isinstance(node.target, OpOverload):
        raise _NotByKindError("a call computes with numbers, or holds a graph of its own")
    if isinstance(node.target, OpOverload) and "as_strided" in node.target._schema.name:
        raise _NotByKindError("a call reads memory around its input")
    for value in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(value, Tensor) and value.layout != torch.strided:
            raise _NotByKindError("a tensor is not a plain strided one")
        lengths = (*value.shape, *value.stride()) if isinstance(value, Tensor) else (value,)
        if any(isinstance(length, SymInt | SymFloat | SymBool) for length in lengths):
            raise _NotByKindError("a shape is symbolic")


def _taken_apart(calls: Iterable[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """Calls of several results, each with those that take one."""
    return [(node.all_input_nodes[0], node) for node in calls if node.target is getitem]


def _written_together(graph: fx.Graph, place: Mapping[fx.Node, int]) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs of calls between which memory changes: all that make, view, write or read it up to the last write."""
    written = {node: _written_by(node) for node in graph.nodes if _is_write(node)}
    if not written:
        return []
    values = {node: node.meta.get("val") for node in graph.nodes}
    if not _share_memory_as_run(values, written):
        values = _run_with_memory(graph)
    memory = {node: _memory(value) for node, value in values.items()}
    last_write = {held: node for node, tensors in written.items() for x in tensors for held in memory[x]}
    pairs: list[tuple[fx.Node, fx.Node]] = []
    for node in graph.nodes:
        for held in memory[node] & last_write.keys():
            last = last_write[held]
            if node.op == "placeholder":
                raise _NotByKindError("an input, a buffer or a constant is written")
            if place[node] <= place[last]:
                early = [
                    user for user in node.users if place[user] <= place[last] and user.target is not METADATA_ASSERTION
                ]
                pairs += [(last, one) for one in (node, *early)]
    return pairs


def _written_by(node: fx.Node) -> list[fx.Node]:
    written: list[fx.Node] = []
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            written += [x for x in pytree.tree_leaves(given) if isinstance(x, fx.Node)]
    return written


def _is_write(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and bool(node.target._schema.is_mutable)


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _memory(value: object) -> set[int]:
    """The memory that tensors lie in."""
    return {x.untyped_storage()._cdata for x in pytree.tree_leaves(value) if isinstance(x, Tensor)}


def _share_memory_as_run(values: Mapping[fx.Node, object], written: Mapping[fx.Node, list[fx.Node]]) -> bool:
    """Whether every write gives back what it wrote: those of a graph that was read from a file give new tensors."""
    return all(
        tensors and _memory(values[node]) == set().union(*(_memory(values[x]) for x in tensors))
        for node, tensors in written.items()
    )


def _run_with_memory(graph: fx.Graph) -> dict[fx.Node, object]:
    """Every node's fake value, where those that the graph carries do not share memory as they should."""
    given = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
    mode = _mode_of(given)
    assert graph.owning_module is not None
    run = fx.Interpreter(graph.owning_module, garbage_collect_values=False)
    with mode:
        run.run(*(_like(x, mode) if isinstance(x, Tensor) else x for x in given), enable_io_processing=False)
    return dict(run.env)


def _unit(calls: Sequence[fx.Node]) -> _Unit | None:
    """None where nothing reads what the calls make."""
    uses = {node: _Use(i, is_input=False) for i, node in enumerate(calls)}
    results = tuple(
        node for node in calls if any(user not in uses and user.target is not METADATA_ASSERTION for user in node.users)
    )
    if not results:
        if any(node.is_impure() and not _is_write(node) for node in calls):
            raise _NotByKindError("a call that gives nothing has to stay")
        return None
    inputs: list[fx.Node] = []
    for node in calls:
        for used in node.all_input_nodes:
            if used not in uses:
                uses[used] = _Use(len(inputs), is_input=True)
                inputs.append(used)
    used_by = [fx.map_arg((node.args, node.kwargs), uses.__getitem__) for node in calls]  # type: ignore[arg-type]
    texts = [f"{node.target} {used}" for node, used in zip(calls, used_by, strict=True)]
    forms = [_form_of(node.meta.get("val")) for node in inputs]
    kind = f"{texts} {forms} {[uses[node].number for node in results]}"
    return _Unit(tuple(calls), tuple(inputs), results, kind)


def _form_of(value: object) -> tuple[object, ...]:
    """What tells a plain tensor from another in the graph that torch makes of a call."""
    if type(value) is not FakeTensor or value.layout != torch.strided or value.is_conj() or value.is_neg():
        raise _NotByKindError("what a call reads or gives is no plain tensor")
    return value.dtype, value.device, tuple(value.shape), value.stride()


def _side_by_side(units: Sequence[_Unit], exported: ExportedProgram) -> tuple[ExportedProgram, dict[str, int]]:
    """A program of the units, every one with inputs of its own, and by name the number of every call in its unit."""
    graph = fx.Graph()
    mode = _mode_of([node.meta["val"] for unit in units for node in unit.inputs])
    given = [graph.placeholder(f"given_{i}") for i in range(sum(len(unit.inputs) for unit in units))]
    unused = iter(given)
    results: list[fx.Node] = []
    origins: dict[str, int] = {}
    for unit in units:
        copies: dict[fx.Node, fx.Node] = {}
        for node in unit.inputs:
            copies[node] = next(unused)
            copies[node].meta["val"] = _like(node.meta["val"], mode)
        for i, node in enumerate(unit.calls):
            copies[node] = graph.node_copy(node, copies.__getitem__)
            origins[copies[node].name] = i
        results += [copies[node] for node in unit.results]
    graph.output(tuple(results))
    values = tuple(node.meta["val"] for node in given)
    in_spec, out_spec = pytree.tree_structure((values, {})), pytree.tree_structure(tuple(range(len(results))))
    program = ExportedProgram(
        root=fx.GraphModule(torch.nn.Module(), graph),
        graph=graph,
        graph_signature=ExportGraphSignature(
            [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in given],
            [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results],
        ),
        state_dict={},
        range_constraints={},
        module_call_graph=[ModuleCallEntry("", ModuleCallSignature([], [], in_spec, out_spec))],
        example_inputs=(values, {}),
        constants={},
        verifiers=exported.verifiers,
    )
    return program, origins


def _mode_of(inputs: Sequence[object]) -> FakeTensorMode:
    mode = detect_fake_mode(inputs)
    if mode is None:
        raise _NotByKindError("no input is a fake tensor")
    return mode


def _like(value: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor of the same form that shares no memory."""
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _forms(functional: ExportedProgram, units: Sequence[_Unit], origins: Mapping[str, int]) -> list[_Form]:
    """The functional form of every unit that ``_side_by_side`` was given."""
    graph = functional.graph
    if any(spec.kind != OutputKind.USER_OUTPUT for spec in functional.graph_signature.output_specs):
        raise _NotByKindError("a call writes what its schema does not say")
    place = {node: i for i, node in enumerate(graph.nodes)}
    given = iter([node for node in graph.nodes if node.op == "placeholder"])
    (returned,) = graph.output_node().args
    made = iter(returned)
    forms: list[_Form] = []
    for unit in units:
        inputs = tuple(next(given) for _ in unit.inputs)
        results = tuple(next(made) for _ in unit.results)
        calls = sorted(_needed(results, inputs), key=place.__getitem__)
        forms.append(_Form(inputs, tuple((call, _origin(call, unit, origins)) for call in calls), results))
    if next(given, None) is not None or next(made, None) is not None:
        raise _NotByKindError("the functional form has inputs or outputs of its own")
    return forms


def _require_same_results(unit: _Unit, form: _Form) -> None:
    for node, result in zip(unit.results, form.results, strict=True):
        if _form_of(node.meta["val"]) != _form_of(result.meta["val"]):
            raise _NotByKindError("a result has other strides once it is functional")


def _needed(results: Iterable[fx.Node], inputs: Iterable[fx.Node]) -> set[fx.Node]:
    """The calls that results are made of."""
    known = set(inputs)
    needed: set[fx.Node] = set()
    unseen = [node for node in results if node not in known]
    while unseen:
        node = unseen.pop()
        if node not in needed:
            needed.add(node)
            unseen += [used for used in node.all_input_nodes if used not in known]
    return needed


def _origin(call: fx.Node, unit: _Unit, origins: Mapping[str, int]) -> int:
    history = call.meta.get("from_node")
    last = len(unit.calls) - 1
    return origins.get(history[-1].name, last) if history else last


def _with_forms(root: fx.GraphModule, units: Sequence[_Unit], forms: Mapping[str, _Form]) -> fx.GraphModule:
    """The graph with a functional form in the place of every unit; inputs keep their names."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in root.graph.nodes:
        if node.op == "placeholder":
            made[node] = graph.node_copy(node)
            made[node].name = node.name
    for unit in units:
        form = forms[unit.kind]
        local = {given: made[node] for given, node in zip(form.inputs, unit.inputs, strict=True)}
        for call, number in form.calls:
            origin = unit.calls[number]
            args, kwargs = fx.map_arg((call.args, call.kwargs), local.__getitem__)
            name = origin.name if origin.target == call.target else _name(call)
            local[call] = graph.create_node("call_function", call.target, args, kwargs, name)
            local[call].meta = {key: origin.meta[key] for key in _OF_PLACE if key in origin.meta}
            local[call].meta |= {key: call.meta[key] for key in _OF_FORM if key in call.meta}
        made |= {node: local[result] for node, result in zip(unit.results, form.results, strict=True)}
    (returned,) = root.graph.output_node().args
    output = graph.output(fx.map_arg(returned, made.__getitem__))
    output.meta = dict(root.graph.output_node().meta)
    graph._codegen = copy.deepcopy(root.graph._codegen)
    graph.eliminate_dead_code()
    functional = fx.GraphModule(root, graph)
    functional.meta = dict(root.meta)
    return functional


def _name(call: fx.Node) -> str:
    """Without the overload's, as torch names traced calls."""
    return call.target._opname if isinstance(call.target, OpOverload) else call.name
