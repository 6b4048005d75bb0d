"""Write complex arithmetic with real tensors: [..., 2] holds real and imaginary parts. ONNX has no complex operations.

Complex inputs, constants and outputs stay what they are; views at the border turn them into pairs and back.

Input graph:
    z = aten.view_as_complex(x)                                       x [B, S, D, 2]
    rotated = aten.mul(z, frequencies)                                frequencies: complex [S, D]
    out = aten.view_as_real(rotated)
Output graph:
    f = aten.view_as_real(frequencies)
    a, b = aten.select(x, -1, 0), aten.select(x, -1, 1)
    c, d = aten.select(f, -1, 0), aten.select(f, -1, 1)
    out = aten.stack([a * c - b * d, a * d + b * c], -1)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from t3compile.passes.graph_pass import Cursor, GraphPass, is_call, replace_node
from t3compile.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitComplex(GraphPass):
    """Replace complex calls by calls on pairs; a call without a known spelling keeps its complex operands."""

    def apply(self, graph_module: fx.GraphModule, program: Program) -> bool:
        split = _Splitter()
        for node in list(graph_module.graph.nodes):
            if node.op == "call_function":
                split.visit(node)
        if split.rewritten:
            split.join_rest()
        return split.rewritten


class _Splitter:
    """The pairs of a graph's complex values, made in graph order."""

    def __init__(self) -> None:
        self.rewritten = False
        self._pairs: dict[fx.Node, fx.Node] = {}
        self._kept: set[fx.Node] = set()

    def visit(self, node: fx.Node) -> None:
        makes_complex = _is_complex(node.meta.get("val"))
        takes_complex = [used for used in node.all_input_nodes if _is_complex(used.meta.get("val"))]
        if not makes_complex and not takes_complex:
            return
        if is_call(node, aten.view_as_complex, aten.view_as_complex_copy):
            self._pairs[node] = node.args[0]  # type: ignore[assignment]
            return
        if is_call(node, aten.view_as_real, aten.view_as_real_copy) and takes_complex[0] not in self._pairs:
            return
        pair = _Call(node, self).spell()
        if pair is None:
            self._kept.add(node)
            return
        self.rewritten = True
        if makes_complex:
            self._pairs[node] = pair
        else:
            replace_node(node, pair)

    def knows(self, node: Any) -> bool:
        return node in self._pairs

    def pair(self, node: fx.Node) -> fx.Node:
        """[..., 2] of a complex value."""
        if node not in self._pairs:
            after = node.next
            while after.op == "placeholder":
                after = after.next
            self._pairs[node] = Cursor(after).call(aten.view_as_real.default, node)
        return self._pairs[node]

    def join_rest(self) -> None:
        """Complex values again for the graph's outputs and for calls that stayed."""
        for node, pair in self._pairs.items():
            users = [user for user in node.users if user.op == "output" or user in self._kept]
            is_border = node.op == "placeholder" or node in self._kept
            if not users or is_border or is_call(node, aten.view_as_complex, aten.view_as_complex_copy):
                continue
            cursor = Cursor(node.next)
            whole = cursor.call(aten.clone.default, pair, memory_format=torch.contiguous_format)
            joined = cursor.call(aten.view_as_complex.default, whole)
            for user in users:
                user.replace_input_with(node, joined)


