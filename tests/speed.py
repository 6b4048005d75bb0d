"""Seconds that every step takes at several depths: `make speed`, a table, JSON and a plot.

They are the processor's, of one thread: what else the machine does hardly changes them. Garbage is collected as rarely
as by the commands; Python's own setting looks at all that lives again and again, which makes saving 1.5 times as long.
No step but export, and loading, which traces, may take longer than tracing the same model, and all grow with the
number of blocks. The narrow model has Wan's blocks with so few channels and tokens that arithmetic takes no time; the
others are published configurations without weights, for the steps that need none.
"""

from __future__ import annotations

import gc
import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch

import t3compile
from t3compile.cli.options import rare_collections
from t3compile.demo import WAN_1_3B
from t3compile.errors import MissingExtraError
from t3compile.inputs import VideoSize
from t3compile.loading import load_program
from t3compile.passes.canonicalization import canonicalize
from t3compile.pipeline import export_onnx_report
from t3compile.plan import make_plan
from t3compile.program import Program
from t3compile.report import say, show_table
from t3compile.verification import VerifyReport

DEPTHS = (1, 10, 40, 80)
# The step that all others are held against, and those that may take longer.
TRACING, SLOWER = "trace", ("load", "export")
STEPS = ("trace", "detect", "plan", "rewrite", "verify", "save", "export")
_NEED_WEIGHTS = ("verify", "save", "export")
# Steps are repeated for some seconds, and the best is taken; long ones are not.
_REPEATS, _REPEATED_S = 3, 10.0
# Two rows are linear where seconds per block grow by no more than this from the smaller depth to the larger.
MOST_GROWTH = 1.3

NARROW = WAN_1_3B | {
    "attention_head_dim": 16,
    "ffn_dim": 64,
    "freq_dim": 32,
    "num_attention_heads": 2,
    "text_dim": 32,
}
NARROW_SIZE = VideoSize(frames=9, height=96, width=96, text_tokens=8)

# Source: Hugging Face black-forest-labs/FLUX.1-dev, transformer/config.json; published with 19 + 38 layers.
FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}


def narrow(blocks: int, folder: Path) -> Program:
    """Wan's blocks, 2 heads of 16 over 3x6x6 tokens, with random weights."""
    (folder / "config.json").write_text(json.dumps(NARROW | {"num_layers": blocks}))
    return load_program(folder, size=NARROW_SIZE, random_weights=True)


def wan_like(blocks: int, folder: Path) -> Program:
    """Wan2.1-1.3B's configuration at 81 frames of 480x832, without weights."""
    (folder / "config.json").write_text(json.dumps(WAN_1_3B | {"num_layers": blocks}))
    return load_program(folder, size=VideoSize())


