"""Compute once the matrix factorizations of weights: ONNX has no QR, SVD or inverse.

Input graph:
    y = aten.add(weight, 1e-8)
    q, r = aten.linalg_qr(y)
    out = aten.matmul(x, q)
Output graph:
    out = aten.matmul(x, c)                                           c: the constant q
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from t3compile.passes.fold_constants import compute_constant, is_pure, known_values
from t3compile.passes.graph_pass import GraphPass, insert_constant
from t3compile.program import Program

# linalg calls that are sums and products, which ONNX has.
_PLAIN = ("aten::linalg_vector_norm", "aten::linalg_matrix_norm", "aten::linalg_norm", "aten::linalg_cross")
_OLD_NAMES = ("aten::qr", "aten::svd", "aten::_linalg_svd", "aten::inverse", "aten::cholesky", "aten::pinverse")


@dataclass(frozen=True)
class FoldFactorizations(GraphPass):
    """Replace linear algebra that depends on weights and constants only by its values."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        graph = graph_module.graph
        ends = [node for node in graph.nodes if _is_factor(node) and node.users]
        if not ends:
            return False
        known = known_values(graph, program)
        names = _weight_names(graph, program)
        fixed: set[fx.Node] = {*known, *names}
        for node in graph.nodes:
            if is_pure(node) and all(used in fixed for used in node.all_input_nodes):
                fixed.add(node)
        folded = [node for node in ends if node in fixed]
        for node in folded:
            for used in _weights_behind(node, names):
                if used not in known:
                    known[used] = program.weights.load(names[used]).detach()
            insert_constant(node, compute_constant(node, known))
        return bool(folded)


def _is_factor(node: fx.Node) -> bool:
    """A tensor that a factorization returns, alone or as one of several."""
    if not isinstance(node.meta.get("val"), Tensor):
        return False
    source: Any = node.args[0] if node.target is operator.getitem else node
    schema = getattr(source.target, "_schema", None)
    name = "" if schema is None else str(schema.name)
    return (name.startswith(("aten::linalg_", "aten::_linalg_")) or name in _OLD_NAMES) and name not in _PLAIN


def _weight_names(graph: fx.Graph, program: Program) -> dict[fx.Node, str]:
    specs = {spec.arg.name: spec for spec in program.exported.graph_signature.input_specs}
    named = {}
    for node in graph.nodes:
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if spec is not None and spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.persistent is not False:
            named[node] = str(spec.target)
    return named


def _weights_behind(node: fx.Node, names: Mapping[fx.Node, str]) -> Iterator[fx.Node]:
    pending, seen = [node], {node}
    while pending:
        for used in pending.pop().all_input_nodes:
            if used in seen:
                continue
            seen.add(used)
            if used in names:
                yield used
            else:
                pending.append(used)
