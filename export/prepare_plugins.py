"""ONNX file -> plugins registered with TensorRT, and the graph with plugin nodes for its parser."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import onnx_ir as ir

from t3compile.export.plugin_kernels import PluginKernels, compile_plugin_layers
from t3compile.export.plugin_layers import PluginLayer, PluginLayers, plan_plugin_layers, with_plugin_nodes
from t3compile.export.tensorrt_plugin import register_plugins


@dataclass(frozen=True)
class PreparedPlugins:
    """The registered layers with their kernels, why other functions keep their bodies, and the model to parse."""

    plugins: PluginLayers
    kernels: PluginKernels
    model: ir.Model


def prepare_plugins(
    model: ir.Model,
    tensorrt: ModuleType,
    *,
    architectures: Sequence[int] = (),
    on_layer: Callable[[PluginLayer], None] = lambda layer: None,
) -> PreparedPlugins:
    """Plan, compile and register the plugins of a model's window functions, before a parser reads its new graph.

    ``tensorrt`` is the module of that name. The model is left as it is. Errors are those of plan_plugin_layers,
    compile_plugin_layers, with_plugin_nodes and register_plugins; nothing is registered where one of the others fails.
    """
    plugins, kernels = compile_plugin_layers(plan_plugin_layers(model), architectures=architectures, on_layer=on_layer)
    graph = with_plugin_nodes(model, plugins)
    if plugins.layers:
        register_plugins(plugins.layers, kernels, importlib.import_module(f"{tensorrt.__name__}.plugin"))
    return PreparedPlugins(plugins, kernels, graph)
