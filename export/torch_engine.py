"""Call a ``.pt2`` program in torch like an exported engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from t3compile.errors import InputsError
from t3compile.export.name_inputs import name_inputs
from t3compile.inputs import bind_inputs
from t3compile.program import Program, user_input_names


class TorchEngine:
    """A program in torch, called with tensors or arrays by position or by input name; returns torch tensors."""

    runtime = "torch"

    def __init__(self, program: Program) -> None:
        self._program = program
        self._module = program.module()
        self.input_names = user_input_names(program.exported)
        values = {node.name: node.meta["val"] for node in program.graph.nodes if node.name in self.input_names}
        self._expected = ", ".join(
            f"{name} {list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for name, x in values.items()
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call_args, call_kwargs = bind_inputs(self._program, self._named(args, kwargs))
        with torch.no_grad():
            result = self._module(*call_args, **call_kwargs)
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        named = name_inputs(args, kwargs, self.input_names, self._expected)
        return {name: self._tensor(name, value) for name, value in named.items()}

    def _tensor(self, name: str, value: Any) -> Tensor:
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise InputsError(
                f"input '{name}' is {type(value).__name__}, expected a tensor or an array; the program's inputs are "
                f"{self._expected}"
            ) from None
