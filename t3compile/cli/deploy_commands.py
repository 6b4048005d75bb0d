"""deploy: the files with which another runtime serves a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from t3compile.cli.options import json_option, shielded


@click.group()
def deploy() -> None:
    """Write the files that a production runtime loads."""


@deploy.command("triton-server")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The model repository's folder.")
@click.option("--name", help="The model's name there; default: the file's name without its suffix.")
@click.option("--version", type=click.IntRange(min=1), default=1, show_default=True, help="The version to write.")
@click.option("--instances", type=click.IntRange(min=1), default=1, show_default=True, help="Instances per device.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "gpu"]),
    default="auto",
    show_default=True,
    help="Where the server runs it; auto: a GPU if the server has one.",
)
@click.option(
    "--accelerator",
    type=click.Choice(["cuda", "tensorrt"]),
    help="For an .onnx on a GPU, the execution provider; default: cuda.",
)
@click.option("--link", is_flag=True, help="Hard links, not copies; Python's onnx then refuses MODEL's weights.")
@click.option("--force", is_flag=True, help="Replace a model of that name; its lower versions stay.")
@json_option
@shielded
def triton_server(
    model: Path,
    output: Path,
    name: str | None,
    version: int,
    instances: int,
    device: Any,
    accelerator: Any,
    link: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write MODEL, an .onnx or a TensorRT engine with its manifest, as a model of Triton Inference Server."""
    from t3compile.export.triton_server import deploy_triton_server
    from t3compile.report import say, show_json, show_table

    done = deploy_triton_server(
        model,
        output,
        name=name,
        version=version,
        instances=instances,
        device=device,
        accelerator=accelerator,
        link=link,
        force=force,
    )
    config = done.config
    if as_json:
        show_json(done.to_json())
    else:
        sides = (("input", config.inputs), ("output", config.outputs))
        rows = [
            (side, tensor.name, tensor.data_type.removeprefix("TYPE_"), str(list(tensor.dims)))
            for side, tensors in sides
            for tensor in tensors
        ]
        show_table(f"Served by {config.backend} as '{config.name}'", ("", "name", "data type", "dims"), rows)
    for note in config.notes:
        say(f"note: {note}")
    say(f"wrote {done.path}, version {done.version}; weights {'linked' if done.linked else 'copied'}")
    say(f"serve it with: tritonserver --model-repository={output.resolve()}")
