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
            raise ExportError(f"torch.onnx.export failed: {type(error).__name__}: {first_line(error)}") from error
    assert program is not None
    return program.model


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
