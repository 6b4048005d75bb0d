"""Options that commands share, exit codes, and how a command ends in front of the user."""

from __future__ import annotations

import functools
import gc
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from t3compile.errors import T3CompileError, UnfinishedOutputWarning
from t3compile.files import own_temporary_folder
from t3compile.interruption import Stopped, remove_unfinished, stoppable

CHECK_FAILED = 1
BAD_INPUT = 2
LEFT_FULL = 3
STOPPED_BY_KEYBOARD = 130

Command = TypeVar("Command", bound=Callable[..., Any])

_SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def _options(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def dtype_option(name: str, text: str) -> Callable[[Any], Any]:
    """An option that takes a dtype in torch's spelling or TensorRT's short one, and gives torch's."""
    return click.option(
        name, type=click.Choice([*_SHORT_DTYPES.values(), *_SHORT_DTYPES]), callback=read_dtype, help=text
    )


def read_dtype(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """torch's name of a dtype."""
    return None if value is None else _SHORT_DTYPES.get(value, value)


model_options = _options(
    click.argument("model"),
    click.option("--trust-pickle", is_flag=True, help="Unpickle MODEL: it can run code."),
    click.option("--inputs", type=click.Path(path_type=Path), help="Example inputs: .pt, .npz or .safetensors."),
    click.option(
        "--weights",
        type=click.Path(path_type=Path),
        multiple=True,
        help="Safetensors files for a diffusers folder, in its own or the original naming; for a .pt2 that refers to "
        "its weights, the folder they are in.",
    ),
    click.option("--random-weights", is_flag=True, help="Seeded random weights for a diffusers folder."),
    click.option("--seed", type=int, default=0, help="Seed of --random-weights."),
    dtype_option("--dtype", "Dtype to trace in."),
    click.option("--frames", type=int, help="Video size in pixels, for diffusers folders."),
    click.option("--height", type=int),
    click.option("--width", type=int),
    click.option("--text-tokens", type=int),
    click.option("--batch", type=int),
    click.option("--vae-factors", metavar="TxHxW", help="How much the VAE shrinks frames, height, width."),
)
grid_option = click.option("--grid", metavar="TxHxW", help="Token grid, where the graph does not tell it.")
plan_options = _options(
    click.option(
        "--schedule",
        default="auto",
        show_default=True,
        help="auto, t3-wan2.1-4k, t3-wan2.2-4k, or splits n_t,n_h,n_w joined by '/'; TxHxW=SCHEDULE;TxHxW=SCHEDULE "
        "for a model of several grids.",
    ),
    click.option("--min-tokens", type=click.IntRange(min=0), help="Under auto, shorter sequences stay full."),
)
plan_option = click.option(
    "--plan", "plan_file", type=click.Path(path_type=Path), help="A plan file instead of --schedule."
)
probe_option = click.option(
    "--probe",
    is_flag=True,
    help="Check token layouts by experiment: change single patches of the inputs and see which tokens move.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def read_size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Bytes of 4GiB, 500MB or 1073741824."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", value.strip().lower())
    size = int(float(found.group(1)) * _UNITS[found.group(2) or ""]) if found else 0
    if size < 1:
        raise click.BadParameter(f"'{value}' is not a size; give e.g. 4GiB, 500MB or a number of bytes")
    return size


def refuse_options(names: Iterable[str], reason: str) -> None:
    """UsageError for options of these parameter names that were given, where they would have no effect."""
    context, wanted = click.get_current_context(), set(names)
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in wanted and context.get_parameter_source(parameter.name) is not ParameterSource.DEFAULT
    ]
    if given:
        raise click.UsageError(f"{reason}: leave out {', '.join(given)}")


def shielded(command: Command) -> Command:
    """Errors of the user are one line and exit code 2; a stopped run cleans up, says so, and exits as shells expect."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            with stoppable(), own_temporary_folder(), rare_collections(), warnings.catch_warnings():
                warnings.showwarning = _say_leftovers(warnings.showwarning)
                return command(*args, **kwargs)
        except T3CompileError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(BAD_INPUT)
        except KeyboardInterrupt as stop:
            click.echo(remove_unfinished(), err=True)
            sys.exit(stop.exit_code if isinstance(stop, Stopped) else STOPPED_BY_KEYBOARD)

    return run  # type: ignore[return-value]


@contextmanager
def rare_collections() -> Iterator[None]:
    """Collect garbage after 50,000 new objects: graphs are made of many that all live on, looked at in vain."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _say_leftovers(show: Callable[..., None]) -> Callable[..., None]:
    def say(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if issubclass(category, UnfinishedOutputWarning):
            click.echo(f"note: {message}", err=True)
        else:
            show(message, category, *args, **kwargs)

    return say