@dataclass(frozen=True)
class _Call:
    """One complex call on its way to pairs."""

    node: fx.Node
    splitter: _Splitter

    def spell(self) -> fx.Node | None:
        """The call on pairs: a pair, a list of pairs, or a real value. None: there is no spelling for it."""
        if self.node.target is operator.getitem:
            source, index = self.node.args
            if not self.splitter.knows(source):
                return None
            return self.call(operator.getitem, self.splitter.pair(source), index)  # type: ignore[arg-type]
        spelling = _SPELLINGS.get(getattr(self.node.target, "overloadpacket", None))
        return None if spelling is None else spelling(self)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return Cursor(self.node).call(target, *args, **kwargs)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name, as the schema has it."""
        if position < len(self.node.args):
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    @property
    def part_dtype(self) -> torch.dtype:
        """The dtype of the parts of what the call makes."""
        value = self.node.meta["val"]
        first: Tensor = value[0] if isinstance(value, list | tuple) else value
        return first.real.dtype if first.is_complex() else first.dtype

    @property
    def rank(self) -> int:
        """The axes of the first operand: the axis of the parts has this number."""
        rank: int = self.node.args[0].meta["val"].dim()  # type: ignore[union-attr]
        return rank

    def dims(self, dims: int | Sequence[int]) -> Any:
        """Axes of the first operand, counted from the front."""
        return dims % max(self.rank, 1) if isinstance(dims, int) else [d % max(self.rank, 1) for d in dims]

    def first(self) -> fx.Node:
        """The first operand as a pair."""
        return self.pair(self.node.args[0])

    def pair(self, operand: Any) -> fx.Node:
        """An operand, real or complex, tensor or number, as a pair of the result's dtype."""
        if not isinstance(operand, fx.Node):
            number = complex(operand)
            device = self.node.meta["val"].device
            parts = [
                self.call(aten.full.default, [], part, dtype=self.part_dtype, device=device)
                for part in (number.real, number.imag)
            ]
            return self.call(aten.stack.default, parts, -1)
        if _is_complex(operand.meta["val"]):
            return self.cast(self.splitter.pair(operand))
        real = self.cast(operand)
        return self.call(aten.stack.default, [real, self.call(aten.zeros_like.default, real)], -1)

    def cast(self, real: fx.Node) -> fx.Node:
        if real.meta["val"].dtype == self.part_dtype:
            return real
        return self.call(aten._to_copy.default, real, dtype=self.part_dtype)

    def is_real(self, operand: Any) -> bool:
        if isinstance(operand, fx.Node):
            return not _is_complex(operand.meta["val"])
        return not isinstance(operand, complex)

    def over_parts(self, real: Any) -> Any:
        """A real operand that broadcasts over both parts."""
        if not isinstance(real, fx.Node):
            return real
        return self.call(aten.unsqueeze.default, self.cast(real), -1)

    def parts(self, operand: Any) -> tuple[fx.Node, fx.Node]:
        pair = self.pair(operand)
        return self.call(aten.select.int, pair, -1, 0), self.call(aten.select.int, pair, -1, 1)

    def join(self, real: fx.Node, imaginary: fx.Node) -> fx.Node:
        return self.call(aten.stack.default, [real, imaginary], -1)


def _is_complex(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_is_complex(item) for item in value)
    return isinstance(value, Tensor) and value.is_complex()


# --- borders


def _view_as_real(c: _Call) -> fx.Node | None:
    return c.splitter.pair(c.node.args[0])  # type: ignore[arg-type]


def _complex(c: _Call) -> fx.Node | None:
    shape = list(c.node.meta["val"].shape)
    parts = []
    for part in c.node.args[:2]:
        assert isinstance(part, fx.Node)
        same = list(part.meta["val"].shape) == shape
        parts.append(part if same else c.call(aten.expand.default, part, shape))
    return c.join(parts[0], parts[1])


def _polar(c: _Call) -> fx.Node | None:
    radius, angle = c.node.args[:2]
    cosine, sine = (c.call(f.default, angle) for f in (aten.cos, aten.sin))
    return c.join(c.call(aten.mul.Tensor, radius, cosine), c.call(aten.mul.Tensor, radius, sine))


def _part(index: int) -> Callable[[_Call], fx.Node | None]:
    return lambda c: c.call(aten.select.int, c.splitter.pair(c.node.args[0]), -1, index)  # type: ignore[arg-type]


def _absolute(c: _Call) -> fx.Node | None:
    return c.call(aten.linalg_vector_norm.default, c.splitter.pair(c.node.args[0]), 2, [-1])  # type: ignore[arg-type]


def _angle(c: _Call) -> fx.Node | None:
    real, imaginary = c.parts(c.node.args[0])
    return c.call(aten.atan2.default, imaginary, real)


def _convert(c: _Call) -> fx.Node | None:
    if not _is_complex(c.node.meta["val"]):
        real = c.call(aten.select.int, c.splitter.pair(c.node.args[0]), -1, 0)  # type: ignore[arg-type]
        return c.call(aten._to_copy.default, real, dtype=c.node.meta["val"].dtype)
    return c.first()


