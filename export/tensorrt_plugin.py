"""Register plugin layers with TensorRT as Quickly Deployable Plugins that are compiled ahead of time.

Each layer is a plugin t3::<name> of three functions: what its output is, which dtypes and tactics it takes, and the
kernel of a tactic. The kernel's PTX goes into the engine, which then runs without this package and without Python.
Works with the plugin interface of TensorRT 10.13, 10.15, 10.16 and 11.x as its Python bindings have it; an engine with
these plugins was never built by this project's tests, which have no TensorRT.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from t3compile.errors import EngineError
from t3compile.export.compile_kernel import CompiledKernel
from t3compile.export.function_launches import LaunchTensor
from t3compile.export.plugin_kernels import PluginKernels
from t3compile.export.plugin_layers import PluginLayer
from t3compile.export.window_function import DOMAIN

# How an autotune combination spells a dtype, and what the enum trt.DataType calls it.
_SPELLED = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32", "bool": "BOOL"}
_DATA_TYPES = {"float16": "HALF", "bfloat16": "BF16", "float32": "FLOAT", "bool": "BOOL"}


@dataclass
class _Plugin:
    """A registered layer. Its kernels are replaced when it is registered again, for the next engine."""

    layer: PluginLayer
    kernels: Mapping[int, CompiledKernel]
    failure: str | None = None


# TensorRT's registry belongs to the process and forgets nothing, so this one does neither.
_PLUGINS: dict[str, _Plugin] = {}


def register_plugins(layers: Sequence[PluginLayer], kernels: PluginKernels, trtp: Any) -> tuple[str, ...]:
    """Register the layers, with their kernels as tactics, before the ONNX parser reads their nodes.

    ``trtp`` is the module ``tensorrt.plugin``. Layers that are registered already keep their plugin and get these
    kernels. Returns the names that are new. Raises EngineError, with nothing registered, where a name is taken by
    another configuration or by a plugin that is not of this package.
    """
    for layer in layers:
        known = _PLUGINS.get(layer.name)
        if known is not None and known.layer != layer:
            raise EngineError(
                f"plugin '{DOMAIN}::{layer.name}' is registered in this process with another configuration; build "
                "this engine in a new process"
            )
        if known is None and hasattr(getattr(trtp.op, DOMAIN, None), layer.name):
            raise EngineError(
                f"plugin '{DOMAIN}::{layer.name}' is registered by something else than t3compile; build this engine "
                "in a new process"
            )
    new = []
    for layer in layers:
        known = _PLUGINS.get(layer.name)
        if known is not None:
            known.kernels, known.failure = kernels.tactics(layer.name), None
            continue
        plugin = _Plugin(layer, kernels.tactics(layer.name))
        _register(plugin, trtp)
        _PLUGINS[layer.name] = plugin
        new.append(layer.name)
    return tuple(new)


def plugin_failures() -> dict[str, str]:
    """What a plugin told TensorRT it cannot do, by name: TensorRT reports such a failure without its reason."""
    return {name: plugin.failure for name, plugin in _PLUGINS.items() if plugin.failure is not None}


def _register(plugin: _Plugin, trtp: Any) -> None:
    plugin_id = f"{DOMAIN}::{plugin.layer.name}"
    outputs = {"outputs": tuple[trtp.TensorDesc]}
    kernel = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]

    def signed(function: Callable[..., Any], more: Mapping[str, Any], returns: Any) -> Callable[..., Any]:
        return _signed(plugin, function, {**{x.name: trtp.TensorDesc for x in plugin.layer.inputs}, **more}, returns)

    def describe(*inputs: Any) -> tuple[Any]:
        for given, expected in zip(inputs, plugin.layer.inputs, strict=True):
            _check_sizes(plugin, expected, [_constant(size) for size in given.shape_expr])
        q, _, v = inputs[:3]
        sizes = (*(q.shape_expr[i] for i in range(3)), v.shape_expr[3])
        return (trtp.from_shape_expr(sizes, q.dtype),)

    def autotune(*_: Any) -> list[Any]:
        dtypes = [_SPELLED[x.dtype] for x in (*plugin.layer.inputs, plugin.layer.output)]
        return [trtp.AutoTuneCombination(", ".join(dtypes), "LINEAR", list(plugin.kernels))]

    def implement(*given: Any) -> tuple[str, str, Any, Any]:
        *inputs, (output,), tactic = given
        for found, expected in zip((*inputs, output), (*plugin.layer.inputs, plugin.layer.output), strict=True):
            _check_tensor(plugin, expected, found)
        compiled = plugin.kernels.get(tactic)
        if compiled is None:
            raise _refusal(plugin, f"TensorRT asks for tactic {tactic}; offered: {sorted(plugin.kernels)}")
        launch = trtp.KernelLaunchParams(
            grid_x=compiled.grid_x, block_x=compiled.block_x, shared_mem=compiled.shared_bytes
        )
        # Every number is baked in: the kernel takes pointers alone.
        return compiled.entry, compiled.ptx, launch, trtp.SymIntExprs(0)

    trtp.register(plugin_id)(signed(describe, {}, tuple[trtp.TensorDesc]))
    trtp.autotune(plugin_id)(signed(autotune, outputs, list[trtp.AutoTuneCombination]))
    trtp.aot_impl(plugin_id)(signed(implement, {**outputs, "tactic": int}, kernel))


def _signed(
    plugin: _Plugin, function: Callable[..., Any], parameters: Mapping[str, Any], returns: Any
) -> Callable[..., Any]:
    """The function with the signature that TensorRT inspects, and with its errors kept: TensorRT swallows them."""

    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            plugin.failure = plugin.failure or str(error)
            raise

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    declared = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    call.__signature__ = inspect.Signature(declared, return_annotation=returns)  # type: ignore[attr-defined]
    return call


def _constant(size: Any) -> int | None:
    """The value of a dimension where TensorRT tells it."""
    return None if size.is_fake or not size.is_constant else int(size.constant_value())


def _check_sizes(plugin: _Plugin, expected: LaunchTensor, found: Sequence[int | None]) -> None:
    fits = len(found) == len(expected.shape) and all(
        size is None or size == wanted for size, wanted in zip(found, expected.shape, strict=True)
    )
    if not fits:
        sizes = ["?" if size is None else size for size in found]
        raise _refusal(plugin, f"input '{expected.name}' has shape {sizes}, the kernel is made for {expected}")


def _check_tensor(plugin: _Plugin, expected: LaunchTensor, found: Any) -> None:
    is_linear = found.format.name == "LINEAR"
    if tuple(found.shape) != expected.shape or found.dtype.name != _DATA_TYPES[expected.dtype] or not is_linear:
        raise _refusal(
            plugin,
            f"tensor '{expected.name}' is {list(found.shape)} {found.dtype.name} {found.format.name}, the kernel is "
            f"made for {expected} LINEAR; build with static shapes and in the precision of the ONNX file",
        )


def _refusal(plugin: _Plugin, reason: str) -> EngineError:
    return EngineError(f"plugin '{DOMAIN}::{plugin.layer.name}': {reason}")
