"""torch.export, strict: forward's bytecode is read instead of run."""

from __future__ import annotations

import re

import torch
from torch.export import ExportedProgram

from t3compile.tracing.traced_call import TracedCall

# Strict export sees the module through the forward that stands around its own.
_AROUND = re.compile(r"^forward\.__closure__\[\d+\]\.cell_contents\.__self__\.?")


def export_strict(call: TracedCall) -> ExportedProgram:
    """Nodes keep the paths of their modules."""
    args, kwargs = call.traceable_inputs()
    torch._dynamo.reset()
    with call.callable_module() as module:
        exported = torch.export.export(module, args, kwargs, strict=True)
    for node in exported.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {key: (_AROUND.sub("", path), kind) for key, (path, kind) in stack.items()}
    return exported