# --- arithmetic


def _mul(c: _Call) -> fx.Node | None:
    x, y = c.node.args[:2]
    if c.is_real(x):
        x, y = y, x
    if c.is_real(y):
        return c.call(aten.mul.Tensor, c.pair(x), c.over_parts(y))
    return _product(c, aten.mul.Tensor, c.parts(x), c.parts(y))


def _matmul(c: _Call) -> fx.Node | None:
    x, y = c.node.args[:2]
    return _product(c, c.node.target, c.parts(x), c.parts(y))  # type: ignore[arg-type]


def _product(
    c: _Call, multiply: Callable[..., Any], x: tuple[fx.Node, fx.Node], y: tuple[fx.Node, fx.Node]
) -> fx.Node | None:
    (a, b), (p, q) = x, y
    real = c.call(aten.sub.Tensor, c.call(multiply, a, p), c.call(multiply, b, q))
    return c.join(real, c.call(aten.add.Tensor, c.call(multiply, a, q), c.call(multiply, b, p)))


def _div(c: _Call) -> fx.Node | None:
    x, y = c.node.args[:2]
    if c.node.kwargs.get("rounding_mode") is not None:
        return None
    if c.is_real(y):
        return c.call(aten.div.Tensor, c.pair(x), c.over_parts(y))
    return _quotient(c, x, y)


def _quotient(c: _Call, x: Any, y: Any) -> fx.Node | None:
    (a, b), (p, q) = c.parts(x), c.parts(y)
    square = c.call(aten.add.Tensor, c.call(aten.mul.Tensor, p, p), c.call(aten.mul.Tensor, q, q))
    product = _product(c, aten.mul.Tensor, (a, b), (p, c.call(aten.neg.default, q)))
    return c.call(aten.div.Tensor, product, c.call(aten.unsqueeze.default, square, -1))


def _reciprocal(c: _Call) -> fx.Node | None:
    return _quotient(c, 1.0, c.node.args[0])


def _sum_of(target: Any, is_reversed: bool = False) -> Callable[[_Call], fx.Node | None]:
    def spell(c: _Call) -> fx.Node | None:
        x, y = (c.pair(operand) for operand in c.node.args[:2])
        if is_reversed:
            x, y = y, x
        alpha = c.argument(2, "alpha", 1)
        if isinstance(alpha, complex):
            return None
        return c.call(target, x, y) if alpha == 1 else c.call(target, x, y, alpha=alpha)

    return spell


def _negative(c: _Call) -> fx.Node | None:
    return c.call(aten.neg.default, c.first())


def _conjugate(c: _Call) -> fx.Node | None:
    real, imaginary = c.parts(c.node.args[0])
    return c.join(real, c.call(aten.neg.default, imaginary))


def _exponential(c: _Call) -> fx.Node | None:
    real, imaginary = c.parts(c.node.args[0])
    radius = c.call(aten.exp.default, real)
    cosine, sine = (c.call(f.default, imaginary) for f in (aten.cos, aten.sin))
    return c.join(c.call(aten.mul.Tensor, radius, cosine), c.call(aten.mul.Tensor, radius, sine))


def _reduction(target: Any) -> Callable[[_Call], fx.Node | None]:
    def spell(c: _Call) -> fx.Node | None:
        dims = c.argument(1, "dim")
        if not isinstance(dims, list | tuple | int) or dims in ([], ()):
            dims = range(c.rank)
        keep = bool(c.argument(2, "keepdim", False))
        return c.call(target, c.first(), c.dims([dims] if isinstance(dims, int) else list(dims)), keep)

    return spell


# --- the same data elsewhere


def _same(c: _Call) -> fx.Node | None:
    return c.first()


def _copy(c: _Call) -> fx.Node | None:
    shape = list(c.node.meta["val"].shape)
    source = c.pair(c.node.args[1])
    return c.call(aten.expand.default, source, [*shape, 2])


def _reshape(c: _Call) -> fx.Node | None:
    if c.node.target is aten.view.dtype:
        return None
    return c.call(aten.reshape.default, c.first(), [*c.node.meta["val"].shape, 2])


