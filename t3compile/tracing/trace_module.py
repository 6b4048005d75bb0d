"""The strategies in order; the first whose graph gives eager's outputs makes the Program."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from t3compile.errors import TraceError, first_line
from t3compile.macs import graph_macs
from t3compile.program import Program, functionalized, quiet_torch
from t3compile.tracing.carry_values import ReadsActivationsError, reads_values
from t3compile.tracing.compare_with_eager import COMPARED_MACS, difference, run_eager, run_graph
from t3compile.tracing.export_nonstrict import export_nonstrict
from t3compile.tracing.export_strict import export_strict
from t3compile.tracing.export_warmed import export_warmed
from t3compile.tracing.export_with_values import export_with_values
from t3compile.tracing.preserve_module import preserved
from t3compile.tracing.replace_leaves import replace_attention_leaves
from t3compile.tracing.trace_with_values import trace_with_values
from t3compile.tracing.traced_call import TracedCall, make_call
from t3compile.weights import TensorWeights, Weights

_Frozen = dict[str, set[str]]


@dataclass(frozen=True)
class Strategy:
    """One way to a graph; ``needs_values`` where it runs forward on real tensors, ``helps_with_data`` where it may
    get past values that forward reads.
    """

    name: str
    run: Callable[[TracedCall], tuple[ExportedProgram, _Frozen]]
    needs_values: bool = False
    helps_with_data: bool = True


def _without_frozen(export: Callable[[TracedCall], ExportedProgram]) -> Callable[..., tuple[ExportedProgram, _Frozen]]:
    return lambda call: (export(call), {})


STRATEGIES: tuple[Strategy, ...] = (
    Strategy("torch.export, non-strict", _without_frozen(export_nonstrict)),  # keeps module paths, costs least
    Strategy("torch.export, non-strict, after one eager call", _without_frozen(export_warmed), needs_values=True),
    Strategy("torch.export, strict", _without_frozen(export_strict), helps_with_data=False),  # slower
    Strategy("torch.export, non-strict, with real values beside", export_with_values),  # freezes what is read
    Strategy("make_fx on real values", trace_with_values, needs_values=True),  # last: forward does not see an export
)


class _RefusedError(Exception):
    """A strategy gave no graph, or one that cannot be used."""


class _DependsOnDataError(_RefusedError):
    """The graph's shapes, or numbers in it, depend on values."""


@dataclass
class _Attempts:
    """What was tried; eager's outputs are computed when they are first needed."""

    call: TracedCall
    source: str
    failures: list[tuple[str, str]] = field(default_factory=list)
    reads_data: bool = False
    _eager: list[Any] | None = None

    def eager(self) -> list[Any]:
        if self._eager is None:
            self._eager = run_eager(self.call)
        return self._eager


def trace(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    weights: Weights | None = None,
    source: str = "",
) -> Program:
    """Trace an nn.Module or fx.GraphModule to a Program with static shapes; the module is left as it was.

    Strategies are tried in order, and the first whose graph gives eager's outputs on these inputs wins; the
    program's ``traced_by`` and ``notes`` say which, why earlier ones failed, and what is frozen at its example
    value. The comparison needs real weights and is left out above 5e10 MACs. Parameters may be fake tensors (see
    ``weights``): then no weight is ever needed. Arguments that are no nests of tensors and constants are closed
    over. Calls of attention libraries that are leaves of an fx.GraphModule are traced as torch's attention, with a
    note. Raises TraceError with every strategy's reason.
    """
    source = source or type(module).__name__
    replaced: tuple[str, ...] = ()
    if isinstance(module, fx.GraphModule):
        module, replaced = replace_attention_leaves(module)
    call = make_call(module, tuple(args), dict(kwargs or {}))
    program = _trace_call(call, STRATEGIES, weights, source)
    return replace(program, notes=(*replaced, *program.notes))


