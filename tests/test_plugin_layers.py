"""Plugin layers read off an ONNX file: what is planned and declined, and that plugin nodes compute what functions do.

The plugin nodes are evaluated by Triton's interpreter on the buffers that TensorRT would hand to the kernel; TensorRT
itself takes no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor, nn

from t3compile.errors import EngineError
from t3compile.execute import execute
from t3compile.export.plugin_layers import PluginLayer, plan_plugin_layers, with_plugin_nodes
from t3compile.export.window_function import CONFIGURATION_PROPERTY, FunctionKey, MaskKey
from t3compile.export.write_onnx import write_onnx
from t3compile.inputs import named_inputs
from t3compile.ops import WINDOW_ATTENTION, WindowAttentionArgs
from t3compile.ops.load_kernel import interpreted_kernel
from t3compile.ops.window_launch import MaskLayout, Tile
from t3compile.passes.legalize_window_attention import LegalizeWindowAttention
from t3compile.program import Program, trace
from tests.test_window_attention import MASKS, args_of, assert_as_good_as_plain, masked_of, reference, stream_qkv

_TYPES = {
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float32": onnx.TensorProto.FLOAT,
    "float64": onnx.TensorProto.DOUBLE,
    "bool": onnx.TensorProto.BOOL,
}
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
GRID = (2, 3, 5)
TILE = Tile(16, 16, 4, 1)
BATCH, HEADS, DEPTH, VALUE_DEPTH = 2, 3, 24, 16
JOINT = args_of(GRID, (1, 2, 2), prefix=2, suffix=3, query_suffix=1, scale=0.6)
# Each is a call with a function of its own: the op's arguments and the form of its mask.
CALLS: dict[str, tuple[WindowAttentionArgs, str | None]] = {
    "two branches": (args_of(GRID, (1, 2, 3)), None),
    "dilated alone": (args_of(GRID, (1, 3, 2), ("dilated",), suffix=2), None),
    "one partition, rows masked": (args_of(GRID, (2, 1, 1), prefix=3), "bool-rows"),
    "query stream, heads and rows masked": (JOINT, "float-heads-rows"),
}


class Calls(nn.Module):
    """Calls of the op, each on its part of the inputs, with a node before and one behind it."""

    def __init__(self, calls: Sequence[WindowAttentionArgs]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, *tensors: tuple[Tensor, ...]) -> list[Tensor]:
        outputs = []
        for args, (q, k, v, *mask) in zip(self.calls, tensors, strict=True):
            masked = dict(zip(["mask"], mask, strict=False))
            outputs.append(2 * WINDOW_ATTENTION(-q, k, v, *args.as_op_args(), **masked))
        return outputs


@dataclass(frozen=True)
class Case:
    program: Program
    inputs: dict[str, Tensor]
    path: Path


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    given = []
    for args, form in CALLS.values():
        tensors = list(stream_qkv(args, batch=BATCH, heads=HEADS, depth=DEPTH, value_depth=VALUE_DEPTH))
        if form is not None:
            tensors.append(masked_of(args, MASKS[form], batch=BATCH, heads=HEADS))
        given.append(tuple(x.half() if x.is_floating_point() else x for x in tensors))
    program = trace(Calls([args for args, _ in CALLS.values()]), tuple(given))
    path = tmp_path_factory.mktemp("plugin") / "model.onnx"
    write_onnx(LegalizeWindowAttention()(program).program, path)
    return Case(program, named_inputs(program), path)


def run_layer(layer: PluginLayer, *inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """One launch on contiguous buffers in the order of the layer's inputs; elements that it leaves out are NaN."""
    assert [(x.shape, str(x.dtype)) for x in inputs] == [(tensor.shape, tensor.dtype) for tensor in layer.inputs]
    q, k, v, *rest = (torch.from_numpy(np.ascontiguousarray(x)) for x in inputs)
    mask = rest.pop(0) if layer.launch.mask is not None else None
    other = rest.pop(0) if layer.launch.averages else None
    out = torch.full(layer.output.shape, float("nan"), dtype=q.dtype)
    programs = (layer.launch.programs(TILE),)
    interpreted_kernel()[programs](q, k, v, mask, other, out, **layer.launch.constants(TILE))
    return out.numpy()