def _expand(c: _Call) -> fx.Node | None:
    return c.call(aten.expand.default, c.first(), [*c.node.meta["val"].shape, 2])


def _repeat(c: _Call) -> fx.Node | None:
    return c.call(aten.repeat.default, c.first(), [*c.argument(1, "repeats"), 1])


def _permute(c: _Call) -> fx.Node | None:
    return c.call(aten.permute.default, c.first(), [*c.dims(c.argument(1, "dims")), c.rank])


def _transpose(c: _Call) -> fx.Node | None:
    dims = (0, c.rank - 1) if is_call(c.node, aten.t) else (c.argument(1, "dim0"), c.argument(2, "dim1"))
    return c.call(aten.transpose.int, c.first(), *(c.dims(d) for d in dims))


def _unsqueeze(c: _Call) -> fx.Node | None:
    return c.call(aten.unsqueeze.default, c.first(), c.argument(1, "dim") % (c.rank + 1))


def _along(dim_position: int, default: int = 0) -> Callable[[_Call], fx.Node | None]:
    """Calls with one axis, which need it counted from the front and nothing else."""

    def spell(c: _Call) -> fx.Node | None:
        args, kwargs = list(c.node.args), dict(c.node.kwargs)
        args[0] = c.first()
        if len(args) > dim_position:
            args[dim_position] = c.dims(args[dim_position])  # type: ignore[arg-type]
        else:
            kwargs["dim"] = c.dims(kwargs.get("dim", default))  # type: ignore[arg-type]
        return c.call(c.node.target, *args, **kwargs)  # type: ignore[arg-type]

    return spell


def _write_along(dim_position: int) -> Callable[[_Call], fx.Node | None]:
    """slice_scatter and select_scatter: the source is a second pair."""

    def spell(c: _Call) -> fx.Node | None:
        args, kwargs = list(c.node.args), dict(c.node.kwargs)
        args[0], args[1] = c.first(), c.pair(args[1])
        if len(args) > dim_position:
            args[dim_position] = c.dims(args[dim_position])  # type: ignore[arg-type]
        else:
            kwargs["dim"] = c.dims(kwargs.get("dim", 0))  # type: ignore[arg-type]
        return c.call(c.node.target, *args, **kwargs)  # type: ignore[arg-type]

    return spell


def _joined_along(is_new_axis: bool) -> Callable[[_Call], fx.Node | None]:
    def spell(c: _Call) -> fx.Node | None:
        tensors: Any = c.node.args[0]
        rank = c.node.meta["val"].dim()
        # torch.cat lets empty [0] tensors of another rank pass.
        if not is_new_axis and any(x.meta["val"].dim() != rank for x in tensors):
            return None
        target = aten.stack.default if is_new_axis else aten.cat.default
        return c.call(target, [c.pair(x) for x in tensors], c.argument(1, "dim", 0) % rank)

    return spell


def _index(c: _Call) -> fx.Node | None:
    return c.call(aten.index.Tensor, c.first(), list(c.node.args[1]))  # type: ignore[arg-type]


def _index_put(c: _Call) -> fx.Node | None:
    indices: Any = c.node.args[1]
    values = c.pair(c.node.args[2])
    rest = c.node.args[3:]
    return c.call(aten.index_put.default, c.first(), list(indices), values, *rest, **c.node.kwargs)


def _where(c: _Call) -> fx.Node | None:
    if len(c.node.args) != 3:
        return None
    condition, x, y = c.node.args
    return c.call(aten.where.self, c.call(aten.unsqueeze.default, condition, -1), c.pair(x), c.pair(y))


def _pad(c: _Call) -> fx.Node | None:
    mode, value = ("constant", c.argument(2, "value", 0))
    if is_call(c.node, aten.pad):
        mode, value = c.argument(2, "mode", "constant"), c.argument(3, "value", 0)
    if mode != "constant" or value not in (0, None):
        return None
    return c.call(aten.constant_pad_nd.default, c.first(), [0, 0, *c.argument(1, "pad")], 0.0)


def _pad_sequence(c: _Call) -> fx.Node | None:
    if c.argument(2, "padding_value", 0.0) != 0:
        return None
    pairs = [c.pair(x) for x in c.node.args[0]]  # type: ignore[union-attr]
    return c.call(aten.pad_sequence.default, pairs, *c.node.args[1:], **c.node.kwargs)


