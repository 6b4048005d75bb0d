"""The one call of torch.onnx.export, quiet and with the options every export shares, and the clean-up of its graph."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram

from t3compile.errors import ExportError, T3CompileError, first_line
from t3compile.program import traced_lightly

OPSET = 23
# What onnxscript would not store anyway: it computes larger constants first and drops them then.
_LARGEST_FOLDED = 512 * 512
_ROUNDS = 2

# A weight's stand-in, by its name and the fake tensor that was exported: read when its values are asked for.
MakeLazy = Callable[[str, Tensor], ir.TensorProtocol]


def _no_lazy(name: str, _: Tensor) -> ir.TensorProtocol:
    raise ExportError(f"the weight '{name}' has no value")


def export_graph(exported: ExportedProgram, make_lazy: MakeLazy = _no_lazy) -> ir.Model:
    """An exported program as an ONNX model in memory; ExportError with the exporter's reason.

    Weights that are fake tensors become what ``make_lazy`` gives. Their transposes are left to the caller.
    """
    with _quiet(), traced_lightly():
        try:
            # Its own optimization would need the values of weights, and fills large constants to drop them.
            program = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
        except Exception as error:
            cause = first_cause(error)
            raise ExportError(f"torch.onnx.export failed: {type(cause).__name__}: {first_line(cause)}") from error
        assert program is not None
        model = program.model
        for name, value in model.graph.initializers.items():
            raw = getattr(value.const_value, "raw", None)
            if isinstance(raw, FakeTensor):
                value.const_value = make_lazy(name, raw)
        try:
            _optimize(model)
        except Exception as error:
            cause = first_cause(error)
            if isinstance(cause, T3CompileError):  # of a weight that cannot be read
                raise cause from None
            raise ExportError(
                f"onnxscript cannot clean up the exported graph: {type(cause).__name__}: {first_line(cause)}"
            ) from error
    return model


def _optimize(model: ir.Model) -> None:
    """What torch.onnx.export does, in linear time; weights are not transposed, and no large constant is computed.

    Left out is the rule that makes Split of two Slices: it tries all pairs of the graph's Slices at every node.
    """
    from onnxscript import rewriter
    from onnxscript.optimizer import fold_constants_ir
    from onnxscript.rewriter import onnx_fusions

    rules = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule._target_pattern.has_single_output_node]
    rewrite = rewriter.RewritePass(rules)
    clean = [common.RemoveUnusedNodesPass(), common.RemoveUnusedOpsetsPass()]
    common.InlinePass()(model)
    for _ in range(_ROUNDS):
        folded = fold_constants_ir(model, onnx_shape_inference=True, should_fold=_should_fold).modified
        rewritten = ir.passes.Sequential(rewrite, *clean)(model).modified
        if not folded and not rewritten:
            break
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
    onnx_fusions.fuse(model)


def _should_fold(node: ir.Node) -> bool | None:
    """False for transposes of weights, and where the result is too large to be kept; else as usual."""
    if node.op_type == "Transpose":
        value = node.inputs[0]
        return False if value is not None and isinstance(value.const_value, ir.LazyTensor) else None
    return False if any(map(_is_large, node.outputs)) else None


def _is_large(value: ir.Value) -> bool:
    sizes = [size for size in value.shape or () if isinstance(size, int)]
    return value.shape is not None and len(sizes) == len(value.shape) and math.prod(sizes) > _LARGEST_FOLDED


def first_cause(error: BaseException) -> BaseException:
    """What the errors of the exporter and of onnx_ir wrap: they say at which step it was, their causes say why."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