def reference_operator(layer: PluginLayer) -> type[OpRun]:
    """The plugin as an operator of onnx's reference evaluator."""

    def run(self: OpRun, *inputs: Any, plugin_namespace: str = "", aot: int = 0) -> tuple[Any]:
        assert (plugin_namespace, aot) == ("t3", 1)
        return (run_layer(layer, *inputs),)

    return type(layer.name, (OpRun,), {"op_domain": "t3", "_run": run})


def save_checked(model: ir.Model, path: Path) -> onnx.ModelProto:
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(path, load_external_data=False)


def test_the_plugin_graph_computes_what_the_functions_do(case: Case, tmp_path: Path) -> None:
    plugins = plan_plugin_layers(ir.load(case.path))
    assert not plugins.declined
    graph = save_checked(with_plugin_nodes(ir.load(case.path), plugins), tmp_path / "plugins.onnx")
    assert not graph.functions
    arrays = {name: x.numpy() for name, x in case.inputs.items()}
    ours = ReferenceEvaluator(graph, new_ops=[reference_operator(layer) for layer in plugins.layers]).run(None, arrays)
    session = onnxruntime.InferenceSession(str(case.path), providers=["CPUExecutionProvider"])
    bodies = session.run(None, arrays)
    exact = execute(case.program, case.inputs, float64=True)
    for name, plugin, body, truth in zip(CALLS, ours, bodies, exact, strict=True):
        rounding = float(torch.finfo(torch.float16).eps * truth.abs().max())
        body_error = np.abs(body - truth.numpy()).max()
        # NaN, which the output holds before, is not below the limit.
        assert np.abs(plugin - truth.numpy()).max() <= 2 * body_error + rounding, name


def test_a_layer_per_computed_branch(case: Case) -> None:
    model = ir.load(case.path)
    plugins = plan_plugin_layers(model)
    two, dilated, one, stream = ([*plugins.of(name)] for _, name, _ in model.functions)
    branches = [[layer.launch.branch for layer in layers] for layers in (two, dilated, one, stream)]
    assert branches == [["local", "dilated"], ["dilated"], ["local"], ["local", "dilated"]]
    assert [layer.name for layer in two] == [f"{two[0].function}_local", f"{two[0].function}_mean"]
    assert dilated[0].name == dilated[0].function
    names = [[x.name for x in layer.inputs] for layer in (*two, one[0], *stream)]
    qkv = ["q", "k", "v"]
    assert names == [qkv, [*qkv, "other"], [*qkv, "mask"], [*qkv, "mask"], [*qkv, "mask", "other"]]
    assert all(layer.launch.inputs == len(layer.inputs) for layer in plugins.layers)


def file_of(keys: Sequence[FunctionKey], path: Path) -> ir.Model:
    """A file that calls a function per key twice, on the same inputs, the queries scaled by an external weight.

    The functions have a body in name only: plugin layers are read off their configuration.
    """
    inputs, outputs, nodes, weights = [], [], [], []
    for i, key in enumerate(keys):
        shapes = shapes_of(key)
        names = [f"{name}_{i}" for name in shapes]
        inputs += [_value_info(f"{name}_{i}", shape, dtype) for name, (shape, dtype) in shapes.items()]
        shape, dtype = shapes["q"]
        gain = bytes(_BYTES[dtype] * key.head_dim)
        weights.append(helper.make_tensor(f"weight_{i}", _TYPES[dtype], [key.head_dim], gain, raw=True))
        nodes.append(helper.make_node("Mul", [names[0], f"weight_{i}"], [f"scaled_{i}"]))
        for call in range(2):
            made = f"out_{i}_{call}"
            nodes.append(
                helper.make_node(key.name, [f"scaled_{i}", *names[1:]], [made], f"site_{i}_{call}", domain="t3")
            )
            outputs.append(_value_info(made, (*shape[:3], key.value_dim), dtype))
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    functions = [_function(key) for key in keys]
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("t3", 1)]
    model = helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)
    ir.save(ir.from_proto(model), path, external_data="weights.data", size_threshold_bytes=0)
    return ir.load(path)


