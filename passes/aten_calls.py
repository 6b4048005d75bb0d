"""A call of one of aten's operators, read from its node: name, arguments, sizes, what it yields when carried out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

_SAME_AS = {
    "_to_copy": "to",
    "type_as": "to",
    "_unsafe_view": "view",
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "not_equal": "ne",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "negative": "neg",
    "absolute": "abs",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "unsafe_split": "split",
    "unsafe_split_with_sizes": "split_with_sizes",
    "unsafe_chunk": "chunk",
}


def operator_name(node: fx.Node) -> str | None:
    """The operator's name without namespace and overload, for aten's own."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    packet: str = target.overloadpacket.__name__
    if target._overloadname == "other" and packet in ("max", "min"):
        return f"{packet}imum"
    return _SAME_AS.get(packet, packet)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The call's arguments by the schema's names, defaults included."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    named: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        if i < len(node.args) and not argument.kwarg_only:
            named[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            named[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            named[argument.name] = argument.default_value
    return named


def element_counts(node: fx.Node) -> Iterable[int]:
    """How many elements each tensor has that the call yields."""
    return (x.numel() for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, Tensor))


def node_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape, static, of the one tensor that a node yields."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return tuple(int(size) for size in value.shape)


def replaced(node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The call's arguments with values in place of nodes."""
    args, kwargs = pytree.tree_map_only(fx.Node, lambda used: values.get(used, used), (node.args, node.kwargs))
    return list(args), dict(kwargs)


def carry_out(node: fx.Node, known: Mapping[fx.Node, Tensor], pointwise: bool = False) -> Any:
    """What the call yields on real tensors, on the CPU; None where torch refuses.

    ``pointwise``: the operands are columns of elements, to which memory formats do not apply.
    """
    args, kwargs = replaced(node, known)
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    if pointwise:
        kwargs.pop("memory_format", None)
    args = [torch.device("cpu") if isinstance(x, torch.device) else x for x in args]
    assert callable(node.target)
    try:
        return node.target(*args, **kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError):
        return None
