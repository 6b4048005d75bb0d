"""Call a ``.pt2`` program in torch like an exported engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from t3compile.export.engine_inputs import check_tensor, list_inputs, program_inputs, program_output_names
from t3compile.export.name_inputs import name_inputs
from t3compile.inputs import bind_inputs, frozen_arguments
from t3compile.program import Program


class TorchEngine:
    """A program in torch on the CPU, called with tensors (of any device) or arrays, by position or by input name.

    Returns torch tensors on the CPU: the only output, or a tuple of them.
    """

    runtime = "torch"
    notes: tuple[str, ...] = ()

    def __init__(self, program: Program) -> None:
        self._program = program
        self._module = program.module()
        self.inputs = program_inputs(program)
        self.output_names = program_output_names(program)
        self.frozen = frozen_arguments(program)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = name_inputs(args, kwargs, [spec.name for spec in self.inputs], list_inputs(self.inputs))
        specs = {spec.name: spec for spec in self.inputs}
        # Other names that an input goes by are told, and checked, by bind_inputs.
        tensors = {
            name: check_tensor(specs[name], value).cpu() if name in specs else value for name, value in named.items()
        }
        call_args, call_kwargs = bind_inputs(self._program, tensors)
        with torch.no_grad():
            result = self._module(*call_args, **call_kwargs)
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)
