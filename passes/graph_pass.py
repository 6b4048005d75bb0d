"""What every editing pass is: requires, apply on a copy, ensures; unmodified programs come back as they were."""

from __future__ import annotations

import copy
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.utils import _pytree as pytree

from t3compile.errors import RewriteError
from t3compile.program import Program, copy_exported, copy_graph_module

aten = torch.ops.aten

# Under this metadata key insert_constant leaves the tensor until the pass attaches it to the program.
_CONSTANT_VALUE = "constant_value"


@dataclass(frozen=True)
class PassResult:
    """The new program (the given one where nothing changed) and whether something did."""

    program: Program
    modified: bool


class GraphPass(ABC):
    """A pass is a frozen dataclass: its fields are its options."""

    def requires(self, program: Program) -> None:
        """Raise where the pass cannot run on this program."""

    @abstractmethod
    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        """Edit the copied graph; whether anything changed. If not, the graph is as it was."""

    def ensures(self, result: Program) -> None:
        """Raise where a changed program is not what the pass promises."""

    def attach(self, graph_module: fx.GraphModule, program: Program) -> Program:
        """The program around the edited graph."""
        exported = _with_constants(graph_module, program.exported)
        return program.with_graph(graph_module) if exported is None else replace(program, exported=exported)

    def __call__(self, program: Program) -> PassResult:
        result = apply_passes(program, [self])
        return PassResult(result, modified=result is not program)

    def finish(self, graph_module: fx.GraphModule, program: Program) -> Program:
        """The program of a graph that ``apply`` changed."""
        remove_unused(graph_module.graph)
        graph_module.graph.lint()
        graph_module.recompile()
        _check_interface(program.graph, graph_module.graph)
        result = self.attach(graph_module, program)
        self.ensures(result)
        return result


def apply_passes(program: Program, passes: Iterable[GraphPass]) -> Program:
    """One pass after the other; a copy of the graph that one left as it was serves the next."""
    copied: fx.GraphModule | None = None
    for graph_pass in passes:
        graph_pass.requires(program)
        if copied is None:
            copied = copy_graph_module(program.exported)
        if graph_pass.apply(copied, program):
            program, copied = graph_pass.finish(copied, program), None
    return program


def _check_interface(before: fx.Graph, after: fx.Graph) -> None:
    old = [node.name for node in before.nodes if node.op == "placeholder"]
    new = [node.name for node in after.nodes if node.op == "placeholder" and _CONSTANT_VALUE not in node.meta]
    if old != new:
        raise RewriteError("internal: a pass changed the inputs of the graph")


def insert_constant(node: fx.Node, value: Tensor) -> fx.Node:
    """Put a constant in the place of `node`: a copy of `value` with the node's strides, or dense ones near them."""
    graph = node.graph
    with graph.inserting_before(next(iter(graph.nodes))):
        placeholder = graph.placeholder(f"c_{node.name}")
    # Several elements of an expanded tensor are one place in memory, which a constant of its own cannot have.
    traced = torch.empty_like(node.meta["val"])
    own = torch.empty_strided(traced.shape, traced.stride(), dtype=traced.dtype).copy_(value)
    placeholder.meta = {"val": traced, _CONSTANT_VALUE: own}
    replace_node(node, placeholder)
    return placeholder


def _with_constants(graph_module: fx.GraphModule, exported: ExportedProgram) -> ExportedProgram | None:
    """The program with the constants that the pass inserted; None without any."""
    given = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    added = {node.name: node.meta.pop(_CONSTANT_VALUE) for node in placeholders if node.name not in given}
    if not added:
        return None
    signature = copy.deepcopy(exported.graph_signature)
    signature.input_specs = [
        given.get(node.name) or InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), node.name)
        for node in placeholders
    ]
    constants = {**exported.constants, **added}
    return copy_exported(exported, graph_module=graph_module, signature=signature, constants=constants)


def remove_unused(graph: fx.Graph) -> None:
    """Drop calls without users and side effects, last first."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not node.is_impure():
            graph.erase_node(node)


def is_call(node: object, *packets: Any) -> bool:
    """Whether a node calls one of these operator packets, any overload."""
    return isinstance(node, fx.Node) and getattr(node.target, "overloadpacket", None) in packets


class Cursor:
    """Builds nodes in front of an anchor, with metadata values computed on fake tensors."""

    def __init__(self, anchor: fx.Node) -> None:
        self._graph = anchor.graph
        self._anchor = anchor

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        with self._graph.inserting_before(self._anchor):
            node = self._graph.call_function(target, args, kwargs)
        node.meta = {
            key: self._anchor.meta[key]
            for key in ("nn_module_stack", "stack_trace", "source_fn_stack")
            if key in self._anchor.meta
        }
        node.meta["val"] = compute_value(node)
        return node


def compute_value(node: fx.Node) -> Any:
    """The fake value of a call on the fake values of its arguments."""
    values = fx.map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
    args, kwargs = values
    mode = detect_fake_mode(values)
    assert callable(node.target)
    if mode is None:
        return node.target(*args, **kwargs)
    with mode:
        return node.target(*args, **kwargs)


def replace_node(old: fx.Node, new: fx.Node) -> None:
    """Put `new` in the place of `old`; values downstream are recomputed as far as shapes, dtypes or strides changed."""
    before = old.meta["val"]
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
    if _same_form(before, new.meta["val"]):
        return
    pending = list(new.users)
    while pending:
        node = pending.pop(0)
        if node.op == "output":
            continue
        value = _recompute(node)
        if not _same_form(value, node.meta["val"]):
            pending.extend(user for user in node.users if user not in pending)
        node.meta["val"] = value


def _recompute(node: fx.Node) -> Any:
    if is_call(node, aten.view, aten._unsafe_view):
        # A view that other strides do not allow becomes a reshape.
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if not viewable(source.meta["val"], tuple(node.meta["val"].shape)):
            node.target = aten.reshape.default
    return compute_value(node)


def viewable(value: Tensor, shape: tuple[int, ...]) -> bool:
    try:
        torch.empty_strided(value.shape, value.stride(), device="meta").view(shape)
    except RuntimeError:
        return False
    return True


def inline_graph(call: fx.Node, inputs: Sequence[Any], body: fx.Graph) -> None:
    """Put the calls of `body`, a traced graph of one output, in the place of `call`."""
    values: dict[fx.Node, Any] = {}
    arguments = iter(inputs)
    cursor = Cursor(call)
    result: fx.Node | None = None
    for node in body.nodes:
        if node.op == "placeholder":
            values[node] = next(arguments)
        elif node.op == "output":
            (returned,) = pytree.tree_leaves(node.args)
            result = values[returned]
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: values[used])
            values[node] = cursor.call(node.target, *args, **kwargs)
    assert result is not None
    replace_node(call, result)


def _same_form(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same_form(x, y) for x, y in zip(a, b, strict=True))
    return bool(operator.eq(a, b))
