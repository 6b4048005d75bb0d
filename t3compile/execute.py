"""Run a program's graph node by node, reading each weight when it is used and freeing it after.

So a check never holds all weights; ``float64`` runs the same graph in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec
from torch.utils import _pytree as pytree

from t3compile.macs import call_macs
from t3compile.program import Program, default_dtype
from t3compile.progress import Advance, unmeasured

_WIDEST = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}

# A stand-in for one call: gets the node and its argument values, returns the result.
CallHook = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]
# Sees the value of one node.
Watcher = Callable[[Tensor], None]


@dataclass(frozen=True)
class _Deferred:
    """A weight that is read when a call needs it."""

    name: str


class _Executor(fx.Interpreter):
    def __init__(
        self,
        program: Program,
        inputs: Mapping[str, Tensor],
        hooks: Mapping[str, CallHook],
        float64: bool,
        needed: frozenset[fx.Node] | None = None,
        advance: Advance = unmeasured,
    ) -> None:
        super().__init__(program.exported.graph_module)
        # Errors keep their one sentence.
        self.extra_traceback = False
        self._program = program
        self._inputs = inputs
        self._hooks = hooks
        self._float64 = float64
        self._needed = needed
        self._advance = advance
        self._specs = {spec.arg.name: spec for spec in program.exported.graph_signature.input_specs}

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        spec = self._specs[str(target)]
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.persistent is not False:
            return _Deferred(str(spec.target))
        return self._wide(self._value(spec))

    def _value(self, spec: InputSpec) -> Any:
        if spec.kind != InputKind.USER_INPUT:
            return self._program.exported.constants[str(spec.target)]
        if isinstance(spec.arg, ConstantArgument):
            return spec.arg.value
        return self._inputs[spec.arg.name]

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        return fx.map_arg(args, self._read)

    def _read(self, node: fx.Node) -> Any:
        # Not in a second look through the arguments: for small calls that takes as long as the call.
        value = self.env[node]
        if isinstance(value, _Deferred):
            return self._wide(self._program.weights.load(value.name).detach())
        return value

    def run_node(self, n: fx.Node) -> Any:
        if self._needed is not None and n not in self._needed:
            return None
        hook = self._hooks.get(n.name)
        if hook is None:
            value = _restrided(super().run_node(n), n)
            self._advance(call_work(n, float64=self._float64))
            return value
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return _restrided(hook(n, args, kwargs), n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self._float64:
            args, kwargs = pytree.tree_map_only(torch.dtype, _widest, (args, kwargs))
        return self._wide(super().call_function(target, args, kwargs))

    def _wide(self, value: Any) -> Any:
        if not self._float64:
            return value
        return pytree.tree_map_only(Tensor, lambda x: x.to(_widest(x.dtype)), value)


def _restrided(value: Any, node: fx.Node) -> Any:
    """The value with the strides that the views behind it were traced for; kernels choose others in float64."""
    traced = node.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(traced, Tensor) or _steps(value) == _steps(traced):
        return value
    if 0 in _steps(traced):
        # An expanded tensor cannot be written to; a contiguous one takes every view that it takes.
        return value.contiguous()
    return torch.empty_strided(value.shape, traced.stride(), dtype=value.dtype).copy_(value)


def _steps(value: Tensor) -> list[int]:
    """Strides of the axes that are longer than one; the others have no meaning."""
    return [stride for size, stride in zip(value.shape, value.stride(), strict=True) if size != 1]


def _widest(dtype: torch.dtype) -> torch.dtype:
    return _WIDEST.get(dtype, dtype)


def execute(
    program: Program,
    inputs: Mapping[str, Tensor],
    *,
    hooks: Mapping[str, CallHook] | None = None,
    float64: bool = False,
    advance: Advance = unmeasured,
) -> list[Tensor]:
    """The program's output tensors in order.

    ``inputs`` are tensors by placeholder name; ``hooks`` replace calls by node name; ``float64`` widens every
    floating value, weights and constants included. ``advance`` is told the work of every call that is not replaced.
    """
    executor = _Executor(program, inputs, hooks or {}, float64, advance=advance)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    with torch.no_grad(), default_dtype(torch.float64 if float64 else torch.get_default_dtype()):
        result = executor.run(*(None for _ in placeholders), enable_io_processing=False)
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


# The time of a MAC in double precision, in those of single precision.
WIDE_WORK = 2


def call_work(node: fx.Node, *, float64: bool = False) -> int:
    """MACs of a call as execute reports them: those in double precision count twice."""
    return call_macs(node) * (WIDE_WORK if float64 else 1)


def run_work(program: Program, *, float64: bool = False, replaced: Collection[str] = ()) -> int:
    """What an execution reports in all, when calls of these names are replaced."""
    return sum(call_work(node, float64=float64) for node in program.graph.nodes if node.name not in replaced)


def watch(
    program: Program, inputs: Mapping[str, Tensor], watchers: Mapping[str, Watcher], *, cut: Collection[str] = ()
) -> None:
    """Run only what the watched nodes are computed from, and show each its watcher.

    ``inputs`` are tensors by placeholder name, ``watchers`` go by node name. Calls named in ``cut`` yield zeros of
    their traced shape and dtype, and what only they need is not computed.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    needed = _sources([nodes[name] for name in watchers], cut)
    executor = _Watching(program, inputs, dict.fromkeys(cut, _zeros), watchers, needed)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        executor.run(*(None for _ in placeholders), enable_io_processing=False)


class _Watching(_Executor):
    def __init__(
        self,
        program: Program,
        inputs: Mapping[str, Tensor],
        hooks: Mapping[str, CallHook],
        watchers: Mapping[str, Watcher],
        needed: frozenset[fx.Node],
    ) -> None:
        super().__init__(program, inputs, hooks, False, needed)
        self._watchers = watchers

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._watchers:
            self._watchers[n.name](value)
        return value


def _zeros(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return pytree.tree_map_only(Tensor, lambda traced: torch.zeros(traced.shape, dtype=traced.dtype), node.meta["val"])


def _sources(nodes: Sequence[fx.Node], cut: Collection[str]) -> frozenset[fx.Node]:
    """The nodes and all that they are computed from, when the calls in ``cut`` need nothing."""
    needed: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node in needed:
            continue
        needed.add(node)
        if node.name not in cut:
            pending.extend(node.all_input_nodes)
    return frozenset(needed)