def flux_like(blocks: int, folder: Path) -> Program:
    """FLUX.1-dev's configuration at 1024x1024, a third of the blocks in the first stack, without weights."""
    joint = max(1, blocks // 3)
    layers = {"num_layers": joint, "num_single_layers": blocks - joint}
    (folder / "config.json").write_text(json.dumps(FLUX | layers))
    image_ids = torch.cartesian_prod(torch.zeros(1), torch.arange(64.0), torch.arange(64.0))
    inputs = {
        "hidden_states": torch.randn(1, 4096, 64),
        "encoder_hidden_states": torch.randn(1, 512, 4096),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(512, 3),
    }
    return load_program(folder, inputs=inputs)


MODELS: Mapping[str, Callable[[int, Path], Program]] = {
    "narrow Wan": narrow,
    "Wan2.1-1.3B": wan_like,
    "FLUX.1-dev": flux_like,
}
SCHEDULES = {
    "narrow Wan": [(3, 1, 1), (1, 2, 2)],
    "Wan2.1-1.3B": [(3, 1, 1), (1, 2, 2)],
    "FLUX.1-dev": [(1, 4, 1), (1, 2, 2)],
}


@dataclass(frozen=True)
class Row:
    """One model at one depth: graph nodes, sites, and seconds by step."""

    model: str
    blocks: int
    nodes: int
    sites: int
    seconds: Mapping[str, float]

    def slower_than_tracing(self) -> dict[str, float]:
        """Steps that take longer than tracing and may not, with how many times as long."""
        tracing = self.seconds.get(TRACING, float("inf"))
        return {step: s / tracing for step, s in self.seconds.items() if s > tracing and step not in SLOWER}


def measure(model: str, blocks: int, steps: Sequence[str] = STEPS) -> Row:
    """Time these steps of a model at a depth, and loading; those that need weights only where it has them."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say(f"... {model}, {blocks} blocks: load")
        start = time.process_time()
        program = canonicalize(MODELS[model](blocks, folder))
        seconds["load"] = time.process_time() - start
        assert program.retrace is not None
        retrace, (args, kwargs) = program.retrace, program.example_inputs
        survey = t3compile.detect(program)
        plan = make_plan(survey, SCHEDULES[model])
        rewritten = t3compile.rewrite(program, plan)
        work: dict[str, Callable[[], object]] = {
            "trace": lambda: retrace(args, kwargs),
            "detect": lambda: t3compile.detect(program),
            "plan": lambda: make_plan(survey, SCHEDULES[model]),
            "rewrite": lambda: t3compile.rewrite(program, plan),
            "verify": lambda: _proved(t3compile.verify(program, rewritten, plan)),
            "save": lambda: rewritten.save(folder / "x.pt2"),
            "export": lambda: export_onnx_report(rewritten, folder / "x.onnx", check=False),
        }
        for step in steps:
            if model == "narrow Wan" or step not in _NEED_WEIGHTS:
                say(f"... {model}, {blocks} blocks: {step}")
                seconds[step] = _best(work[step])
    return Row(model, blocks, len(program.graph.nodes), len(survey.found), seconds)


def _proved(report: VerifyReport) -> None:
    assert report.passed, report


def _best(work: Callable[[], object]) -> float:
    best, begun = float("inf"), time.process_time()
    for _ in range(_REPEATS):
        gc.collect()
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
        if time.process_time() - begun > _REPEATED_S:
            break
    return best


def growth(few: Row, many: Row) -> dict[str, float]:
    """By what factor the seconds of each step for one more node grew between two depths."""
    ratio = many.nodes / few.nodes
    return {step: many.seconds[step] / s / ratio for step, s in few.seconds.items() if step in many.seconds}


def read_rows(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """All rows in order of models and depths, a model at a depth once; of a step that both have, the newer time."""
    rows: dict[tuple[str, int], Row] = {}
    for row in (*old, *new):
        before = rows.get((row.model, row.blocks))
        seconds = {**(before.seconds if before is not None else {}), **row.seconds}
        ordered = {step: seconds[step] for step in ("load", *STEPS) if step in seconds}
        rows[row.model, row.blocks] = replace(row, seconds=ordered)
    return sorted(rows.values(), key=lambda row: (list(MODELS).index(row.model), row.blocks))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    machine = {"torch": torch.__version__, "machine": platform.machine()}
    path.write_text(json.dumps({**machine, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def show(rows: Sequence[Row]) -> None:
    """The table on stdout; on stderr what is slower than tracing or grows faster than the graph."""
    steps = list(dict.fromkeys(step for row in rows for step in row.seconds))
    times = [[f"{row.seconds[step]:.3g}" if step in row.seconds else "-" for step in steps] for row in rows]
    cells = [
        (row.model, str(row.blocks), str(row.nodes), str(row.sites), *shown)
        for row, shown in zip(rows, times, strict=True)
    ]
    title = f"Processor seconds of one thread, {platform.machine()}, torch {torch.__version__}"
    show_table(title, ("model", "blocks", "nodes", "sites", *steps), cells)
    for row in rows:
        for step, factor in row.slower_than_tracing().items():
            say(f"slower than tracing: {step}, {row.model}, {row.blocks} blocks: {factor:.2f} times as long")
    for few, many in pairwise(rows):
        if few.model == many.model and few.blocks >= 10:
            for step, factor in growth(few, many).items():
                if factor > MOST_GROWTH:
                    say(f"not linear: {step}, {few.model}, {few.blocks} to {many.blocks} blocks: {factor:.2f} a node")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Seconds over blocks, a panel per model; tracing is the dashed line."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        raise MissingExtraError("matplotlib", "plot", "drawing the steps (--plot)") from None
    models = list(dict.fromkeys(row.model for row in rows))
    figure, panels = pyplot.subplots(1, len(models), figsize=(4.6 * len(models), 3.6), squeeze=False)
    for model, axes in zip(models, panels[0], strict=True):
        own = [row for row in rows if row.model == model]
        for number, step in enumerate(step for step in own[0].seconds if step != "load"):
            line: dict[str, Any] = {"color": f"C{number}", "marker": "o", "markersize": 3}
            if step == TRACING:
                line = {"color": "black", "linestyle": "--", "linewidth": 2}
            points = [(row.blocks, row.seconds[step]) for row in own if step in row.seconds]
            axes.plot(*zip(*points, strict=True), label=step, **line)
        axes.set_title(model)
        axes.set_xlabel("blocks")
        axes.set_ylabel("processor seconds")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    # No date and no version: the same figures give the same file.
    figure.savefig(path, dpi=80, metadata={"Software": None})
    pyplot.close(figure)


@click.command()
@click.option("--model", "models", type=click.Choice(list(MODELS)), multiple=True, help="Default: all.")
@click.option("--blocks", type=click.IntRange(min=1), multiple=True, help="Default: 1 10 40 80.")
@click.option("--step", "steps", type=click.Choice(STEPS), multiple=True, help="Default: all.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Add the rows to this file.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Write a PNG of all rows.")
@click.option("--only-plot", is_flag=True, help="Measure nothing.")
def main(
    models: tuple[str, ...],
    blocks: tuple[int, ...],
    steps: tuple[str, ...],
    json_path: Path | None,
    plot_path: Path | None,
    only_plot: bool,
) -> None:
    """Measure the steps at several depths."""
    # Arithmetic is not what is measured; threads that wait for each other would be.
    torch.set_num_threads(1)
    rows = [] if json_path is None else read_rows(json_path)
    for model in () if only_plot else models or tuple(MODELS):
        for depth in blocks or DEPTHS:
            with rare_collections():
                rows = merged(rows, [measure(model, depth, steps or STEPS)])
            if json_path is not None:
                write_rows(json_path, rows)
    show(rows)
    if plot_path is not None:
        plot(rows, plot_path)


if __name__ == "__main__":
    main()
