"""The one call of torch.onnx.export, quiet and with the options every export shares."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch.export import ExportedProgram

from t3compile.errors import ExportError, first_line

OPSET = 23


def export_graph(
    exported: ExportedProgram,
    *,
    output_names: Sequence[str] | None = None,
) -> ir.Model:
    """An exported program as an ONNX model in memory; ExportError with the exporter's reason."""
    with _quiet():
        try:
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                output_names=output_names,
                verbose=False,
            )
        except Exception as error:
            cause = _first_cause(error)
            raise ExportError(f"torch.onnx.export failed: {type(cause).__name__}: {first_line(cause)}") from error
    assert program is not None
    return program.model


def _first_cause(error: BaseException) -> BaseException:
    """What the exporter's own errors wrap: they say at which step it was, their causes say why."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