def shapes_of(key: FunctionKey) -> dict[str, tuple[tuple[int, ...], str]]:
    q, k, v = (
        (key.batch, key.heads, key.args.query_tokens, key.head_dim),
        (key.batch, key.key_heads, key.args.tokens, key.head_dim),
        (key.batch, key.key_heads, key.args.tokens, key.value_dim),
    )
    shapes = {"q": (q, key.dtype), "k": (k, key.dtype), "v": (v, key.dtype)}
    return shapes if key.mask is None else {**shapes, "mask": (key.mask.shape, key.mask.dtype)}


def _value_info(name: str, shape: Sequence[int], dtype: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _TYPES[dtype], shape)


def _function(key: FunctionKey) -> onnx.FunctionProto:
    names = list(shapes_of(key))
    body = [helper.make_node("Identity", ["q"], ["out"])]
    function = helper.make_function("t3", key.name, names, ["out"], body, [helper.make_opsetid("", 23)])
    function.metadata_props.add(key=CONFIGURATION_PROPERTY, value=key.dumps())
    return function


PLAIN = FunctionKey(args_of(GRID, (1, 2, 3)), 1, 4, 32, 32, "float16", "attention")
GROUPED = replace(PLAIN, args=JOINT, batch=2, dtype="bfloat16", key_heads=2, mask=MaskKey((2, 1, 1, 35), "bool"))
ONE_BRANCH = replace(PLAIN, args=args_of(GRID, (2, 1, 1)))


def test_nodes_are_replaced_in_place(tmp_path: Path) -> None:
    keys = [PLAIN, GROUPED, ONE_BRANCH, replace(PLAIN, dtype="float32")]
    model = file_of(keys, tmp_path / "model.onnx")
    before = ir.to_proto(model)
    plugins = plan_plugin_layers(model)
    assert list(plugins.declined) == [keys[3].name]
    graph = save_checked(with_plugin_nodes(model, plugins), tmp_path / "plugins.onnx")
    assert ir.to_proto(model) == before
    assert [function.name for function in graph.functions] == [keys[3].name]
    assert graph.graph.input == before.graph.input
    assert graph.graph.output == before.graph.output
    assert graph.graph.initializer == before.graph.initializer
    assert all(weight.data_location == onnx.TensorProto.EXTERNAL for weight in graph.graph.initializer)
    nodes = [node for node in graph.graph.node if node.domain == "t3"]
    kept, planned = nodes[-2:], nodes[:-2]
    assert [node.op_type for node in kept] == 2 * [keys[3].name]
    expected = []
    for key in keys[:3]:
        suffixes = ["_local", "_mean"] if key is not ONE_BRANCH else [""]
        expected += 2 * [f"{key.name}{suffix}" for suffix in suffixes]
    assert [node.op_type for node in planned] == expected
    for node in planned:
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert given == {"plugin_namespace": b"t3", "aot": 1}
    first, second = planned[:2]
    assert list(second.input) == [*first.input, first.output[0]]
    assert (first.name, second.name, list(second.output)) == ("site_0_0_local", "site_0_0", ["out_0_0"])
    (middle,) = [value for value in graph.graph.value_info if value.name == first.output[0]]
    sizes = [size.dim_value for size in middle.type.tensor_type.shape.dim]
    assert (sizes, middle.type.tensor_type.elem_type) == ([1, 4, 30, 32], onnx.TensorProto.FLOAT16)


