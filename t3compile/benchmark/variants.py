"""The programs that are compared: the same weights and inputs, attention computed in different ways."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from t3compile.benchmark.names import Variant
from t3compile.errors import PlanError
from t3compile.geometry import Splits
from t3compile.ops import WINDOW_ATTENTION, WindowAttentionArgs, WindowAttentionCall
from t3compile.ops.paper_attention import paper_window_attention
from t3compile.ops.regrouped_attention import window_attention
from t3compile.passes.lower_window_attention import LowerWindowAttention
from t3compile.pattern import WindowPattern
from t3compile.program import Program, trace


def variant_program(rewritten: Program, variant: Variant, original: Program | None = None) -> Program:
    """One variant of a rewritten program; full attention is the original's own, where there is one."""
    match variant:
        case "windows":
            return rewritten
        case "full":
            return LowerWindowAttention(_full_attention)(rewritten).program if original is None else original
        case "paper":
            return LowerWindowAttention(paper_window_attention)(rewritten).program
        case "regrouped":
            return LowerWindowAttention(window_attention)(rewritten).program


def _full_attention(q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, mask: Tensor | None = None) -> Tensor:
    """One window over everything is plain attention."""
    return window_attention(q, k, v, replace(args, pattern=WindowPattern(Splits(1, 1, 1))), mask)


@dataclass(frozen=True)
class TensorForm:
    """Shape, dtype ("float32", ...) and the order of the axes in memory, outermost first."""

    shape: tuple[int, ...]
    dtype: str
    order: tuple[int, ...]

    @classmethod
    def of(cls, value: Tensor) -> TensorForm:
        # By stride; axes of length 1 may have any, and stay where they are.
        strides: tuple[int, ...] = value.stride()
        order = sorted(range(value.dim()), key=lambda axis: (-strides[axis], axis))
        return cls(tuple(value.shape), str(value.dtype).removeprefix("torch."), tuple(order))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.order)

    def as_stored(self) -> Tensor:
        return torch.empty(self.stored_shape, dtype=getattr(torch, self.dtype))

    def view(self, stored: Tensor) -> Tensor:
        """The tensor of this form whose memory ``stored`` is."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return stored.permute(back)


@dataclass(frozen=True)
class AttentionLayer:
    """One call of the op without its values: the arguments, and the forms of q, k, v and of the mask, if any."""

    args: WindowAttentionArgs
    forms: tuple[TensorForm, ...]

    @property
    def dtype(self) -> str:
        return self.forms[0].dtype

    @classmethod
    def by_tokens(
        cls, args: WindowAttentionArgs, heads: int, head_dim: int, dtype: str, batch: int = 1
    ) -> AttentionLayer:
        """q, k and v [B, N, S, D], views of [B, S, N, D] as models have them."""
        form = TensorForm((batch, heads, args.tokens, head_dim), dtype, (0, 2, 1, 3))
        return cls(args, (form,) * 3)

    def program(self) -> Program:
        """The call as a program of its own, of q, k, v (and mask) as they are stored; it holds no values."""
        with FakeTensorMode():
            stored = tuple(form.as_stored() for form in self.forms)
        program = trace(_Layer(self), stored, source=f"attention {self.args.pattern} on {self.args.grid}")
        program.exported.example_inputs = None
        return program


class _Layer(nn.Module):
    def __init__(self, layer: AttentionLayer) -> None:
        super().__init__()
        self._layer = layer

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        forms = self._layer.forms
        q, k, v = (form.view(x) for form, x in zip(forms[:3], (q, k, v), strict=True))
        masked = {} if mask is None else {"mask": forms[3].view(mask)}
        out: Tensor = WINDOW_ATTENTION(q, k, v, *self._layer.args.as_op_args(), **masked)
        return out.transpose(1, 2)


def attention_layers(rewritten: Program) -> dict[AttentionLayer, int]:
    """The different calls of the op in a rewritten program, each with its number, in order of appearance.

    PlanError where there is none, as in the portable form.
    """
    layers: dict[AttentionLayer, int] = {}
    for node in rewritten.graph.nodes:
        if node.target is WINDOW_ATTENTION:
            call = WindowAttentionCall.read(node.args, node.kwargs)
            layer = AttentionLayer(call.args, tuple(TensorForm.of(x.meta["val"]) for x in call.tensors))
            layers[layer] = layers.get(layer, 0) + 1
    if not layers:
        raise PlanError(
            f"{rewritten.source} has no t3::window_attention to compare with anything: give a model with attention "
            "sites that the schedule rewrites, or a .pt2 rewritten without --portable"
        )
    return layers
