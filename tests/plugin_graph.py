"""Evaluate a graph with plugin nodes as TensorRT would: every node is one launch of the kernel on plain buffers.

Run as a program under TRITON_INTERPRET=1 (Triton decides at import whether it interprets): GRAPH.onnx FUNCTIONS.onnx
INPUTS.npz OUTPUTS.npz. The launches are read from FUNCTIONS.onnx, the file before its calls became plugin nodes.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from t3compile.export.plugin_layers import PluginLayer, plan_plugin_layers
from t3compile.ops.window_kernel import window_attention_kernel
from t3compile.ops.window_launch import Tile

TILE = Tile(16, 16, 4, 1)


def run_layer(layer: PluginLayer, *inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """One launch on contiguous buffers in the order of the layer's inputs; elements that it leaves out are NaN."""
    assert [x.shape for x in inputs] == [tensor.shape for tensor in layer.inputs]
    assert [str(x.dtype) for x in inputs] == [tensor.dtype for tensor in layer.inputs]
    buffers = [torch.from_numpy(np.ascontiguousarray(x)) for x in inputs]
    q, k, v, *rest = buffers
    mask = rest.pop(0) if layer.launch.mask is not None else None
    other = rest.pop(0) if layer.launch.averages else None
    out = torch.full(layer.output.shape, float("nan"), dtype=q.dtype)
    grid = (layer.launch.programs(TILE),)
    window_attention_kernel[grid](q, k, v, mask, other, out, **layer.launch.constants(TILE))
    return out.numpy()


def operator(layer: PluginLayer) -> type[OpRun]:
    """The plugin as an operator of onnx's reference evaluator."""

    def run(self: OpRun, *inputs: Any, plugin_namespace: str = "", aot: int = 0) -> tuple[Any]:
        assert (plugin_namespace, aot) == ("t3", 1)
        return (run_layer(layer, *inputs),)

    return type(layer.name, (OpRun,), {"op_domain": "t3", "_run": run})


def main(graph: str, functions: str, inputs: str, outputs: str) -> None:
    layers = plan_plugin_layers(ir.load(functions)).layers
    evaluator = ReferenceEvaluator(onnx.load(graph), new_ops=[operator(layer) for layer in layers])
    with np.load(inputs) as given:
        results = evaluator.run(None, dict(given))
    np.savez(outputs, *results)


if __name__ == "__main__":
    main(*sys.argv[1:])
