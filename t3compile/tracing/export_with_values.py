"""torch.export, non-strict, with real values beside: what Python reads from a tensor becomes a constant."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from t3compile.program import is_fake
from t3compile.tracing.carry_values import CarryValues, untraced
from t3compile.tracing.export_nonstrict import export_nonstrict
from t3compile.tracing.traced_call import Forward, TracedCall

# Beside fake weights only small values are carried: masks, ids, lengths.
_LARGEST_BESIDE_FAKES = 2**22


def export_with_values(call: TracedCall) -> tuple[ExportedProgram, dict[str, set[str]]]:
    """The export, and by input (placeholder) the calls that read values derived from it."""
    if call.is_graph:
        raise TypeError("torch.export interprets an fx.GraphModule and does not call its forward")
    carriers: list[CarryValues] = []
    largest = None if call.is_real else _LARGEST_BESIDE_FAKES

    def wrap(forward: Forward) -> Forward:
        def carried(*args: Any, **kwargs: Any) -> Any:
            carrier = CarryValues(largest)
            carriers.append(carrier)
            carry_call(carrier, call, real_tensors, args, kwargs)
            with carrier:
                return forward(*args, **kwargs)

        return carried

    real_tensors = module_tensors(call)
    exported = export_nonstrict(call, wrap)
    carriers[-1].refuse_activations()
    return exported, carriers[-1].frozen


def module_tensors(call: TracedCall) -> dict[str, Tensor]:
    """The module's parameters and buffers that have values, by name."""
    named = {**dict(call.module.named_parameters()), **dict(call.module.named_buffers())}
    return {name: tensor.detach() for name, tensor in named.items() if not is_fake(tensor)}


def carry_call(
    carrier: CarryValues,
    call: TracedCall,
    real_tensors: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Give the carrier the values of the traced inputs, and of the module's tensors as they are in the trace."""
    traced = {f"input '{name}'": leaf for name, leaf in call.named_leaves(args, kwargs).items()}
    values = {f"input '{name}'": leaf for name, leaf in call.named_leaves(call.args, call.kwargs).items()}
    buffers = dict(call.module.named_buffers())
    for name, tensor in {**dict(call.module.named_parameters()), **buffers}.items():
        if name in real_tensors:
            kind = "buffer" if name in buffers else "weight"
            traced[f"{kind} '{name}'"] = tensor
            values[f"{kind} '{name}'"] = real_tensors[name]
    with untraced():
        for name, value in values.items():
            if isinstance(value, Tensor) and not is_fake(value):
                is_written = not name.startswith("weight")
                carrier.carry(traced[name], value.detach().clone() if is_written else value.detach(), name)
