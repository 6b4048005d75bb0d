"""What TensorRT made of the attention sites, read from the engine inspector's JSON.

No engine was inspected where this was written. The rules come from TensorRT's samples and from reports: a layer is
an object with "Name", "LayerType", "TacticName" and "Metadata"; the parser puts "[ONNX Layer: NODE]" into the
metadata of a layer, or "[ONNX Layer: NODE | Local Function: FUNCTION]" inside a function; fused layers hold several
such entries; fused attention has "mha" or "attention" in its type, or a generated name or kernel such as
"_gemm_mha_v2_myl0_17"; plugins have "Plugin" in their type. Names alone say little, as ONNX nodes are called
"attention" too. Nodes of a function have the same names at every call, so fused attention within functions can be
counted per function only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from t3compile.export.window_function import DOMAIN, OP_TYPE

_FUSED_TYPE = re.compile(r"mha|attention", re.IGNORECASE)
_FUSED_KERNEL = re.compile(r"_mha_v\d|fmha|flash_?attention", re.IGNORECASE)
_ENTRY = re.compile(r"\[ONNX Layer: ([^\]|]*?)\s*(?:\|([^\]]*))?\]")


@dataclass(frozen=True)
class AttentionNode:
    """One attention in a network: a site's call of a window function, its plugin nodes, or a plain Attention node.

    ``layers`` are the names that must be seen in the engine: of plugin nodes with ``lowering`` "plugin", else
    ``attentions`` fused layers are expected for the node.
    """

    site: str
    function: str
    lowering: Literal["plugin", "native"]
    layers: tuple[str, ...] = ()
    attentions: int = 1


def attention_nodes(model: ir.Model) -> tuple[AttentionNode, ...]:
    """The attention of a model without plugin nodes, in graph order: calls of window functions and Attention nodes."""
    inside = {
        function.name: max(1, sum(node.op_type in ("Attention", "Softmax") for node in function))
        for function in model.functions.values()
        if function.domain == DOMAIN
    }
    found = []
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type.startswith(f"{OP_TYPE}_"):
            name = node.name or node.outputs[0].name or node.op_type
            found.append(AttentionNode(name, node.op_type, "native", attentions=inside.get(node.op_type, 1)))
        elif node.domain == "" and node.op_type == "Attention":
            found.append(AttentionNode(node.name or "Attention", "", "native"))
    return tuple(found)


@dataclass(frozen=True)
class LayerCheck:
    """How many of the attention nodes were found as expected, and a sentence for each group that was not."""

    layers: int
    expected: int
    found: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "attention_expected": self.expected,
            "attention_found": self.found,
            "warnings": list(self.warnings),
        }


def check_layers(text: str, nodes: Sequence[AttentionNode]) -> LayerCheck:
    """Compare the inspector's JSON with the network's attention: one fused layer or all plugin layers per node."""
    try:
        layers = [_Layer.read(entry) for entry in json.loads(text)["Layers"]]
    except (AttributeError, KeyError, TypeError, ValueError):
        warning = "the engine inspector's JSON cannot be read: whether attention was fused is unknown"
        return LayerCheck(0, len(nodes), 0, (warning,))
    warnings: list[str] = []
    found = 0
    for node in nodes:
        if node.lowering == "plugin":
            missing = [name for name in node.layers if not any(layer.is_plugin(name) for layer in layers)]
            if missing:
                warnings.append(f"site '{node.site}': no plugin layer {', '.join(map(repr, missing))} in the engine")
            found += not missing
    for function, sites in _by_function(nodes).items():
        wanted = sum(site.attentions for site in sites)
        fused = sum(layer.fused_in(function, sites[0].site) for layer in layers)
        if fused >= wanted:
            found += len(sites)
            continue
        named = ", ".join(repr(site.site) for site in sites)
        where = f"attention {named}" if function.startswith(_ALONE) else f"function '{function}' of sites {named}"
        warnings.append(f"{where}: {fused} fused attention layers in the engine, expected {wanted}; it may be slow")
        found += len(sites) * fused // wanted
    return LayerCheck(len(layers), len(nodes), found, tuple(warnings))


def _by_function(nodes: Sequence[AttentionNode]) -> Mapping[str, list[AttentionNode]]:
    """Native sites per function; a plain Attention node is a group of its own."""
    groups: dict[str, list[AttentionNode]] = {}
    for node in nodes:
        if node.lowering == "native":
            groups.setdefault(node.function or f"{_ALONE}{node.site}", []).append(node)
    return groups


_ALONE = "\0"


@dataclass(frozen=True)
class _Layer:
    name: str
    kind: str
    tactic: str
    # (node, function) as the metadata name them; the function is empty outside of one.
    origins: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, entry: Any) -> _Layer:
        if isinstance(entry, str):  # a profiling verbosity that lists names alone
            return cls(entry, "", "", ())
        metadata = str(entry.get("Metadata", ""))
        origins = tuple((m.group(1).strip(), m.group(2) or "") for m in _ENTRY.finditer(metadata))
        return cls(str(entry["Name"]), str(entry.get("LayerType", "")), str(entry.get("TacticName", "")), origins)

    def is_plugin(self, node: str) -> bool:
        named = any(origin == node for origin, _ in self.origins) or node in self.name.split(" + ")
        return named and "plugin" in self.kind.lower()

    def fused_in(self, function: str, site: str) -> bool:
        """Whether it is fused attention of a function, or of the plain node ``site``."""
        if not (_FUSED_TYPE.search(self.kind) or _FUSED_KERNEL.search(self.tactic) or _FUSED_KERNEL.search(self.name)):
            return False
        if function.startswith(_ALONE):
            # Spelled for an older parser, the node became several named "site/...".
            return any(not inside and f"{origin}/".startswith(f"{site}/") for origin, inside in self.origins)
        return any(function in inside for _, inside in self.origins)
