"""Drive TensorRT's own plugin template through our plugins as its builder would, in a process of its own.

Real: all of `tensorrt.plugin` with its creator and template, descriptors, data types, formats, dimensions. Stand-ins
for what only libnvinfer can make: the plugin registry, expressions of dimensions and their builder, symbolic arguments.
Reads pickled layers and kernels, writes what the plugins answered as JSON.
"""

from __future__ import annotations

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tensorrt as trt

from t3compile.errors import EngineError
from t3compile.export.plugin_kernels import PluginKernels
from t3compile.export.plugin_layers import PluginLayer, PluginLayers
from t3compile.export.tensorrt_plugin import plugin_failures, register_plugins


class Registry:
    """In the place of trt.get_plugin_registry()."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        key = (creator.name, creator.plugin_version, namespace)
        assert key not in self.creators
        self.creators[key] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, version, namespace]


class DimensionExpr:
    """In the place of trt.IDimensionExpr: a number, or None where it is known at run time only."""

    def __init__(self, value: int | None) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return self.value is not None

    def get_constant_value(self) -> int:
        assert self.value is not None
        return self.value

    def is_size_tensor(self) -> bool:
        return False


class ExprBuilder(trt.IExprBuilder):
    def constant(self, value: int) -> DimensionExpr:
        return DimensionExpr(value)


class DimsExprs(list[Any]):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class SymExpr:
    """In the place of trt.ISymExpr, which can be written only."""

    type: Any
    dtype: Any
    expr: DimensionExpr


class SymExprs(dict[int, SymExpr]):
    nbSymExprs: int | None = None  # noqa: N815 (TensorRT's name)


def install_stand_ins() -> tuple[Any, Registry]:
    """`tensorrt.plugin` and the registry that it uses."""
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    trt.IDimensionExpr, trt.DimsExprs, trt.ISymExpr = DimensionExpr, DimsExprs, SymExpr
    import tensorrt.plugin as trtp

    return trtp, registry


DATA_TYPES = {
    "float16": trt.DataType.HALF,
    "bfloat16": trt.DataType.BF16,
    "float32": trt.DataType.FLOAT,
    "bool": trt.DataType.BOOL,
}


def describe(shape: tuple[int, ...], dtype: Any) -> Any:
    """A tensor with one shape as the builder describes it."""
    static = trt.PluginTensorDesc()
    static.dims, static.type, static.format = trt.Dims(shape), dtype, trt.TensorFormat.LINEAR
    given = trt.DynamicPluginTensorDesc()
    given.desc, given.min, given.opt, given.max = static, trt.Dims(shape), trt.Dims(shape), trt.Dims(shape)
    return given


def create(registry: Registry, name: str) -> Any:
    """The plugin as the ONNX parser makes it from a node with aot = 1."""
    creator = registry.get_creator(name, "1", "t3")
    assert len(list(creator.field_names)) == 0
    return creator.create_plugin(
        name, "t3", trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD, trt.QuickPluginCreationRequest.STRICT_AOT
    )


def drive(plugin: Any, layer: PluginLayer) -> dict[str, Any]:
    """Everything that a builder asks of a plugin, in its order, with the layer's tensors."""
    tensors = [(x.shape, DATA_TYPES[x.dtype]) for x in layer.inputs]
    (out_type,) = plugin.get_output_data_types([dtype for _, dtype in tensors], [len(shape) for shape, _ in tensors])
    exprs = [[DimensionExpr(size) for size in shape] for shape, _ in tensors]
    (out_exprs,) = plugin.get_output_shapes(exprs, [], ExprBuilder())
    out_shape = [expr.value for expr in out_exprs]
    in_out = [describe(*tensor) for tensor in (*tensors, (layer.output.shape, out_type))]
    count = len(tensors)
    formats = plugin.get_supported_format_combinations(in_out, count)
    plugin.configure_plugin(in_out[:count], in_out[count:])
    tactics = sorted(plugin.get_valid_tactics())
    return {
        "outputs": plugin.get_num_outputs(),
        "out_type": out_type.name,
        "out_shape": out_shape,
        "aliased": plugin.get_aliased_input(0),
        "formats": [[x.type.name, x.format.name] for x in formats],
        "tactics": tactics,
        "kernels": [kernel_of(plugin, in_out, tactic) for tactic in tactics],
    }


