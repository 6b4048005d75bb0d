"""Where the configurations of kernels come from: a preset, a plan, an ONNX file, a program."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import onnx_ir as ir

from t3compile.errors import KernelError, ModelFileError, first_line
from t3compile.export.window_function import FunctionKey, MaskKey, window_functions
from t3compile.ops import WINDOW_ATTENTION, WindowAttentionArgs, WindowAttentionCall
from t3compile.plan import Plan
from t3compile.presets import Preset
from t3compile.program import Program

DEFAULT_DTYPE = "bfloat16"


@dataclass(frozen=True)
class GivenNumbers:
    """What presets and plans do not say; None where not given."""

    dtype: str | None = None
    batch: int | None = None
    heads: int | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise KernelError(f"{_option(name)} {value} must be at least 1")

    def refuse(self, source: str) -> None:
        """Raise KernelError where a number is given although the source has its own."""
        given = [_option(field.name) for field in fields(self) if getattr(self, field.name) is not None]
        if given:
            raise KernelError(f"{source} has its own shapes and dtypes: leave out {', '.join(given)}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class KernelSource:
    """Different configurations in order of appearance, and what was taken for granted.

    ``names_functions``: the keys are those of functions of an ONNX file.
    """

    name: str
    keys: tuple[FunctionKey, ...]
    notes: tuple[str, ...] = ()
    names_functions: bool = False


def keys_of_preset(preset: Preset, given: GivenNumbers) -> KernelSource:
    """The patterns of a published schedule on its grid, for its model unless other numbers are given."""
    heads, head_dim = given.heads or preset.heads, given.head_dim or preset.head_dim
    dtype, batch = given.dtype or DEFAULT_DTYPE, given.batch or 1
    keys = [
        FunctionKey(WindowAttentionArgs(preset.grid, pattern), batch, heads, head_dim, head_dim, dtype, "attention")
        for pattern in preset.schedule.patterns
    ]
    taken = f"{preset.name}: {heads} heads of {head_dim}, batch {batch}, {dtype}, no tokens outside the grid, no mask"
    return KernelSource(preset.name, _distinct(keys), (taken,))


def keys_of_plan(plan: Plan, name: str, given: GivenNumbers) -> KernelSource:
    """The patterns of a plan; KernelError unless heads and head dim are given, which no plan tells."""
    missing = [_option(field) for field in ("heads", "head_dim") if getattr(given, field) is None]
    if given.heads is None or given.head_dim is None:
        raise KernelError(
            f"the plan '{name}' tells no heads and head dim: give {' and '.join(missing)}, or build from the model or "
            "its .onnx, which do"
        )
    dtype, batch = given.dtype or DEFAULT_DTYPE, given.batch or 1
    keys = [
        FunctionKey(
            WindowAttentionArgs(
                site.grid.in_order(site.order),
                site.pattern.in_order(site.order),
                site.prefix,
                site.suffix,
                None,
                site.query_prefix,
                site.query_suffix,
            ),
            batch,
            given.heads,
            given.head_dim,
            given.head_dim,
            dtype,
            "attention",
        )
        for site in plan.rewritten
        if site.pattern is not None
    ]
    if not keys:
        raise KernelError(f"the plan '{name}' leaves all sites full: there is no window to compute")
    taken = f"{name}: batch {batch}, {dtype}, the scale is head_dim^-0.5, no mask: a plan does not tell"
    return KernelSource(name, _distinct(keys), (taken,))


def keys_of_onnx(path: Path, given: GivenNumbers) -> KernelSource:
    """The window attention functions of an exported file; weights are not read."""
    given.refuse(f"'{path}'")
    try:
        model = ir.load(path)
    except OSError as error:
        raise ModelFileError(f"cannot read '{path}': {error.strerror or error}") from None
    except Exception as error:
        # protobuf's own errors, of several kinds
        raise ModelFileError(f"'{path}' is no ONNX file: {first_line(error)}") from error
    keys = [key for _, key in window_functions(model)]
    if not keys:
        raise KernelError(f"'{path}' holds no window attention function: export a rewritten model without --inline")
    return KernelSource(str(path), _distinct(keys), names_functions=True)


def keys_of_program(program: Program, name: str, given: GivenNumbers) -> KernelSource:
    """The calls of t3::window_attention of a rewritten program."""
    given.refuse(f"'{name}'")
    keys = []
    for node in program.graph.nodes:
        if node.target is not WINDOW_ATTENTION:
            continue
        call = WindowAttentionCall.read(node.args, node.kwargs)
        q, k, v = (x.meta["val"] for x in (call.q, call.k, call.v))
        mask = None
        if call.mask is not None:
            value = call.mask.meta["val"]
            mask = MaskKey(tuple(value.shape), _dtype(value.dtype))
        batch, heads, _, head_dim = q.shape
        keys.append(
            FunctionKey(call.args, batch, heads, head_dim, v.shape[-1], _dtype(q.dtype), "attention", mask, k.shape[1])
        )
    if not keys:
        raise KernelError(
            f"'{name}' has no window attention: a portable program holds plain operators, another has to be rewritten"
        )
    return KernelSource(name, _distinct(keys))


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _distinct(keys: list[FunctionKey]) -> tuple[FunctionKey, ...]:
    return tuple(dict.fromkeys(keys))
