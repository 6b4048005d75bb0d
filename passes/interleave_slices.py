"""Write alternating slices as one stack: what RoPE makes by filling every second element of an empty tensor.

Exporters turn slice_scatter into ScatterND over an index tensor as large as the data.

Input graph:
    e = aten.empty_like(x)
    s = aten.slice_scatter(e, a, dim, 0, None, 2)
    out = aten.slice_scatter(s, b, dim, 1, None, 2)
Output graph:
    out = aten.reshape(aten.stack([a, b], dim + 1), shape of x)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from t3compile.passes.graph_pass import Cursor, GraphPass, is_call, replace_node
from t3compile.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class _Write:
    """One slice_scatter: which residue of which axis it fills, and with what."""

    base: Any
    source: fx.Node
    dim: int
    start: int
    step: int


@dataclass(frozen=True)
class InterleaveSlices(GraphPass):
    """Replace chains of slice_scatter that fill every residue of an axis exactly once."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        modified = False
        for node in list(graph_module.graph.nodes):
            writes = _complete_chain(node)
            if writes is None:
                continue
            _interleave(node, writes)
            modified = True
        return modified


def _read(node: Any) -> _Write | None:
    """The slice_scatter at `node`, if it writes to the axis' end with a step of at least two."""
    if not is_call(node, aten.slice_scatter):
        return None
    named = dict(zip(("dim", "start", "end", "step"), node.args[2:], strict=False)) | dict(node.kwargs)
    shape = node.meta["val"].shape
    dim = named.get("dim", 0) % len(shape)
    start, end, step = slice(named.get("start"), named.get("end"), named.get("step", 1)).indices(shape[dim])
    if step < 2 or end != shape[dim] or start >= step or shape[dim] % step:
        return None
    return _Write(node.args[0], node.args[1], dim, start, step)


def _complete_chain(node: fx.Node) -> list[_Write] | None:
    """The writes that end at `node`, if together they fill the axis; sorted by residue."""
    last = _read(node)
    if last is None:
        return None
    writes = [last]
    while len(writes) < last.step:
        write = _read(writes[-1].base)
        if write is None or (write.dim, write.step) != (last.dim, last.step):
            return None
        writes.append(write)
    writes.sort(key=lambda write: write.start)
    if [write.start for write in writes] != list(range(last.step)):
        return None
    dtype = node.meta["val"].dtype
    return writes if all(write.source.meta["val"].dtype == dtype for write in writes) else None


def _interleave(node: fx.Node, writes: list[_Write]) -> None:
    cursor = Cursor(node)
    shape = list(node.meta["val"].shape)
    part = list(shape)
    part[writes[0].dim] //= writes[0].step
    sources = [
        write.source
        if list(write.source.meta["val"].shape) == part
        else cursor.call(aten.expand.default, write.source, part)
        for write in writes
    ]
    stacked = cursor.call(aten.stack.default, sources, writes[0].dim + 1)
    replace_node(node, cursor.call(aten.reshape.default, stacked, shape))
