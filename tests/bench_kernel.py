"""Times on a GPU: full attention, window attention on regrouped tokens, and the kernel, for both presets.

    python -m tests.bench_kernel [--heads N] [--dtype bfloat16] [--repeats 5]

Each preset has the heads of its model, unless told otherwise. Prints a markdown table with hardware and date. Without
a CUDA device nothing is measured, and the exit code is 2.
"""

from __future__ import annotations

import datetime
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import click
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from t3compile.ops import WindowAttentionArgs
from t3compile.ops.dispatch import choose_path
from t3compile.ops.launch_kernel import launch_kernel
from t3compile.ops.regrouped_attention import window_attention
from t3compile.ops.time_tiles import cuda_milliseconds
from t3compile.pattern import WindowPattern
from t3compile.presets import PRESETS, Preset

# Milliseconds of one run.
Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one layer's attention; None where a path does not run, with the reason for the kernel."""

    preset: str
    pattern: WindowPattern
    full: float
    regrouped: float
    kernel: float | None
    reason: str = ""


def time_preset(preset: Preset, heads: int | None, dtype: torch.dtype, device: str, timer: Timer) -> Iterator[Times]:
    """The patterns of a preset at the grid that it was trained at, q, k and v [1, heads, S, D] tokens first.

    ``heads`` None: those of the preset, whose head dim D is.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, preset.grid.tokens, heads or preset.heads, preset.head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with torch.no_grad():
        full = timer(lambda: scaled_dot_product_attention(q, k, v))
        for pattern in preset.schedule.patterns:
            args = WindowAttentionArgs(preset.grid, pattern)
            yield _time_pattern(preset.name, q, k, v, args, full, timer)


def _time_pattern(
    preset: str, q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, full: float, timer: Timer
) -> Times:
    regrouped = timer(lambda: window_attention(q, k, v, args))
    choice = choose_path(q, k, v, args)
    if choice.path != "kernel":
        return Times(preset, args.pattern, full, regrouped, None, choice.reason)
    return Times(preset, args.pattern, full, regrouped, timer(lambda: launch_kernel(q, k, v, args)))


def table(times: Sequence[Times]) -> str:
    """Markdown: a row per pattern and one per cycle, the sum over a preset's patterns."""
    lines = [
        "| preset | splits | full attention (ms) | regrouped (ms) | kernel (ms) | kernel over full | over regrouped |",
        "|---|---|---|---|---|---|---|",
    ]
    for preset in dict.fromkeys(row.preset for row in times):
        rows = [row for row in times if row.preset == preset]
        lines += [_row(preset, str(row.pattern), row.full, row.regrouped, row.kernel, row.reason) for row in rows]
        kernels = [row.kernel for row in rows if row.kernel is not None]
        whole = sum(kernels) if len(kernels) == len(rows) else None
        full, regrouped = sum(row.full for row in rows), sum(row.regrouped for row in rows)
        lines.append(_row(preset, f"cycle of {len(rows)}", full, regrouped, whole, "not every pattern ran"))
    return "\n".join(lines)


def _row(preset: str, name: str, full: float, regrouped: float, kernel: float | None, reason: str) -> str:
    start = f"| {preset} | {name} | {full:.2f} | {regrouped:.2f} |"
    if kernel is None:
        return f"{start} not run: {reason} | | |"
    return f"{start} {kernel:.2f} | {full / kernel:.1f}x | {regrouped / kernel:.2f}x |"


@click.command()
@click.option("--heads", type=click.IntRange(1), help="Attention heads; default: those of each preset.")
@click.option("--dtype", default="bfloat16", show_default=True, type=click.Choice(["bfloat16", "float16", "float32"]))
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="Timed runs; the median counts.")
def main(heads: int | None, dtype: str, repeats: int) -> None:
    """Time full attention, regrouped tokens and the kernel on this machine's GPU."""
    if not torch.cuda.is_available():
        click.echo("no CUDA device: not measured", err=True)
        sys.exit(2)
    times = []
    for preset in PRESETS:
        for row in time_preset(
            preset,
            heads,
            getattr(torch, dtype),
            "cuda",
            lambda run: cuda_milliseconds(run, warmup=1, repeats=repeats),
        ):
            click.echo(f"{row.preset} {row.pattern}: done", err=True)
            times.append(row)
    click.echo(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, {platform.machine()}, "
        f"{datetime.date.today().isoformat()}; {dtype}, median of {repeats}"
    )
    sizes = (f"{preset.name}: {heads or preset.heads} heads of {preset.head_dim}" for preset in PRESETS)
    click.echo(f"{'; '.join(sizes)}\n")
    click.echo(table(times))


if __name__ == "__main__":
    main()
