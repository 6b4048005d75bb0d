"""Which window functions of an ONNX file become TensorRT plugin layers, and the file's graph with plugin nodes.

A plugin layer is one launch of the window attention kernel on contiguous [B, N, S, D] tensors. A function with one
computed branch becomes the plugin of its own name, one with two becomes two layers, as a plugin has one kernel and no
workspace: the first writes the local branch, the second reads that as its last input and writes the mean.

TensorRT's ONNX parser takes the plugin whose name is the node's type and whose namespace is its `plugin_namespace`, in
version "1" where the node names none (read in the parser's source of 10.1); `aot` = 1 asks for the kernel that was
compiled ahead of time (read in the samples of 11.1). TensorRT itself never ran here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from t3compile.errors import EngineError
from t3compile.export.function_launches import LaunchTensor, launch_tensors, window_launches
from t3compile.export.window_function import DOMAIN, FunctionKey, window_functions
from t3compile.ops.window_launch import WindowLaunch

PLUGIN_ATTRIBUTES: Mapping[str, str | int] = {"plugin_namespace": DOMAIN, "aot": 1}
MAX_HEAD_DIM = 256
# What tensor cores multiply; float32 would be computed without them.
_DTYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
_MASK_DTYPES = ("bool", "float16", "bfloat16", "float32")


@dataclass(frozen=True)
class PluginLayer:
    """One plugin: its name (the type of its ONNX node), the function that it stands for and the kernel's launch."""

    name: str
    function: str
    launch: WindowLaunch
    inputs: tuple[LaunchTensor, ...]
    output: LaunchTensor


@dataclass(frozen=True)
class PluginLayers:
    """Layers in the order of the file's functions, and why the other functions stay as they are, by name."""

    layers: tuple[PluginLayer, ...]
    declined: Mapping[str, str]

    def of(self, function: str) -> tuple[PluginLayer, ...]:
        """The layers that stand for a function, in the order in which they run; none where it was declined."""
        return tuple(layer for layer in self.layers if layer.function == function)

    def without(self, declined: Mapping[str, str]) -> PluginLayers:
        """The same with more functions declined, by name with the reason."""
        kept = tuple(layer for layer in self.layers if layer.function not in declined)
        return PluginLayers(kept, {**self.declined, **declined})


def plan_plugin_layers(model: ir.Model) -> PluginLayers:
    """Read the layers off a file's window functions. EngineError where a function's configuration is damaged."""
    layers: list[PluginLayer] = []
    declined: dict[str, str] = {}
    for function, key in window_functions(model):
        reason = _why_not(key)
        if reason is None:
            layers += _layers_of(key)
        else:
            declined[function.name] = reason
    return PluginLayers(tuple(layers), declined)


def _why_not(key: FunctionKey) -> str | None:
    """Why the kernel cannot take a function, or is no gain for it."""
    if key.args.pattern.is_full():
        return "it is full attention, for which TensorRT has kernels of its own"
    if key.dtype not in _DTYPES:
        return f"its dtype is {key.dtype}; the kernel's tensor cores take {' and '.join(_DTYPES)}"
    for name, depth in (("head dim", key.head_dim), ("value dim", key.value_dim)):
        if depth % 8 or not 16 <= depth <= MAX_HEAD_DIM:
            return f"its {name} is {depth}; the kernel takes multiples of 8 from 16 to {MAX_HEAD_DIM}"
    if key.mask is not None and key.mask.dtype not in _MASK_DTYPES:
        return f"its mask has dtype {key.mask.dtype}; the kernel takes {', '.join(_MASK_DTYPES)}"
    return None


def _layers_of(key: FunctionKey) -> Iterator[PluginLayer]:
    *before, last = window_launches(key)
    for launch in before:
        yield _layer(f"{key.name}_{launch.branch}", key, launch)
    yield _layer(f"{key.name}_mean" if last.averages else key.name, key, last)


def _layer(name: str, key: FunctionKey, launch: WindowLaunch) -> PluginLayer:
    *inputs, output = launch_tensors(key, launch)
    return PluginLayer(name, key.name, launch, tuple(inputs), output)


def with_plugin_nodes(model: ir.Model, plugins: PluginLayers) -> ir.Model:
    """A new model whose calls of the planned functions are plugin nodes; these functions are gone from it.

    Names, shapes and types of all outputs stay, so does every other node. Weights are shared with the given model,
    which is left as it is; external ones stay references. Raises EngineError where a call does not fit its function.
    """
    model = model.clone()
    names = {value.name for root in _roots(model) for value in _values(root)}
    for root in _roots(model):
        for node in list(ir.traversal.RecursiveGraphIterator(root)):
            layers = plugins.of(node.op_type) if node.domain == DOMAIN else ()
            if layers:
                _bind(node, layers, names)
    replaced = {layer.function for layer in plugins.layers}
    for identifier, function in list(model.functions.items()):
        if function.domain == DOMAIN and function.name in replaced:
            del model.functions[identifier]
    return model


def _roots(model: ir.Model) -> list[ir.Graph | ir.Function]:
    return [model.graph, *model.functions.values()]


def _values(root: ir.Graph | ir.Function) -> Iterator[ir.Value]:
    yield from root.inputs
    if isinstance(root, ir.Graph):
        yield from root.initializers.values()
    for node in ir.traversal.RecursiveGraphIterator(root):
        yield from node.outputs


def _bind(node: ir.Node, layers: tuple[PluginLayer, ...], names: set[str | None]) -> None:
    """Make the node the last of its function's layers, and put the others in front of it."""
    expected = layers[0].inputs
    given = list(node.inputs)
    if len(given) != len(expected) or None in given or len(node.outputs) != 1:
        raise EngineError(
            f"node '{node.name}' calls '{node.op_type}' with {len(given)} inputs and {len(node.outputs)} outputs; it "
            f"takes {', '.join(map(str, expected))} and gives one output: export the model again"
        )
    graph, (out,) = node.graph, node.outputs
    assert graph is not None
    _describe(out, layers[-1].output)
    *before, last = layers
    for layer in before:
        suffix = layer.name.removeprefix(layer.function)
        first = ir.node(
            layer.name, given, PLUGIN_ATTRIBUTES, domain=DOMAIN, name=f"{node.name or out.name}{suffix}", num_outputs=1
        )
        (value,) = first.outputs
        value.name = _new_name(f"{out.name}{suffix}", names)
        _describe(value, layer.output)
        graph.insert_before(node, first)
        node.resize_inputs(len(given) + 1)
        node.replace_input_with(len(given), value)
    node.op_type = last.name
    node.attributes.clear()
    for name, attribute in PLUGIN_ATTRIBUTES.items():
        node.attributes[name] = ir.convenience.convert_attribute(name, attribute)


def _new_name(name: str, names: set[str | None]) -> str:
    while name in names:
        name += "_"
    names.add(name)
    return name


def _describe(value: ir.Value, tensor: LaunchTensor) -> None:
    """Give the value a shape and a type where it has none: nobody can infer them from a plugin's node."""
    if value.shape is None:
        value.shape = ir.Shape(tensor.shape)
    if value.type is None:
        value.type = ir.TensorType(_DTYPES[tensor.dtype])
