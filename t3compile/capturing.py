"""Record the real arguments of a model's call inside any pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from t3compile.errors import InputsError
from t3compile.files import staged_outputs
from t3compile.pipeline import trace
from t3compile.program import Program

_COMPONENT = "transformer"
_OTHER_COMPONENTS = ("dit", "model")


@dataclass
class CallRecord:
    """The arguments of one call of ``module``, tensors detached and copied; empty until the call happened."""

    module: nn.Module
    call: int = 0
    calls: int = 0
    _recorded: tuple[tuple[Any, ...], dict[str, Any]] | None = field(default=None, repr=False)

    @property
    def args(self) -> tuple[Any, ...]:
        return self._arguments()[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        return self._arguments()[1]

    def trace(self) -> Program:
        """The Program of the module with the recorded arguments as example inputs."""
        return trace(self.module, self.args, self.kwargs)

    def save(self, path: str | Path) -> Path:
        """Write the tensors as safetensors, for ``--inputs``: by forward's names, positional ones as "0", "1", ...

        InputsError names an argument that is neither a tensor nor None, as a file of inputs cannot hold it.
        """
        from safetensors.torch import save_file

        path = Path(path)
        named = {**{str(i): value for i, value in enumerate(self.args)}, **self.kwargs}
        for name, value in named.items():
            if value is not None and not isinstance(value, Tensor):
                raise InputsError(
                    f"argument '{name}' of the recorded call is {type(value).__name__}, and a file of inputs holds "
                    "tensors only; trace the record instead, or give it to a factory's args and kwargs"
                )
        tensors = {name: value.contiguous() for name, value in named.items() if isinstance(value, Tensor)}
        with staged_outputs(path) as stage:
            save_file(tensors, stage / path.name)
        return path

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._recorded is None:
            asked = f"call {self.call} (counted from 0)" if self.call else "a call"
            raise InputsError(
                f"{type(self.module).__name__} was called {self.calls} times while capturing, and {asked} was to be "
                "recorded; run the pipeline inside the with block"
            )
        return self._recorded

    def _see(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.calls == self.call:
            self._recorded = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), (args, dict(kwargs)))
        self.calls += 1


@contextmanager
def capture(module_or_pipeline: object, component: str | None = None, *, call: int = 0) -> Iterator[CallRecord]:
    """Record the arguments of the model's first call, or of its ``call``-th counted from 0, inside the block.

    Of a pipeline the model is ``component``, else its only module named "transformer...", else the only one named
    "dit..." or "model...". The pipeline's results are unchanged. InputsError where the model cannot be told, or
    where the call did not happen.
    """
    module = _find_model(module_or_pipeline, component)
    record = CallRecord(module, call)

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            record._see(args, kwargs)

    hook = module.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield record
    finally:
        hook.remove()
    record._arguments()


def _find_model(owner: object, component: str | None) -> nn.Module:
    if isinstance(owner, nn.Module) and component is None:
        return owner
    modules = _modules_of(owner)
    listed = ", ".join(f"{name} ({type(module).__name__})" for name, module in modules.items()) or "none"
    kind = type(owner).__name__
    if component is not None:
        if component not in modules:
            raise InputsError(f"{kind} has no module '{component}'; its modules are {listed}")
        return modules[component]
    for prefixes in ((_COMPONENT,), _OTHER_COMPONENTS):
        fitting = {name: module for name, module in modules.items() if name.lower().startswith(prefixes)}
        if len({id(module) for module in fitting.values()}) == 1:
            return next(iter(fitting.values()))
        if fitting:
            break
    raise InputsError(f"which module of {kind} to capture is not told by its name: {listed}; give component=NAME")


def _modules_of(owner: object) -> dict[str, nn.Module]:
    """The modules that a pipeline holds, by attribute."""
    held: dict[str, Any] = {}
    for source in (
        getattr(owner, "components", None),
        getattr(owner, "__dict__", None),
        getattr(owner, "_modules", None),
    ):
        if isinstance(source, Mapping):
            held.update(source)
    return {name: value for name, value in held.items() if isinstance(value, nn.Module)}
