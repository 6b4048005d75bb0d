"""Does a traced graph give eager's outputs on the example inputs?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from t3compile.tracing.preserve_module import preserved
from t3compile.tracing.traced_call import TracedCall

# Above this many MACs a model is not run here twice.
COMPARED_MACS = 5 * 10**10
# Kernels may sum in another order; a few rounding steps of the dtype, and no less than float32's.
_LEAST_TOLERANCE = 1e-5
_ROUNDING_STEPS = 4


def run_eager(call: TracedCall) -> list[Any]:
    """Forward's outputs, flat, with the module as it was before."""
    args, kwargs = call.cloned_inputs()
    with torch.no_grad(), preserved(call.module), call.callable_module() as module:
        return pytree.tree_leaves(plain_leaves(module(*args, **kwargs)))


def plain_leaves(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), value)


def run_graph(exported: ExportedProgram, call: TracedCall) -> list[Any]:
    """The user outputs of the graph, flat."""
    args, kwargs = call.cloned_inputs()
    in_spec = exported.call_spec.in_spec
    assert in_spec is not None
    given = iter(pytree.tree_leaves((args, {name: kwargs[name] for name in in_spec.child(1).context})))
    values: list[Any] = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            value = next(given)
            values.append(spec.arg.value if isinstance(spec.arg, ConstantArgument) else value)
        elif spec.target in exported.state_dict:
            values.append(exported.state_dict[spec.target])
        else:
            values.append(exported.constants[str(spec.target)])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        results = fx.Interpreter(exported.graph_module).run(*values, enable_io_processing=False)
    specs = exported.graph_signature.output_specs
    return [result for result, spec in zip(results, specs, strict=True) if spec.kind == OutputKind.USER_OUTPUT]


def difference(eager: list[Any], graph: list[Any]) -> str:
    """How the outputs differ, in words; empty where they agree."""
    if len(eager) != len(graph):
        return f"it gives {len(graph)} outputs, eager {len(eager)}"
    for i, (expected, got) in enumerate(zip(eager, graph, strict=True)):
        if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
            if isinstance(expected, Tensor) != isinstance(got, Tensor) or expected != got:
                return f"output {i} is {got!r}, eager's {expected!r}"
        elif expected.shape != got.shape or expected.dtype != got.dtype:
            return f"output {i} is {got.dtype} {list(got.shape)}, eager's {expected.dtype} {list(expected.shape)}"
        elif text := _tensor_difference(expected, got):
            return f"output {i} {text}"
    return ""


def _tensor_difference(expected: Tensor, got: Tensor) -> str:
    if not expected.is_floating_point() and not expected.is_complex():
        wrong = int((expected != got).sum())
        return f"differs from eager's in {wrong} of {expected.numel()} values" if wrong else ""
    finite = expected.isfinite()
    if not torch.equal(finite, got.isfinite()) or not torch.equal(expected.isnan(), got.isnan()):
        return "is not finite where eager's is, or the reverse"
    if not finite.any():
        return ""
    wide = torch.complex128 if expected.is_complex() else torch.float64
    reference, result = expected[finite].to(wide), got[finite].to(wide)
    error = float((result - reference).abs().max())
    relative = max(_LEAST_TOLERANCE, _ROUNDING_STEPS * torch.finfo(expected.dtype).eps)
    allowed = relative * float(reference.abs().max())
    return f"differs from eager's by {error:.3g}, allowed {allowed:.3g}" if error > allowed else ""
