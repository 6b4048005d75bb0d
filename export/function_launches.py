"""The launches that compute a window attention function of an ONNX file, and the tensors that each is given."""

from __future__ import annotations

from dataclasses import dataclass

from t3compile.export.window_function import FunctionKey, MaskKey
from t3compile.ops.window_launch import Layout, MaskLayout, WindowLaunch


@dataclass(frozen=True)
class LaunchTensor:
    """A tensor that a launch reads or writes: contiguous, every size known."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.dtype}"


def window_launches(key: FunctionKey) -> tuple[WindowLaunch, ...]:
    """The launches that compute a window attention function, in order; every tensor contiguous [B, N, S, D].

    One for each branch that has to be computed. The second takes the first's output as one more input, behind the
    function's own, and gives the mean.
    """
    args = key.args
    q = Layout.heads_first(key.heads, args.query_tokens, key.head_dim)
    k = Layout.heads_first(key.key_heads, args.tokens, key.head_dim)
    v = Layout.heads_first(key.key_heads, args.tokens, key.value_dim)
    out = Layout.heads_first(key.heads, args.query_tokens, key.value_dim)
    mask = None if key.mask is None else _mask_layout(key.mask)
    return tuple(
        WindowLaunch(
            args,
            branch,
            number > 0,
            key.batch,
            key.heads,
            key.key_heads,
            key.head_dim,
            key.value_dim,
            key.dtype,
            q,
            k,
            v,
            out,
            mask,
        )
        for number, branch in enumerate(args.pattern.computed_branches(args.grid))
    )


def launch_tensors(key: FunctionKey, launch: WindowLaunch) -> tuple[LaunchTensor, ...]:
    """The tensors of one of a function's launches, in the order of the kernel's parameters: inputs, then the output.

    q [B, N, Sq, D], k [B, N/g, S, D], v [B, N/g, S, Dv], the function's mask if it has one, the other branch's output
    ``other`` [B, N, Sq, Dv] where the launch averages, and ``out`` [B, N, Sq, Dv].
    """
    args, batch, dtype = key.args, key.batch, key.dtype
    output = (batch, key.heads, args.query_tokens, key.value_dim)
    tensors = [
        LaunchTensor("q", (batch, key.heads, args.query_tokens, key.head_dim), dtype),
        LaunchTensor("k", (batch, key.key_heads, args.tokens, key.head_dim), dtype),
        LaunchTensor("v", (batch, key.key_heads, args.tokens, key.value_dim), dtype),
    ]
    if key.mask is not None:
        tensors.append(LaunchTensor("mask", key.mask.shape, key.mask.dtype))
    if launch.averages:
        tensors.append(LaunchTensor("other", output, dtype))
    return (*tensors, LaunchTensor("out", output, dtype))


def _mask_layout(mask: MaskKey) -> MaskLayout:
    """Strides of a contiguous mask; 0 on the axes that it is broadcast along."""
    sizes = (*(1 for _ in range(4 - len(mask.shape))), *mask.shape)
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(0 if size == 1 else step)
        step *= size
    batch, head, query, key = reversed(strides)
    return MaskLayout(mask.dtype, batch, head, query, key)