def _trace_call(call: TracedCall, strategies: tuple[Strategy, ...], weights: Weights | None, source: str) -> Program:
    attempts = _Attempts(call, source)
    for strategy in strategies:
        try:
            # torch prints a whole graph where it stops at values that forward reads.
            with quiet_torch(), redirect_stderr(io.StringIO()), torch.no_grad():
                exported, frozen, not_compared = _attempt(strategy, attempts)
        except Exception as error:
            is_plain = isinstance(error, _RefusedError | ReadsActivationsError)
            text = str(error) if is_plain else f"{type(error).__name__}: {first_line(error)}"
            attempts.failures.append((strategy.name, text))
            attempts.reads_data |= isinstance(error, GuardOnDataDependentSymNode | _DependsOnDataError)
            if len(attempts.failures) == 1:
                _require_eager(attempts)
            continue
        exported.example_inputs = (call.args, call.kwargs)
        kept = TensorWeights(dict(exported.state_dict)) if weights is None else weights
        winner_first = (strategy, *(other for other in strategies if other is not strategy))
        retrace = _retracing(call, winner_first, kept, source)
        traced_by = f"{strategy.name} ({not_compared})" if not_compared else strategy.name
        notes = (*call.notes, *_failure_notes(attempts.failures), *_frozen_notes(frozen))
        return Program(exported, kept, source, retrace, notes=notes, traced_by=traced_by)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in attempts.failures)
    raise TraceError(
        f"torch.export could not trace {source} by any strategy ({reasons}); change what forward does there, or export "
        "the model yourself with torch.export and give the .pt2"
    )


def _retracing(
    call: TracedCall, strategies: tuple[Strategy, ...], weights: Weights, source: str
) -> Callable[[tuple[Any, ...], dict[str, Any]], Program]:
    def retrace(new_args: tuple[Any, ...], new_kwargs: dict[str, Any]) -> Program:
        return _trace_call(call.with_inputs(new_args, new_kwargs), strategies, weights, source)

    return retrace


def _require_eager(attempts: _Attempts) -> None:
    """Where forward itself fails on the inputs, no strategy can help."""
    if not attempts.call.is_real:
        return
    try:
        with quiet_torch():
            attempts.eager()
    except Exception as error:
        raise TraceError(
            f"torch.export could not trace {attempts.source}, whose forward fails on the example inputs: "
            f"{type(error).__name__}: {first_line(error)}; give inputs that it can be called with"
        ) from error


def _attempt(strategy: Strategy, attempts: _Attempts) -> tuple[ExportedProgram, _Frozen, str]:
    """The functional graph, what is frozen in it, and why it was not compared with eager, if it was not."""
    call = attempts.call
    if strategy.needs_values and not call.is_real:
        raise _RefusedError("it needs real weights, and these are not in memory")
    if attempts.reads_data and not strategy.helps_with_data:
        raise _RefusedError("it cannot get past values that forward reads either")
    with preserved(call.module):
        exported, frozen = strategy.run(call)
    exported = functionalized(exported)
    _require_static(exported.graph)
    if not call.is_real:
        return exported, frozen, "not compared with eager: the weights are not in memory"
    macs = graph_macs(exported.graph)
    if macs > COMPARED_MACS:
        return exported, frozen, f"not compared with eager: {macs / 1e12:,.2f} T MACs are too many to run here"
    text = difference(attempts.eager(), run_graph(exported, call))
    if text:
        raise _RefusedError(f"its graph is not eager's function: {text}")
    return exported, frozen, ""


def _require_static(graph: fx.Graph) -> None:
    for node in graph.nodes:
        value = node.meta.get("val")
        is_symbolic = isinstance(value, Tensor) and not all(isinstance(size, int) for size in value.shape)
        if is_symbolic or isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            raise _DependsOnDataError(f"its graph has shapes or numbers that depend on data, first at '{node.name}'")
        if node.op == "call_function" and reads_values(node.target, node.args):
            raise _DependsOnDataError(f"its graph reads values at '{node.name}'")


def _failure_notes(failures: list[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(f"{name} was not used: {reason}" for name, reason in failures)


def _frozen_notes(frozen: _Frozen) -> tuple[str, ...]:
    return tuple(
        f"{name} is frozen at the example's value (read by {', '.join(sorted(readers))}): the graph is right for that "
        "value only"
        for name, readers in sorted(frozen.items())
    )
