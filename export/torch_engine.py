"""Call a ``.pt2`` program in torch like an exported engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from t3compile.inputs import bind_inputs
from t3compile.program import Program, user_input_names


class TorchEngine:
    """A program in torch, called with tensors or arrays by position or by input name; returns torch tensors."""

    runtime = "torch"

    def __init__(self, program: Program) -> None:
        self._program = program
        self._module = program.module()
        self.input_names = user_input_names(program.exported)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(self.input_names, args, strict=False)) | kwargs
        tensors = {name: torch.as_tensor(value) for name, value in named.items()}
        call_args, call_kwargs = bind_inputs(self._program, tensors)
        with torch.no_grad():
            result = self._module(*call_args, **call_kwargs)
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)
