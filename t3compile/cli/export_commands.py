"""export and run: from a program to a file that a runtime loads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from t3compile.cli.options import CHECK_FAILED, json_option, model_options, shielded
from t3compile.cli.steps import load_model


@click.command()
@model_options
@json_option
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The .onnx to write.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Dtype of weights and matrix products; default: as traced.",
)
@click.option(
    "--attention",
    "form",
    type=click.Choice(["attention", "matmul", "onnxruntime"]),
    default="attention",
    show_default=True,
    help="Attention inside functions: opset-23 Attention, MatMul-Softmax, or onnxruntime's MultiHeadAttention.",
)
@click.option("--inline", is_flag=True, help="Write function bodies in place.")
@click.option("--check/--no-check", default=None, help="Compare with torch in onnxruntime; default: unless too large.")
@shielded
def export(
    as_json: bool, output: Path, precision: Any, form: Any, inline: bool, check: bool | None, **options: Any
) -> None:
    """Write MODEL, usually a rewritten .pt2, as ONNX (opset 23), weights as external data."""
    from t3compile.files import check_writable
    from t3compile.pipeline import export_onnx_report
    from t3compile.report import progress, say, show_json, show_table

    check_writable(output)
    program = load_model(options)
    with progress() as step:
        report = export_onnx_report(
            program, output, precision=precision, form=form, inline=inline, check=check, progress=step
        )
    if program.plan is None:
        say("note: this model is not rewritten; its attention stays full")
    compared = report.comparison
    if as_json:
        show_json(report.to_json())
    else:
        rows = [("file", report.path), ("functions", ", ".join(report.functions) or "none")]
        for one in compared or ():
            result = "ok" if one.passed else "FAILED"
            text = f"error {one.error:.3g} against float64, allowed {one.allowed:.3g}: {result}"
            rows.append((f"{one.name} in onnxruntime", text))
        show_table("Export", ("what", "value"), rows)
    for note in report.notes:
        say(f"warning: {note}")
    if compared is None:
        say(f"not compared with torch: {report.not_compared}")
    sys.exit(0 if report.passed else CHECK_FAILED)


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option(
    "--inputs", type=click.Path(path_type=Path), required=True, help="Inputs by name: .npz, .pt or .safetensors."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the outputs as .npz.")
@click.option("--runtime", type=click.Choice(["auto", "onnxruntime", "torch"]), default="auto", show_default=True)
@click.option(
    "--repeat", type=click.IntRange(min=1), default=1, show_default=True, help="Timed calls; the median is printed."
)
@json_option
@shielded
def run(engine: Path, inputs: Path, output: Path | None, runtime: str, repeat: int, as_json: bool) -> None:
    """Run an exported file (.onnx or .pt2) on inputs; prints shapes, time and peak memory."""
    from t3compile.export.measure import run_timed
    from t3compile.files import check_writable, staged_outputs
    from t3compile.inputs import read_inputs
    from t3compile.pipeline import load_engine
    from t3compile.report import say, show_json, show_table, size_bytes

    if output is not None:
        check_writable(output)
    named = read_inputs(inputs)
    result = run_timed(load_engine(engine, runtime), named, repeat)
    if output is not None:
        with staged_outputs(output) as stage:
            result.save(stage / output.name)
        say(f"wrote {output}")
    if as_json:
        show_json(result.to_json())
        return
    rows = [(name, str(shape), dtype) for name, shape, dtype in result.outputs]
    show_table("Outputs", ("name", "shape", "dtype"), rows)
    say(f"median {result.median_s:.3f} s over {repeat} calls, peak memory {size_bytes(result.peak_bytes)}")
