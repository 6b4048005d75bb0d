"""torch.export, strict: forward's bytecode is read instead of run."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from t3compile.tracing.traced_call import TracedCall


def export_strict(call: TracedCall) -> ExportedProgram:
    args, kwargs = call.traceable_inputs()
    torch._dynamo.reset()
    with call.callable_module() as module:
        return torch.export.export(module, args, kwargs, strict=True)
