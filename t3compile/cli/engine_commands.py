"""build-engine: from a model or an ONNX file to a TensorRT engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from t3compile.cli.options import dtype_option, json_option, model_options, read_size, refuse_options, shielded
from t3compile.cli.steps import load_model


@click.command("build-engine")
@model_options
@json_option
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The .engine to write.")
@dtype_option(
    "--precision",
    "Dtype of weights and matrix products; norms and RoPE stay float32. An .onnx must be in it. Default: as is.",
)
@click.option(
    "--attention",
    type=click.Choice(["auto", "plugin", "native"]),
    default="auto",
    show_default=True,
    help="Window attention as plugin layers, as TensorRT's own, or the faster of both, built and timed.",
)
@click.option(
    "--workspace",
    metavar="SIZE",
    callback=read_size,
    help="Limit of the builder's scratch memory on the GPU, e.g. 8GiB.",
)
@click.option("--timing-cache", type=click.Path(path_type=Path), help="Timings of earlier builds, read and written.")
@click.option("--weight-streaming", is_flag=True, help="Let weights stay in host memory at run time.")
@click.option("--strip-weights", is_flag=True, help="Leave the weights out; the .onnx refits them when it is loaded.")
@click.option("--opt-level", type=click.IntRange(0, 5), help="0 builds fastest, 5 searches longest.")
@shielded
def build_engine(
    as_json: bool,
    output: Path,
    precision: Any,
    attention: Any,
    workspace: int | None,
    timing_cache: Path | None,
    weight_streaming: bool,
    strip_weights: bool,
    opt_level: int | None,
    **options: Any,
) -> None:
    """Build a TensorRT engine of MODEL, usually a rewritten .pt2, or of an exported .onnx.

    Needs TensorRT 10.13, 10.15 or newer and the GPU that the engine will run on. Writes OUTPUT, its manifest
    (OUTPUT.manifest.json) and its layers (OUTPUT.layers.json).
    """
    from t3compile.building import build_engine as build
    from t3compile.building import check_refittable
    from t3compile.export.build_engine import PURPOSE
    from t3compile.export.build_network import BuildSettings
    from t3compile.export.tensorrt_api import load_tensorrt_and_device
    from t3compile.files import check_writable
    from t3compile.loading.recognize import recognize
    from t3compile.report import progress, say, show_json

    model, settings = (
        options["model"],
        BuildSettings(workspace, timing_cache, weight_streaming, strip_weights, opt_level),
    )
    is_onnx = _is_onnx(model)
    if is_onnx:
        refuse_options(options.keys() - {"model"}, f"'{model}' is no model to load")
    else:
        recognize(model)
        check_refittable(settings)
    check_writable(output)
    # Before the model is loaded, which may take minutes.
    load_tensorrt_and_device(PURPOSE)
    source = Path(model) if is_onnx else load_model(options)
    with progress() as step:
        report = build(
            source,
            output,
            precision=precision,
            attention=attention,
            settings=settings,
            progress=step,
        )
    if as_json:
        show_json(report.to_json())
    else:
        _show(report)
    for note in report.notes:
        say(f"warning: {note}")


def _is_onnx(model: str) -> bool:
    from t3compile.loading.recognize import looks_like_onnx

    path = Path(model)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return looks_like_onnx(file.read(64))


def _show(report: Any) -> None:
    from t3compile.report import show_table, size_bytes

    manifest = report.manifest
    check = manifest.layer_check
    rows = [
        ("engine", f"{report.path}, {size_bytes(manifest.engine_bytes)}"),
        ("for", f"TensorRT {manifest.tensorrt_version}, compute capability {manifest.compute_capability}"),
        ("precision", manifest.precision),
        ("attention", manifest.lowering),
        ("attention layers", f"{check['attention_found']} of {check['attention_expected']} as expected"),
    ]
    rows += [(f"median call, {name}", f"{1e3 * seconds:.2f} ms") for name, seconds in manifest.times_s.items()]
    for side, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
        rows += [(side, str(spec)) for spec in specs]
    show_table("Engine", ("what", "value"), rows)
