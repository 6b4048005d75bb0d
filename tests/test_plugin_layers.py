"""Plugin layers from an ONNX file: what is planned and declined, and that the graph with plugin nodes computes the same.

The nodes are evaluated by Triton's interpreter; TensorRT takes no part.
"""

from __future__ import annotations

import os
import subprocess
import sys
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
from torch import Tensor, nn

from t3compile.errors import EngineError
from t3compile.execute import execute
from t3compile.export.plugin_layers import PluginLayers, plan_plugin_layers, with_plugin_nodes
from t3compile.export.window_function import FunctionKey, MaskKey
from t3compile.export.write_onnx import write_onnx
from t3compile.inputs import named_inputs
from t3compile.ops import WINDOW_ATTENTION, WindowAttentionArgs
from t3compile.passes.legalize_window_attention import LegalizeWindowAttention
from t3compile.program import Program, trace
from tests.tensorrt_bindings import ROOT
from tests.test_window_attention import MASKS, args_of, masked_of, stream_qkv

GRID = (2, 3, 5)
JOINT = args_of(GRID, (1, 2, 2), prefix=2, suffix=3, scale=0.6)
# Each is a call with a function of its own: the op's arguments and the form of its mask.
CALLS: dict[str, tuple[WindowAttentionArgs, str | None]] = {
    "uneven": (args_of(GRID, (1, 2, 3)), None),
    "one partition": (args_of(GRID, (2, 1, 1), suffix=4), None),
    "dilated alone": (args_of(GRID, (1, 3, 2), ("dilated",)), None),
    "keys masked": (JOINT, "bool-keys"),
    "rows masked": (replace(JOINT, query_suffix=1), "float-heads-rows"),
    "two axes": (replace(JOINT, scale=None), "float-two-axes"),
    "own queries": (replace(JOINT, query_prefix=0, query_suffix=0), None),
    "one branch masked": (args_of(GRID, (2, 1, 1), prefix=3), "bool-rows"),
}
TWO_BRANCHES = {"uneven", "keys masked", "rows masked", "two axes", "own queries"}
BATCH, HEADS, DEPTH, VALUE_DEPTH = 2, 3, 24, 16


class Calls(nn.Module):
    """Calls of the op, each on its part of the inputs and with a weight before and a node behind it."""

    def __init__(self, calls: Sequence[WindowAttentionArgs], depth: int = DEPTH) -> None:
        super().__init__()
        self.calls = calls
        self.gain = nn.Parameter(1 + torch.arange(depth) / 64)

    def forward(self, *tensors: tuple[Tensor, ...]) -> list[Tensor]:
        outputs = []
        for args, (q, *given) in zip(self.calls, tensors, strict=True):
            mask = {"mask": given[2]} if len(given) > 2 else {}
            outputs.append(2 * WINDOW_ATTENTION(q * self.gain, *given[:2], *args.as_op_args(), **mask))
        return outputs


@dataclass(frozen=True)
class Case:
    program: Program
    inputs: dict[str, Tensor]
    path: Path

    @property
    def model(self) -> ir.Model:
        return ir.load(self.path)


def make_case(
    calls: Sequence[tuple[WindowAttentionArgs, str | None]],
    path: Path,
    dtype: torch.dtype = torch.float16,
    depth: int = DEPTH,
) -> Case:
    """An ONNX file of these calls, its program and inputs."""
    given = []
    for args, form in calls:
        tensors = list(stream_qkv(args, batch=BATCH, heads=HEADS, depth=depth, value_depth=VALUE_DEPTH))
        if form is not None:
            tensors.append(masked_of(args, MASKS[form], batch=BATCH, heads=HEADS))
        given.append(tuple(x.to(dtype) if x.is_floating_point() else x for x in tensors))
    module = Calls([args for args, _ in calls], depth).to(dtype)
    program = trace(module, tuple(given))
    write_onnx(LegalizeWindowAttention()(program).program, path)
    return Case(program, named_inputs(program), path)


def run_plugin_graph(case: Case, graph: Path, folder: Path) -> list[Tensor]:
    np.savez(folder / "inputs.npz", **{name: x.numpy() for name, x in case.inputs.items()})
    files = [str(x) for x in (graph, case.path, folder / "inputs.npz", folder / "outputs.npz")]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.plugin_graph", *files],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    with np.load(folder / "outputs.npz") as results:
        return [torch.from_numpy(x) for x in results.values()]


def save_plugin_graph(case: Case, plugins: PluginLayers) -> Path:
    path = case.path.with_name("plugins.onnx")
    ir.save(with_plugin_nodes(case.model, plugins), path)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def test_the_plugin_graph_computes_what_the_functions_do(tmp_path: Path) -> None:
    case = make_case(list(CALLS.values()), tmp_path / "model.onnx")
    plugins = plan_plugin_layers(case.model)
    assert not plugins.declined
    graph = save_plugin_graph(case, plugins)
    assert not ir.load(graph).functions
    ours = run_plugin_graph(case, graph, tmp_path)
    session = onnxruntime.InferenceSession(str(case.path), providers=["CPUExecutionProvider"])
    bodies = session.run(None, {name: x.numpy() for name, x in case.inputs.items()})
    exact = execute(case.program, case.inputs, float64=True)
    for name, plugin, body, reference in zip(CALLS, ours, bodies, exact, strict=True):
        rounding = torch.finfo(torch.float16).eps * reference.abs().max()
        body_error = (torch.from_numpy(body).double() - reference).abs().max()
        # NaN, which the output holds before, is no number below the limit.
        assert (plugin.double() - reference).abs().max() <= 2 * body_error + rounding, name


def test_a_layer_per_computed_branch(tmp_path: Path) -> None:
    case = make_case(list(CALLS.values()), tmp_path / "model.onnx")
    plugins = plan_plugin_layers(case.model)
    functions = [function.name for function in case.model.functions.values()]
    for call, function in zip(CALLS, functions, strict=True):
        layers = plugins.of(function)
        masked = ["mask"] if CALLS[call][1] is not None else []
        if call in TWO_BRANCHES:
            assert [layer.name for layer in layers] == [f"{function}_local", f"{function}_mean"]
            assert [layer.launch.branch for layer in layers] == ["local", "dilated"]
            assert [x.name for x in layers[1].inputs] == ["q", "k", "v", *masked, "other"]
        else:
            assert [layer.name for layer in layers] == [function]
        assert [x.name for x in layers[0].inputs] == ["q", "k", "v", *masked]
        assert [layer.launch.inputs for layer in layers] == [len(layer.inputs) for layer in layers]
    assert [layer.launch.branch for layer in plugins.of(functions[2])] == ["dilated"]


def test_names_shapes_weights_and_the_given_model_stay(tmp_path: Path) -> None:
    case = make_case([CALLS["uneven"], CALLS["keys masked"]], tmp_path / "model.onnx", depth=1024 * 2)
    model = case.model
    before = ir.serde.serialize_model(model)
    plugins = plan_plugin_layers(ir.load(case.path))
    assert set(plugins.declined.values()) == {"its head dim is 2048; the kernel takes multiples of 8 from 16 to 256"}
    plugins = plan_plugin_layers(_with_small_heads(model))
    assert plugins.layers
    assert ir.serde.serialize_model(model) == before


def _with_small_heads(model: ir.Model) -> ir.Model:
    raise NotImplementedError
