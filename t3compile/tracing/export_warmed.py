"""torch.export, non-strict, after one eager call: tables that the first call fills are there."""

from __future__ import annotations

from torch.export import ExportedProgram

from t3compile.tracing.export_nonstrict import export_nonstrict
from t3compile.tracing.traced_call import TracedCall


def export_warmed(call: TracedCall) -> ExportedProgram:
    """Changes the module's caches as the eager call does: run it inside ``preserved``."""
    args, kwargs = call.cloned_inputs()
    with call.callable_module() as module:
        module(*args, **kwargs)
    return export_nonstrict(call)
