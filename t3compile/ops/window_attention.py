"""t3::window_attention: full attention cut into windows, local and dilated branch averaged.

Contract: k [B, N/g, S, D] and v [B, N/g, S, Dv] with S = prefix + T*H*W + suffix and q [B, N, Sq, D] with Sq =
query_prefix + T*H*W + query_suffix (None: as many as the keys), after normalisation and RoPE with global positions; any
floating dtype. Each head of k and v serves g heads of q in a row (grouped-query attention).
``grid`` and ``splits`` stand in sequence order, outermost axis first: the op has no other notion of the three axes.
Returns [B, N, Sq, Dv], a view of a contiguous [B, Sq, N, Dv] as fused SDPA does. A grid query sees its window and all
prefix/suffix keys; a prefix/suffix query sees everything.
``mask`` is that of the full attention, bool (True: visible) or additive, broadcastable to [B, N, Sq, S]. Among grid
tokens it must hide nothing (add one number everywhere), and all grid queries must have the same row: the op reads one
of them, so the caller has to prove it. A query outside the grid that sees no key gets what torch's SDPA gives, 0.
Differentiable once, but for the mask; the backward pass recomputes, and create_graph=True is refused.
On CUDA tensors that it fits the Triton kernel runs, else SDPA on regrouped tokens: dispatch.py says which and why; on
CPUs a few windows at a time (cpu_attention.py). A gradient is always that of regrouped_attention.py.
Source: arXiv 2512.13492; prefix/suffix tokens and masks over them are an own extension.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t3compile.errors import KernelError
from t3compile.ops.cpu_attention import cpu_window_attention
from t3compile.ops.dispatch import PathChoice, choose_path, note_path
from t3compile.ops.launch_kernel import launch_kernel
from t3compile.ops.regrouped_attention import window_attention
from t3compile.ops.window_arguments import OP_NAME, WindowAttentionArgs

# Domain and type of the ONNX node that stands for the op until it is bound to its function.
ONNX_NAME = "t3::WindowAttention"
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, int[] grid, int[] splits, str branches, "
    "int prefix=0, int suffix=0, float? scale=None, "
    "int? query_prefix=None, int? query_suffix=None, Tensor? mask=None) -> Tensor"
)


@dataclass(frozen=True)
class WindowAttentionCall:
    """All arguments of a call of the op: its tensors (graph nodes, where the call is one) and the rest."""

    q: Any
    k: Any
    v: Any
    mask: Any
    args: WindowAttentionArgs

    @property
    def tensors(self) -> tuple[Any, ...]:
        """q, k, v and, if there is one, the mask."""
        return (self.q, self.k, self.v) if self.mask is None else (self.q, self.k, self.v, self.mask)

    @classmethod
    def read(cls, args: Any, kwargs: Any) -> WindowAttentionCall:
        """From the positional and keyword arguments of a call."""
        names = [argument.name for argument in WINDOW_ATTENTION._schema.arguments]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        q, k, v, mask = (given.pop(name, None) for name in ("q", "k", "v", "mask"))
        return cls(q, k, v, mask, WindowAttentionArgs.from_op_args(**given))


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, args: WindowAttentionArgs) -> None:
    keys = f"prefix {args.prefix}, suffix {args.suffix}"
    queries = f"query_prefix {args.query_prefix}, query_suffix {args.query_suffix}"
    if args.as_op_args()[6:] == ():
        queries = keys
    expected = ((q, args.query_tokens, queries), (k, args.tokens, keys), (v, args.tokens, keys))
    for name, (x, tokens, extra) in zip("qkv", expected, strict=True):
        if x.dim() != 4 or x.shape[2] != tokens:
            raise ValueError(
                f"{OP_NAME}: {name} has shape {tuple(x.shape)}, expected [B, N, {tokens}, D] for grid "
                f"{args.grid}, {extra}"
            )
    if q.shape[0] != k.shape[0] or k.shape[:2] != v.shape[:2] or q.shape[1] % k.shape[1] != 0:
        heads = ", ".join(f"{name} {tuple(x.shape[:2])}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(
            f"{OP_NAME}: q, k and v must have one batch, k and v the same heads, and those must divide the heads of q, "
            f"but batch and heads are {heads}"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"{OP_NAME}: q has depth {q.shape[3]}, k has {k.shape[3]}; they must be the same")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{OP_NAME}: q, k and v must have one dtype, but have {q.dtype}, {k.dtype} and {v.dtype}")
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(f"{OP_NAME}: mask has dtype {mask.dtype}, expected bool (True: visible) or a floating one")
    whole = (*q.shape[:2], args.query_tokens, args.tokens)
    tail = whole[4 - mask.dim() :]
    if not 1 <= mask.dim() <= 4 or any(size not in (1, full) for size, full in zip(mask.shape, tail, strict=True)):
        raise ValueError(f"{OP_NAME}: mask of shape {tuple(mask.shape)} does not broadcast to {whole}")


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: list[int],
    splits: list[int],
    branches: str,
    prefix: int = 0,
    suffix: int = 0,
    scale: float | None = None,
    query_prefix: int | None = None,
    query_suffix: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    args = WindowAttentionArgs.from_op_args(grid, splits, branches, prefix, suffix, scale, query_prefix, query_suffix)
    _check_shapes(q, k, v, mask, args)
    choice = choose_path(q, k, v, args, mask)
    out = None
    if choice.path == "kernel":
        try:
            out = launch_kernel(q, k, v, args, mask)
        except KernelError as error:
            warnings.warn(f"{OP_NAME}: {error}; tokens are regrouped instead", stacklevel=2)
            choice = PathChoice("regrouped", str(error))
    note_path(choice, q, k, args)
    if out is not None:
        return out
    on_cpu = all(x.device.type == "cpu" for x in (q, k, v, mask) if x is not None)
    return (cpu_window_attention if on_cpu else window_attention)(q, k, v, args, mask)


def _fake(q: Tensor, k: Tensor, v: Tensor, *op_args: Any, **named: Any) -> Tensor:
    call = WindowAttentionCall.read((q, k, v, *op_args), named)
    _check_shapes(q, k, v, call.mask, call.args)
    batch, heads, tokens, _ = q.shape
    return q.new_empty((batch, tokens, heads, v.shape[-1])).transpose(1, 2)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    call = WindowAttentionCall.read(inputs, {})
    if call.mask is not None and call.mask.requires_grad:
        raise ValueError(f"{OP_NAME}: a mask has no gradient here: pass mask.detach()")
    ctx.window_args, ctx.given = call.args, len(inputs)
    ctx.save_for_backward(call.q, call.k, call.v, call.mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{OP_NAME} has no second derivative: leave out create_graph=True, or compute attention by "
            "t3compile.ops.regrouped_attention.window_attention, which is made of torch's own operators"
        )
    *qkv, mask = ctx.saved_tensors
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in qkv]
        q, k, v = inputs
        out = window_attention(q, k, v, ctx.window_args, mask)
        grads = torch.autograd.grad(out, inputs, grad)
    return (*grads, *(None for _ in range(ctx.given - 3)))


def _autocast(device: str) -> Callable[..., Tensor]:
    """The op under autocast on a device: floating tensors in autocast's dtype, as torch's SDPA does."""

    def run(*op_args: Any, **named: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)

        def cast(x: Any) -> Any:
            is_wide = isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
            return x.to(dtype) if is_wide else x

        with torch.autocast(device, enabled=False):
            out: Tensor = WINDOW_ATTENTION(*map(cast, op_args), **{name: cast(x) for name, x in named.items()})
            return out

    return run


torch.library.define(OP_NAME, _SCHEMA)
torch.library.impl(OP_NAME, "CompositeExplicitAutograd")(_kernel)
for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    torch.library.impl(OP_NAME, _key)(_autocast(_device))
torch.library.register_fake(OP_NAME)(_fake)
torch.library.register_autograd(OP_NAME, _backward, setup_context=_save_for_backward)

WINDOW_ATTENTION = torch.ops.t3.window_attention.default