def _flip(c: _Call) -> fx.Node | None:
    return c.call(aten.flip.default, c.first(), c.dims(c.argument(1, "dims")))


def _roll(c: _Call) -> fx.Node | None:
    dims = c.argument(2, "dims")
    return c.call(aten.roll.default, c.first(), c.argument(1, "shifts"), c.dims(dims)) if dims else None


def _filled(value: Any = None, position: int = 1) -> Callable[[_Call], fx.Node | None]:
    """Calls that fill a shape with one number: `value`, or their argument at `position`."""

    def spell(c: _Call) -> fx.Node | None:
        number = c.argument(position, "fill_value") if value is None else value
        return c.call(aten.expand.default, c.pair(number), [*c.node.meta["val"].shape, 2])

    return spell


_SPELLINGS: dict[Any, Callable[[_Call], fx.Node | None]] = {
    aten.view_as_real: _view_as_real,
    aten.view_as_real_copy: _view_as_real,
    aten.complex: _complex,
    aten.polar: _polar,
    aten.real: _part(0),
    aten.imag: _part(1),
    aten.abs: _absolute,
    aten.angle: _angle,
    aten._to_copy: _convert,
    aten.to: _convert,
    aten.mul: _mul,
    aten.matmul: _matmul,
    aten.mm: _matmul,
    aten.bmm: _matmul,
    aten.div: _div,
    aten.reciprocal: _reciprocal,
    aten.add: _sum_of(aten.add.Tensor),
    aten.sub: _sum_of(aten.sub.Tensor),
    aten.rsub: _sum_of(aten.sub.Tensor, is_reversed=True),
    aten.neg: _negative,
    aten.conj: _conjugate,
    aten._conj: _conjugate,
    aten._conj_physical: _conjugate,
    aten.conj_physical: _conjugate,
    aten.exp: _exponential,
    aten.sum: _reduction(aten.sum.dim_IntList),
    aten.mean: _reduction(aten.mean.dim),
    aten.resolve_conj: _same,
    aten.resolve_neg: _same,
    aten.lift_fresh_copy: _same,
    aten.detach: _same,
    aten.alias: _same,
    aten.clone: _same,
    aten.contiguous: _same,
    aten.copy: _copy,
    aten.view: _reshape,
    aten._unsafe_view: _reshape,
    aten.reshape: _reshape,
    aten.flatten: _reshape,
    aten.unflatten: _reshape,
    aten.squeeze: _reshape,
    aten.unsqueeze: _unsqueeze,
    aten.expand: _expand,
    aten.expand_as: _expand,
    aten.repeat: _repeat,
    aten.permute: _permute,
    aten.transpose: _transpose,
    aten.t: _transpose,
    aten.slice: _along(1),
    aten.select: _along(1),
    aten.narrow: _along(1),
    aten.index_select: _along(1),
    aten.split: _along(2),
    aten.split_with_sizes: _along(2),
    aten.chunk: _along(2),
    aten.tensor_split: _along(2),
    aten.unbind: _along(1),
    aten.slice_scatter: _write_along(2),
    aten.select_scatter: _write_along(2),
    aten.cat: _joined_along(is_new_axis=False),
    aten.concat: _joined_along(is_new_axis=False),
    aten.stack: _joined_along(is_new_axis=True),
    aten.index: _index,
    aten.index_put: _index_put,
    aten.where: _where,
    aten.constant_pad_nd: _pad,
    aten.pad: _pad,
    aten.pad_sequence: _pad_sequence,
    aten.flip: _flip,
    aten.roll: _roll,
    aten.full: _filled(),
    aten.full_like: _filled(),
    aten.new_full: _filled(position=2),
    aten.fill: _filled(),
    aten.ones: _filled(1),
    aten.ones_like: _filled(1),
    aten.new_ones: _filled(1),
    aten.zeros: _filled(0),
    aten.zeros_like: _filled(0),
    aten.new_zeros: _filled(0),
    aten.empty: _filled(0),
    aten.empty_like: _filled(0),
    aten.new_empty: _filled(0),
}
