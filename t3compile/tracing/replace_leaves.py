"""Attention libraries' functions as leaves of an fx graph -> scaled_dot_product_attention.

Recognised by name: the libraries need not be installed. A call with an argument that plain attention has no word for
(a sliding window, softcap, ALiBi, dropout, returned log-sum-exp) is left as it is, with a note.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention

from t3compile.errors import TraceError

_FLASH_OPTIONS = (
    "dropout_p",
    "softmax_scale",
    "causal",
    "window_size",
    "softcap",
    "alibi_slopes",
    "deterministic",
    "return_attn_probs",
)
_VARLEN = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_XFORMERS = ("q", "k", "v", "mask", "dropout_p", "softmax_scale")
_SAGE = ("q", "k", "v", "tensor_layout", "causal")

# Values under which an argument changes nothing; arguments of speed and precision may have any.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "dropout_p": (0, 0.0),
    "p": (0, 0.0),
    "window_size": ((-1, -1), [-1, -1], (None, None), None),
    "softcap": (0, 0.0, None),
    "alibi_slopes": (None,),
    "return_attn_probs": (False,),
    "return_softmax_lse": (False,),
    "return_lse": (False,),
    "qv": (None,),
    "q_descale": (None,),
    "k_descale": (None,),
    "v_descale": (None,),
    "attention_chunk": (0, None),
    "output_dtype": (None,),
    "block_table": (None,),
    "learnable_sink": (None,),
}
_HONOURED = frozenset({"q", "k", "v", "qkv", "kv", "mask", "softmax_scale", "causal", "tensor_layout", *_VARLEN[3:]})
_INDIFFERENT = frozenset(
    {
        "deterministic",
        "op",
        "num_splits",
        "pack_gqa",
        "sm_margin",
        "smooth_k",
        "smooth_v",
        "qk_quant_gran",
        "pv_accum_dtype",
        "quantization_backend",
    }
)
_RENAMED = {"query": "q", "key": "k", "value": "v", "attn_bias": "mask", "p": "dropout_p", "scale": "softmax_scale"}
_RENAMED |= {"sm_scale": "softmax_scale", "is_causal": "causal"}


def attend_heads_last(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention over [B, S, N, D], or [B, S, D] with one head; fewer heads of k and v are shared by groups of q's.

    Raises TraceError for causal attention of unlike lengths, which libraries align at the end and torch at the start.
    """
    if q.dim() == 3:
        mask = mask.unsqueeze(1) if isinstance(mask, Tensor) and mask.dim() == 3 else mask
        q, k, v = (x.unsqueeze(2) for x in (q, k, v))
        return attend_heads_last(q, k, v, mask, softmax_scale, causal).squeeze(2)
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
    return attend_heads_first(q, k, v, mask, softmax_scale, causal).transpose(-2, -3)


