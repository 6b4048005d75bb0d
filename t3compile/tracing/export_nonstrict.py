"""torch.export, non-strict: forward runs as it is, on fake tensors."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from t3compile.program import traced_lightly
from t3compile.tracing.traced_call import ForwardWrapper, TracedCall


def export_nonstrict(call: TracedCall, wrap: ForwardWrapper | None = None) -> ExportedProgram:
    """``wrap`` goes around forward."""
    args, kwargs = call.traceable_inputs()
    with traced_lightly(), call.callable_module(wrap) as module:
        return torch.export.export(module, args, kwargs, strict=False)
