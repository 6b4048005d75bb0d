"""Values of a graph's tables: what constants, buffers and example inputs make, without any weight. Edits nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec

from t3compile.errors import InputsError, WeightsError
from t3compile.inputs import named_inputs
from t3compile.program import Program

aten = torch.ops.aten

_SHAPE_ONLY = (
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
)
# A table of positions has a few hundred columns at most; what is larger is no table.
_MOST_ELEMENTS = 2**28


@dataclass(frozen=True)
class Table:
    """A tensor's value and the names of the inputs that it was computed from at their example values."""

    value: Tensor
    inputs: frozenset[str]


class ValueReader:
    """Computes nodes on demand and keeps what it computed."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._specs = {spec.arg.name: spec for spec in program.exported.graph_signature.input_specs}
        self._known: dict[fx.Node, Table | None] = {}
        try:
            self._inputs = named_inputs(program)
        except InputsError:
            self._inputs = {}

    def read(self, node: fx.Node) -> Table | None:
        """The node's value, or None where weights, random numbers, missing inputs or sheer size stand in the way."""
        pending = [node]
        while pending:
            current = pending[-1]
            if current in self._known:
                pending.pop()
                continue
            sources = _sources(current)
            missing = [used for used in sources if used not in self._known]
            # One source that cannot be read settles it.
            if any(self._known.get(used, current) is None for used in sources) or _is_too_large(current):
                self._known[current] = None
            elif missing:
                pending.append(missing[0])
            else:
                self._known[current] = self._compute(current)
        return self._known[node]

    def _compute(self, node: fx.Node) -> Table | None:
        if node.op == "placeholder":
            return self._placeholder(self._specs[node.name])
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return None
        tables = [self._known[used] for used in _sources(node)]
        names = frozenset().union(*(table.inputs for table in tables if table is not None))
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
        assert callable(node.target)
        with torch.no_grad():
            return Table(node.target(*args, **kwargs), names)

    def _value(self, used: fx.Node) -> Any:
        table = self._known.get(used)
        # Only its shape and dtype are looked at, see _sources.
        return _form(used.meta["val"]) if table is None else table.value

    def _placeholder(self, spec: InputSpec) -> Table | None:
        name = str(spec.target)
        if spec.kind == InputKind.USER_INPUT:
            if isinstance(spec.arg, ConstantArgument):
                return None
            value = self._inputs.get(spec.arg.name)
            return None if value is None else Table(value, frozenset({spec.arg.name}))
        constant = self._program.exported.constants.get(name)
        if isinstance(constant, Tensor):
            return Table(constant, frozenset())
        if spec.kind == InputKind.BUFFER and name in self._program.weights.names():
            try:
                return Table(self._program.weights.load(name).detach(), frozenset())
            except WeightsError:
                return None
        return None


def _sources(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a node is made of; of some arguments only shape or dtype are looked at."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is aten.type_as:
        return [x for x in node.args[:1] if isinstance(x, fx.Node)]
    if packet in _SHAPE_ONLY:
        return [x for x in node.all_input_nodes if x is not node.args[0]]
    return node.all_input_nodes


def _form(value: Tensor) -> Tensor:
    """A tensor of that shape and dtype that takes no memory."""
    return torch.empty((), dtype=value.dtype).expand(value.shape)


def _is_too_large(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.numel() > _MOST_ELEMENTS