def attend_heads_first(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention over [B, N, S, D]; see attend_heads_last."""
    if causal and q.shape[-2] != k.shape[-2]:
        raise TraceError(
            f"causal attention of {q.shape[-2]} queries on {k.shape[-2]} keys is aligned at the end by its library and "
            "at the start by torch: give the mask as a tensor"
        )
    if mask is not None and not isinstance(mask, Tensor):
        raise TraceError(f"attn_bias is {type(mask).__name__}, expected a tensor or None: give it as a tensor")
    return scaled_dot_product_attention(
        q, k, v, mask, 0.0, causal, scale=softmax_scale, enable_gqa=q.shape[-3] != k.shape[-3]
    )


def _attend_packed(qkv: Tensor, softmax_scale: float | None = None, causal: bool = False) -> Tensor:
    """[B, S, 3, N, D]"""
    q, k, v = qkv.unbind(2)
    return attend_heads_last(q, k, v, None, softmax_scale, causal)


def _attend_packed_keys(q: Tensor, kv: Tensor, softmax_scale: float | None = None, causal: bool = False) -> Tensor:
    """[B, S, N, D] and [B, S, 2, N, D]"""
    k, v = kv.unbind(2)
    return attend_heads_last(q, k, v, None, softmax_scale, causal)


def _attend_one_sequence(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    """[S, N, D]"""
    q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    return attend_heads_last(q, k, v, None, softmax_scale, causal).squeeze(0)


@dataclass(frozen=True)
class _Leaf:
    """A library function: the order of its arguments, and what computes the same."""

    parameters: tuple[str, ...]
    attend: Callable[..., Tensor]
    defaults: Mapping[str, Any] = field(default_factory=dict)


_LEAVES: dict[str, _Leaf] = {
    "flash_attn_func": _Leaf(("q", "k", "v", *_FLASH_OPTIONS), attend_heads_last),
    "flash_attn_qkvpacked_func": _Leaf(("qkv", *_FLASH_OPTIONS), _attend_packed),
    "flash_attn_kvpacked_func": _Leaf(("q", "kv", *_FLASH_OPTIONS), _attend_packed_keys),
    "flash_attn_varlen_func": _Leaf((*_VARLEN, *_FLASH_OPTIONS), _attend_one_sequence),
    "memory_efficient_attention": _Leaf(_XFORMERS, attend_heads_last),
    "memory_efficient_attention_forward": _Leaf(_XFORMERS, attend_heads_last),
    "sageattn": _Leaf((*_SAGE, "softmax_scale", "return_lse"), attend_heads_first, {"tensor_layout": "HND"}),
}
# FlashAttention 3 has another order and, in some versions, returns the log-sum-exp beside the values.
_FLASH_3 = _Leaf(("q", "k", "v", "softmax_scale", "causal", "qv"), attend_heads_last)
_SAGE_VARIANT = _Leaf(_SAGE, attend_heads_first, {"tensor_layout": "HND"})


def replace_attention_leaves(module: fx.GraphModule) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """A copy of the module with library attention as torch calls, and a note for every one replaced or left.

    The module itself comes back where no such call is in it. Parameters are shared with the copy.
    """
    leaves = [(node.name, _leaf(node)) for node in module.graph.nodes if _leaf(node) is not None]
    if not leaves:
        return module, ()
    copied = fx.GraphModule(module, copy.deepcopy(module.graph))
    by_name = {node.name: node for node in copied.graph.nodes}
    notes = []
    for name, leaf in leaves:
        assert leaf is not None
        node = by_name[name]
        called = _function_name(node)
        reason = _replace(copied, node, leaf)
        notes.append(f"'{name}' ({called}) " + (f"is left: {reason}" if reason else "is traced as torch's attention"))
    copied.graph.lint()
    copied.recompile()
    return copied, tuple(notes)


def _function_name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def _leaf(node: fx.Node) -> _Leaf | None:
    name = _function_name(node)
    home = str(getattr(node.target, "__module__", "")).split(".")
    if name == "flash_attn_func" and "flash_attn_interface" in home and home[0] != "flash_attn":
        return _FLASH_3
    if name in _LEAVES:
        return _LEAVES[name]
    return _SAGE_VARIANT if name.startswith("sageattn_qk") else None


def _replace(module: fx.GraphModule, node: fx.Node, leaf: _Leaf) -> str:
    """Replace a call; why not where that cannot be."""
    if len(node.args) > len(leaf.parameters):
        return f"it has {len(node.args)} positional arguments, of which {len(leaf.parameters)} are known"
    given = dict(leaf.defaults) | dict(zip(leaf.parameters, node.args, strict=False))
    given |= {_RENAMED.get(name, name): value for name, value in node.kwargs.items()}
    for name, value in given.items():
        if name in _HONOURED or name in _INDIFFERENT:
            continue
        if name not in _NEUTRAL:
            return f"its argument {name} is unknown"
        if isinstance(value, fx.Node) or value not in _NEUTRAL[name]:
            return f"{name}={value} has no equal in torch's attention"
    if "cu_seqlens_q" in given:
        for side in ("q", "k"):
            reason = _one_sequence(module, given.get(f"cu_seqlens_{side}"), given.get(f"max_seqlen_{side}"))
            if reason:
                return f"cu_seqlens_{side} {reason}"
    attend = leaf.attend
    layout = given.pop("tensor_layout", None)
    if layout is not None:
        if layout not in ("HND", "NHD"):
            return f"tensor_layout={layout}, expected HND or NHD"
        attend = attend_heads_first if layout == "HND" else attend_heads_last
    wanted = {"q", "k", "v", "qkv", "kv", "mask", "softmax_scale", "causal"}
    kwargs = {name: value for name, value in given.items() if name in wanted}
    results = list(node.users)
    is_tuple = leaf is _FLASH_3 and bool(results) and all(user.target is operator.getitem for user in results)
    if is_tuple and any(user.args[1] != 0 and user.users for user in results):
        return "its log-sum-exp is used"
    with module.graph.inserting_before(node):
        call = module.graph.call_function(attend, (), kwargs)
    call.meta = dict(node.meta)
    for user in results if is_tuple else ():
        user.replace_all_uses_with(call)
        module.graph.erase_node(user)
    node.replace_all_uses_with(call)
    module.graph.erase_node(node)
    return ""


def _one_sequence(module: fx.GraphModule, bounds: object, length: object) -> str:
    """Why bounds of sequences are not those of one whole sequence; empty where they are."""
    if not isinstance(bounds, fx.Node) or bounds.op != "get_attr":
        return "is computed in the graph: whether there is one sequence cannot be told"
    value = operator.attrgetter(str(bounds.target))(module)
    if not isinstance(value, Tensor) or value.numel() != 2:
        return "bounds several sequences"
    if torch.equal(value.cpu().long(), torch.tensor([0, length if isinstance(length, int) else -1])):
        return ""
    return f"is {value.tolist()}, not [0, {length}]"
