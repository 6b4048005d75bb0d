"""make_fx on real tensors, before autograd dispatch, then exported again: for code that torch.export refuses to run."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from t3compile.tracing.carry_values import CarryValues
from t3compile.tracing.export_with_values import carry_call, module_tensors
from t3compile.tracing.traced_call import TracedCall


def trace_with_values(call: TracedCall) -> tuple[ExportedProgram, dict[str, set[str]]]:
    """The export, and by input (placeholder) the calls that read values derived from it."""
    carrier = CarryValues()
    args, kwargs = call.cloned_inputs()
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    out_spec: list[pytree.TreeSpec] = []
    real_tensors = module_tensors(call)

    def forward(*tensors: Tensor) -> list[Any]:
        given = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        traced_args, traced_kwargs = spec.unflatten(given)
        carry_call(carrier, call, real_tensors, traced_args, traced_kwargs)
        with carrier:
            results, returned = pytree.tree_flatten(module(*traced_args, **traced_kwargs))
        out_spec.append(returned)
        return results

    with call.callable_module(lambda inner: inner) as module, _module_stacks(module):
        traced = make_fx(forward, pre_dispatch=True, _error_on_data_dependent_ops=False)(*(leaves[i] for i in places))
    carrier.refuse_activations()
    held = _TracedModule(call.module, traced, places, out_spec[-1])
    export_args, export_kwargs = call.traceable_inputs()
    return torch.export.export(held, export_args, export_kwargs, strict=False), carrier.frozen


class _TracedModule(nn.Module):
    """A traced graph under the original's parameter names and call signature."""

    def __init__(
        self, original: nn.Module, traced: fx.GraphModule, places: list[int], out_spec: pytree.TreeSpec
    ) -> None:
        super().__init__()
        self._graph = traced.graph
        self._places = places
        self._out_spec = out_spec
        # torch.export names the inputs by forward's signature.
        self.forward = functools.wraps(original.forward)(lambda *args, **kwargs: self._run(*args, **kwargs))
        names: dict[int, str] = {}
        for owner_name, owner in original.named_modules():
            holder = self._holder(owner_name)
            for name, parameter in owner._parameters.items():
                holder.register_parameter(name, parameter)
                names[id(parameter)] = f"{owner_name}.{name}".removeprefix(".")
            for name, buffer in owner._buffers.items():
                holder.register_buffer(name, buffer, persistent=name not in owner._non_persistent_buffers_set)
                names[id(buffer)] = f"{owner_name}.{name}".removeprefix(".")
        for node in self._graph.nodes:
            if node.op == "get_attr":
                tensor = getattr(traced, node.target)
                name = names.get(id(tensor))
                if name is None:
                    name = f"traced_constant_{len(self._buffers)}_{node.target.strip('_')}"
                    self.register_buffer(name, tensor, persistent=False)
                    names[id(tensor)] = name
                node.target = name

    def _holder(self, path: str) -> nn.Module:
        holder: nn.Module = self
        for part in path.split(".") if path else ():
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            child = holder._modules[part]
            assert child is not None
            holder = child
        return holder

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaves[i] for i in self._places]
        with fx_traceback.preserve_node_meta():
            results = fx.Interpreter(self, graph=self._graph).run(*tensors, enable_io_processing=False)
        return self._out_spec.unflatten(results)


@contextmanager
def _module_stacks(module: nn.Module) -> Iterator[None]:
    """Nodes made inside a submodule's forward get its path, as torch.export writes it."""
    paths = {child: path for path, child in module.named_modules()}
    stack: list[nn.Module] = []

    def enter(child: nn.Module, *_: Any) -> None:
        stack.append(child)
        write()

    def leave(child: nn.Module, *_: Any) -> None:
        stack.pop()
        write()

    def write() -> None:
        fx_traceback.current_meta["nn_module_stack"] = {
            f"L__self__{paths[child].replace('.', '_')}": (
                paths[child],
                f"{type(child).__module__}.{type(child).__qualname__}",
            )
            for child in stack
        }

    hooks = []
    for child in paths:
        hooks += [child.register_forward_pre_hook(enter), child.register_forward_hook(leave)]
    try:
        with fx_traceback.preserve_node_meta():
            yield
    finally:
        for hook in hooks:
            hook.remove()
