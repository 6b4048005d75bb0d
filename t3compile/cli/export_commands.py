"""export and run: from a program to a file that a runtime loads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from t3compile.cli.options import (
    CHECK_FAILED,
    dtype_option,
    json_option,
    model_options,
    read_dtype,
    read_size,
    shielded,
)
from t3compile.cli.steps import load_model
from t3compile.export.runtimes import RUNTIME_NAMES

if TYPE_CHECKING:
    from t3compile.export.store_weights import WeightStorage
    from t3compile.pipeline import ExportReport


@click.command()
@model_options
@json_option
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The file to write.")
@click.option(
    "--target",
    type=click.Choice(["onnx", "aoti"]),
    default="onnx",
    show_default=True,
    help="ONNX, or an AOTInductor package compiled for this machine's CPU (needs a C++ compiler).",
)
@dtype_option("--precision", "Dtype of weights and matrix products; default: as traced.")
@click.option(
    "--attention",
    "form",
    type=click.Choice(["attention", "matmul", "onnxruntime", "auto"]),
    help="How attention is spelled: opset-23 Attention (the default), MatMul-Softmax inside functions, onnxruntime's "
    "MultiHeadAttention; auto: for onnxruntime on CPUs, by size as measured, in a graph cleaned up for it.",
)
@click.option(
    "--weights-dtype",
    type=click.Choice(["float16", "bfloat16", "fp16", "bf16"]),
    callback=read_dtype,
    help="Store float32 weights of matrix products in 16 bits and compute in float32.",
)
@click.option(
    "--quantize",
    type=click.Choice(["int8", "int8-dynamic"]),
    help="Store float32 weights of linear layers in blocks of 8 bits, for onnxruntime, and compute in float32; "
    "int8-dynamic: multiply in 8 bits too.",
)
@click.option("--inline", is_flag=True, help="Write the bodies of ONNX functions in place.")
@click.option(
    "--share-weights",
    is_flag=True,
    help="Point into the safetensors files of the weights, linked or copied beside the .onnx, where bytes agree.",
)
@click.option(
    "--check/--no-check", default=None, help="Run the file and compare with torch; default: unless too large."
)
@shielded
def export(
    as_json: bool,
    output: Path,
    target: str,
    precision: Any,
    form: Any,
    weights_dtype: Any,
    quantize: Any,
    inline: bool,
    share_weights: bool,
    check: bool | None,
    **options: Any,
) -> None:
    """Write MODEL, usually a rewritten .pt2, as ONNX (opset 23, weights as external data) or for another runtime."""
    if target != "onnx" and (form or inline or share_weights or weights_dtype or quantize):
        raise click.UsageError(
            "--attention, --inline, --share-weights, --weights-dtype and --quantize are for --target onnx, not for "
            f"--target {target}"
        )
    if sum(map(bool, (share_weights, weights_dtype, quantize))) > 1:
        raise click.UsageError("--share-weights, --weights-dtype and --quantize exclude one another: take one")
    if precision in ("float16", "bfloat16") and (weights_dtype or quantize):
        raise click.UsageError(f"--precision {precision} leaves no float32 weight to --weights-dtype or --quantize")
    from t3compile.files import check_writable
    from t3compile.report import progress, say

    check_writable(output)
    if target == "aoti":
        from t3compile.export.write_aoti import check_compiler

        check_compiler()
    program = load_model(options)
    with progress() as step:
        if target == "aoti":
            from t3compile.aoti import export_aoti_report

            report = export_aoti_report(program, output, precision=precision, check=check, progress=step)
        else:
            from t3compile.pipeline import export_onnx_report

            report = export_onnx_report(
                program,
                output,
                precision=precision,
                form=form or "attention",
                inline=inline,
                share_weights=share_weights,
                weights=weights_dtype or quantize,
                check=check,
                progress=step,
            )
    if program.plan is None:
        say("note: this model is not rewritten; its attention stays full")
    _show(report, {"onnx": "onnxruntime", "aoti": "the package"}[target], as_json)
    sys.exit(0 if report.passed else CHECK_FAILED)


def _show(report: ExportReport, runs_in: str, as_json: bool) -> None:
    from t3compile.report import say, show_json, show_table

    compared = report.comparison
    if as_json:
        show_json(report.to_json())
    else:
        rows = [("file", report.path), ("functions", ", ".join(report.functions) or "none")]
        if report.attention:
            rows.append(("attention calls", ", ".join(f"{count} {name}" for name, count in report.attention.items())))
        rows += _weight_rows(report.storage) + _rounding_rows(report)
        for one in compared or ():
            result = "ok" if one.passed else "FAILED"
            text = f"error {one.error:.3g} against float64, allowed {one.allowed:.3g}: {result}"
            rows.append((f"{one.name} in {runs_in}", text))
        show_table("Export", ("what", "value"), rows)
    for note in report.notes:
        say(f"warning: {note}")
    if compared is None:
        say(f"not compared with torch: {report.not_compared}")


def _rounding_rows(report: ExportReport) -> list[tuple[str, str]]:
    from t3compile.report import size_bytes

    rounding = report.rounding
    if rounding is None:
        return []
    sizes = f"{size_bytes(rounding.bytes_before)} as {size_bytes(rounding.bytes_after)}"
    rows = [(f"weights in {rounding.kind}", f"{rounding.tensors} tensors, {sizes}")]
    for one in report.distances:
        text = f"largest error {one.error:.3g} at magnitude {one.magnitude:.3g}, relative (rms) {one.relative:.2%}"
        rows.append((f"{one.name} against weights not rounded", text))
    return rows


def _weight_rows(storage: WeightStorage | None) -> list[tuple[str, str]]:
    from t3compile.report import size_bytes

    if storage is None:
        return []
    rows = [("weights written", f"{size_bytes(storage.written_bytes)} in {storage.written_tensors} tensors")]
    if storage.shared_files:
        rows.append(("weights shared", f"{size_bytes(storage.shared_bytes)} in {storage.shared_tensors} tensors"))
    rows += [(f"shared file, {file.how}", f"{file.location} ({file.source})") for file in storage.shared_files]
    rows += [("not shared", f"{size_bytes(count)}: {reason}") for reason, count in storage.not_shared.items()]
    return rows


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option(
    "--inputs", type=click.Path(path_type=Path), required=True, help="Inputs by name: .npz, .pt or .safetensors."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the outputs as .npz.")
@click.option(
    "--runtime",
    type=click.Choice(RUNTIME_NAMES),
    default="auto",
    show_default=True,
    help="auto: by the file's content; onnxruntime: CUDA where it starts, else the CPU.",
)
@click.option("--trust-code", is_flag=True, help="Load an AOTInductor package: it is compiled code, and runs.")
@click.option("--cuda-graph", is_flag=True, help="TensorRT: replay one recorded launch per call.")
@click.option(
    "--refit-from", type=click.Path(path_type=Path), help="TensorRT: the .onnx of an engine with stripped weights."
)
@click.option(
    "--weight-streaming-budget", metavar="SIZE", callback=read_size, help="TensorRT: bytes of weights kept on the GPU."
)
@click.option(
    "--repeat", type=click.IntRange(min=1), default=1, show_default=True, help="Timed calls; the median is printed."
)
@json_option
@shielded
def run(
    engine: Path,
    inputs: Path,
    output: Path | None,
    runtime: str,
    trust_code: bool,
    repeat: int,
    as_json: bool,
    **engine_options: Any,
) -> None:
    """Run an exported file (ONNX, .pt2, AOTInductor package, TensorRT engine); prints shapes, time and peak memory.

    Times are of whole calls: inputs and outputs are in host memory, so a GPU has finished when a call ends.
    """
    from t3compile.export.measure import run_timed
    from t3compile.files import check_writable, staged_outputs
    from t3compile.inputs import read_inputs
    from t3compile.pipeline import load_engine
    from t3compile.report import say, show_json, show_table, size_bytes

    if output is not None:
        check_writable(output)
    named = read_inputs(inputs)
    given = {name: value for name, value in engine_options.items() if value}
    loaded = load_engine(engine, runtime, trust_code=trust_code, **given)
    say(f"runtime: {loaded.runtime}")
    for note in loaded.notes:
        say(f"note: {note}")
    result = run_timed(loaded, named, repeat)
    if output is not None:
        with staged_outputs(output) as stage:
            result.save(stage / output.name)
        say(f"wrote {output}")
    if as_json:
        show_json({"runtime": loaded.runtime, **result.to_json()})
        return
    rows = [(name, str(shape), dtype) for name, shape, dtype in result.outputs]
    show_table("Outputs", ("name", "shape", "dtype"), rows)
    say(f"median {result.median_s:.3f} s over {repeat} calls, peak memory {size_bytes(result.peak_bytes)}")