def kernel_of(plugin: Any, in_out: list[Any], tactic: int) -> dict[str, Any]:
    plugin.set_tactic(tactic)
    launch, arguments = SimpleNamespace(), SymExprs()
    count = len(in_out) - 1
    exprs = [[DimensionExpr(size) for size in x.desc.dims] for x in in_out[:count]]
    plugin.get_launch_params(exprs, in_out, count, launch, arguments, ExprBuilder())
    descs = [x.desc for x in in_out]
    entry, ptx = plugin.clone().get_kernel(descs[:count], descs[count:])
    assert {value.dtype for value in vars(launch).values()} == {trt.PluginArgDataType.INT32}
    return {
        "tactic": tactic,
        "launch": {name: value.expr.value for name, value in vars(launch).items()},
        "extra_arguments": [arguments.nbSymExprs, len(arguments)],
        "entry": entry,
        "ptx": ptx.decode(),
    }


def refusals(registry: Registry, layer: PluginLayer) -> list[str]:
    """What the plugin says to another shape, another output, another dtype and another tactic than it is made for."""
    q, *rest = layer.inputs
    batch, heads, tokens, depth = q.shape
    longer = replace(layer, inputs=(replace(q, shape=(batch, heads, tokens + 1, depth)), *rest))
    wider = replace(layer, output=replace(layer.output, shape=(batch, heads, tokens, layer.output.shape[-1] + 8)))

    def ready() -> Any:
        plugin = create(registry, layer.name)
        drive(plugin, layer)
        return plugin

    in_float32 = [describe(x.shape, trt.DataType.FLOAT) for x in (*layer.inputs, layer.output)]
    fitting = [describe(x.shape, DATA_TYPES[x.dtype]) for x in (*layer.inputs, layer.output)]
    (tactic, *_) = drive(create(registry, layer.name), layer)["tactics"]
    said = []
    for ask in (
        lambda: drive(create(registry, layer.name), longer),
        lambda: drive(create(registry, layer.name), wider),
        lambda: kernel_of(ready(), in_float32, tactic),
        lambda: kernel_of(ready(), fitting, 7),
    ):
        try:
            ask()
        except EngineError as error:
            said.append(str(error))
    return said


def taken_name(layer: PluginLayer, kernels: PluginKernels, trtp: Any) -> list[str]:
    """What registering says where the name has another configuration, or is not ours."""
    other = replace(layer, launch=replace(layer.launch, batch=layer.launch.batch + 1))
    foreign = replace(layer, name="WindowAttention_foreign")

    def like(x: Any) -> Any:
        return x.like()

    # TensorRT wants classes, which postponed annotations are not.
    like.__annotations__ = {"x": trtp.TensorDesc, "return": trtp.TensorDesc}
    trtp.register("t3::WindowAttention_foreign")(like)
    said = []
    for one in (other, foreign):
        try:
            register_plugins([one], kernels, trtp)
        except EngineError as error:
            said.append(str(error))
    return said


def main(given: str, result: str) -> None:
    trtp, registry = install_stand_ins()
    plugins: PluginLayers
    kernels: PluginKernels
    plugins, kernels = pickle.loads(Path(given).read_bytes())
    first = plugins.layers[0]
    answers: dict[str, Any] = {
        "version": trt.__version__,
        "new": register_plugins(plugins.layers, kernels, trtp),
        "new again": register_plugins(plugins.layers, kernels, trtp),
        "registered": sorted(registry.creators),
        "layers": {layer.name: drive(create(registry, layer.name), layer) for layer in plugins.layers},
        "failures": plugin_failures(),
        "refusals": refusals(registry, first),
        "failures after refusals": plugin_failures(),
        "taken name": taken_name(first, kernels, trtp),
    }
    register_plugins(plugins.layers, kernels, trtp)
    answers["failures of the next engine"] = plugin_failures()
    Path(result).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