def test_the_launch_describes_grouped_queries_and_masks(tmp_path: Path) -> None:
    first, second = plan_plugin_layers(file_of([GROUPED], tmp_path / "model.onnx")).layers
    assert [str(x) for x in second.inputs] == [
        "q [2, 4, 33, 32] bfloat16",
        "k [2, 2, 35, 32] bfloat16",
        "v [2, 2, 35, 32] bfloat16",
        "mask [2, 1, 1, 35] bool",
        "other [2, 4, 33, 32] bfloat16",
    ]
    launch = second.launch
    assert (launch.heads, launch.key_heads) == (4, 2)
    assert (launch.k.batch, launch.k.head, launch.k.token) == (2 * 35 * 32, 35 * 32, 32)
    assert launch.mask == MaskLayout("bool", batch=35, head=0, query=0, key=1)
    assert replace(first.launch, branch="dilated", averages=True) == launch


def test_layers_of_grouped_queries_compute_attention(tmp_path: Path) -> None:
    key = replace(GROUPED, dtype="float16")
    local, mean = plan_plugin_layers(file_of([key], tmp_path / "model.onnx")).layers
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(x.shape, generator=generator).half() for x in local.inputs[:3])
    mask = masked_of(key.args, MASKS["bool-keys"], batch=key.batch)
    given = [x.numpy() for x in (q, k, v, mask)]
    ours = run_layer(mean, *given, run_layer(local, *given))
    # Query heads 0 and 1 read key head 0.
    exact, plain = (
        reference(q.to(dtype), *(x.to(dtype).repeat_interleave(2, 1) for x in (k, v)), key.args, mask=mask)
        for dtype in (torch.float64, torch.float16)
    )
    assert_as_good_as_plain(torch.from_numpy(ours), [plain], exact)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((35,), (0, 0, 0, 1)),
        ((33, 35), (0, 0, 35, 1)),
        ((2, 4, 33, 1), (132, 33, 1, 0)),
        ((1, 4, 1, 35), (0, 35, 0, 1)),
        ((), (0, 0, 0, 0)),
    ],
)
def test_strides_of_a_mask(shape: tuple[int, ...], strides: tuple[int, ...], tmp_path: Path) -> None:
    key = replace(GROUPED, mask=MaskKey(shape, "float32"))
    layer = plan_plugin_layers(file_of([key], tmp_path / "model.onnx")).layers[0]
    assert layer.launch.mask == MaskLayout("float32", *strides)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (replace(PLAIN, dtype="float32"), "its dtype is float32; the kernel's tensor cores take float16 and bfloat16"),
        (replace(PLAIN, args=args_of(GRID, (1, 1, 1))), "it is full attention"),
        (replace(PLAIN, head_dim=320), "its head dim is 320"),
        (replace(PLAIN, head_dim=36), "its head dim is 36; the kernel takes multiples of 8 from 16 to 256"),
        (replace(PLAIN, value_dim=8), "its value dim is 8"),
        (replace(GROUPED, mask=MaskKey((35,), "float64")), "its mask has dtype float64"),
    ],
)
def test_what_the_kernel_cannot_take_is_declined(key: FunctionKey, reason: str, tmp_path: Path) -> None:
    model = file_of([key], tmp_path / "model.onnx")
    plugins = plan_plugin_layers(model)
    assert plugins.layers == ()
    assert plugins.declined[key.name].startswith(reason)
    assert ir.to_proto(with_plugin_nodes(model, plugins)) == ir.to_proto(model)


def test_functions_declined_later_keep_their_nodes(tmp_path: Path) -> None:
    plugins = plan_plugin_layers(file_of([PLAIN, ONE_BRANCH], tmp_path / "model.onnx"))
    fewer = plugins.without({PLAIN.name: "no tile fits"})
    assert [layer.function for layer in fewer.layers] == [ONE_BRANCH.name]
    assert fewer.declined == {PLAIN.name: "no tile fits"}


def test_a_call_that_does_not_fit_its_function_is_refused(tmp_path: Path) -> None:
    model = file_of([GROUPED], tmp_path / "model.onnx")
    plugins = plan_plugin_layers(model)
    node = next(node for node in model.graph if node.name == "site_0_1")
    node.resize_inputs(3)
    with pytest.raises(EngineError, match=r"node 'site_0_1' calls .* with 3 inputs .* takes q \[2, 4, 33, 32\]"):
        with_plugin_nodes(model, plugins)
