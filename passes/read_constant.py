"""Read the number that a graph's node always is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from t3compile.passes.graph_pass import is_call

aten = torch.ops.aten

_MAX_DEPTH = 16


def constants_of(exported: ExportedProgram) -> dict[str, Tensor]:
    """The program's constant tensors by placeholder name; weights are none."""
    constants: dict[str, Tensor] = {}
    for spec in exported.graph_signature.input_specs:
        value = exported.constants.get(str(spec.target)) if spec.kind == InputKind.CONSTANT_TENSOR else None
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            constants[spec.arg.name] = value
    return constants


def constant_of(value: object, constants: Mapping[str, Tensor]) -> float | None:
    """The number that an argument stands for: a Python number, or a tensor that repeats one constant."""
    if isinstance(value, bool) or not isinstance(value, int | float | fx.Node):
        return None
    if not isinstance(value, fx.Node):
        return float(value)
    return _read(value, constants, _MAX_DEPTH)


def _read(node: fx.Node, constants: Mapping[str, Tensor], depth: int) -> float | None:
    if node.op == "placeholder":
        held = constants.get(node.name)
        return float(held.item()) if held is not None and held.numel() == 1 else None
    if node.op != "call_function" or depth == 0:
        return None
    if is_call(node, aten.full, aten.full_like, aten.new_full):
        fill = node.args[2] if is_call(node, aten.new_full) else node.args[1]
        return float(fill) if isinstance(fill, int | float) else None
    if is_call(node, aten.scalar_tensor):
        number = node.args[0]
        return float(number) if isinstance(number, int | float) else None
    if is_call(node, *_COPIES):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return _read(source, constants, depth - 1)
    if is_call(node, *_ARITHMETIC):
        numbers = []
        for argument in node.args:
            number = _read(argument, constants, depth - 1) if isinstance(argument, fx.Node) else argument
            if not isinstance(number, int | float):
                return None
            numbers.append(torch.tensor(float(number), dtype=torch.float64))
        packet = getattr(node.target, "overloadpacket", None)
        assert packet is not None
        return None if node.kwargs else float(packet(*numbers))
    return None


_COPIES = (
    aten.clone,
    aten.contiguous,
    aten.alias,
    aten.detach,
    aten.lift_fresh_copy,
    aten._to_copy,
    aten.to,
    aten.view,
    aten.reshape,
    aten.expand,
    aten.unsqueeze,
    aten.squeeze,
)
_ARITHMETIC = (aten.mul, aten.div, aten.add, aten.sub, aten.neg, aten.sqrt, aten.rsqrt, aten.reciprocal, aten.pow)
