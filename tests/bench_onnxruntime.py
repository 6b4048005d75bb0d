"""onnxruntime on this machine's CPU: attention forms by size, and where an exported file spends its time.

    python -m tests.bench_onnxruntime attention [--head-dims 64,128] [--tokens 64,128,...] [--rounds 7]
    python -m tests.bench_onnxruntime profile FILE... [--calls 3]
    python -m tests.bench_onnxruntime memory FILE... [--calls 3]

``attention`` prints a markdown table and the bounds of export/attention_rule.py that follow from it. ``profile``
prints milliseconds by operator, of one call, beside one another. ``memory`` prints what keeping the memory of a call
for the next gains and takes, each setting in a process of its own.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import onnxruntime

from t3compile.benchmark.process_memory import reset_peak, resident
from t3compile.export.attention_forms import ATTENTION_FORMS, spell_attention
from t3compile.export.attention_rule import LEEWAY, AttentionForm, FormBound, derive_rule
from t3compile.export.onnx_engine import DTYPES
from t3compile.export.torch_onnx import OPSET
from t3compile.stopwatch import WallClock

_FLOP = 4e9
_FEWEST_WINDOWS = 4


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call per form, of ``windows`` windows (heads included) of queries and keys."""

    head_dim: int
    queries: int
    keys: int
    windows: int
    seconds: Mapping[AttentionForm, float]

    @property
    def gflops(self) -> dict[AttentionForm, float]:
        """Two products of two operations a multiply-add, over the time."""
        flop = 4 * self.windows * self.queries * self.keys * self.head_dim
        return {form: flop / seconds / 1e9 for form, seconds in self.seconds.items()}


def attention_model(form: AttentionForm, windows: int, queries: int, keys: int, head_dim: int) -> ir.Model:
    """One call of [1, windows, tokens, head_dim] float32, spelled in a form."""
    inputs = [
        ir.Value(name=name, shape=ir.Shape([1, windows, tokens, head_dim]), type=ir.TensorType(ir.DataType.FLOAT))
        for name, tokens in (("q", queries), ("k", keys), ("v", keys))
    ]
    node = ir.Node("", "Attention", inputs, name="attention")
    (output,) = node.outputs
    output.name, output.shape, output.type = "out", inputs[0].shape, inputs[0].type
    graph = ir.Graph(inputs, [output], nodes=[node], name="attention", opset_imports={"": OPSET, "com.microsoft": 1})
    spell_attention(graph, form)
    return ir.Model(graph, ir_version=10)


def time_forms(
    head_dim: int,
    queries: int,
    keys: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    *,
    shared_threads: bool = False,
) -> Timing:
    """All forms in turns, one round to warm up; with ``shared_threads`` after ``share_threads``."""
    windows = max(_FEWEST_WINDOWS, int(_FLOP / (4 * queries * keys * head_dim)))
    generator = np.random.default_rng(0)
    inputs = {
        name: generator.standard_normal((1, windows, tokens, head_dim), dtype=np.float32)
        for name, tokens in (("q", queries), ("k", keys), ("v", keys))
    }
    sessions = {
        form: _session(
            ir.serde.serialize_model(attention_model(form, windows, queries, keys, head_dim)),
            share_threads=shared_threads,
        )
        for form in ATTENTION_FORMS
    }
    times: dict[AttentionForm, list[float]] = {form: [] for form in ATTENTION_FORMS}
    for turn in range(rounds + 1):
        for form, session in sessions.items():
            start = clock()
            session.run(None, inputs)
            if turn:
                times[form].append(clock() - start)
    return Timing(head_dim, queries, keys, windows, {form: statistics.median(s) for form, s in times.items()})


def table(timings: Sequence[Timing]) -> str:
    """Markdown, GFLOP/s."""
    lines = ["| head dim | windows x queries x keys | " + " | ".join(ATTENTION_FORMS) + " |"]
    lines.append("|---" * (2 + len(ATTENTION_FORMS)) + "|")
    for timing in timings:
        rates = " | ".join(f"{timing.gflops[form]:.0f}" for form in ATTENTION_FORMS)
        lines.append(f"| {timing.head_dim} | {timing.windows} x {timing.queries} x {timing.keys} | {rates} |")
    return "\n".join(lines)


def rule_of(timings: Sequence[Timing]) -> tuple[FormBound, ...]:
    """The bounds that windows' times ask for."""
    measured = {(t.head_dim, t.keys): t.seconds for t in timings if t.queries == t.keys}
    return derive_rule(measured)


def share_threads() -> None:
    """Let sessions made from now on share threads: one's own spin after a call, and would slow down the next session's.

    onnxruntime can do so only if no session was made before.
    """
    onnxruntime.set_global_thread_pool_sizes(len(os.sched_getaffinity(0)), 1)


# Of SessionOptions: enable_cpu_mem_arena, enable_mem_pattern.
MEMORY_SETTINGS: Mapping[str, tuple[bool, bool]] = {
    "none kept": (False, False),
    "kept": (True, False),
    "kept, by pattern": (True, True),
}


def _session(
    model: Any, profile: Path | None = None, *, share_threads: bool = False, memory: str = "kept"
) -> onnxruntime.InferenceSession:
    """Memory is kept as 't3compile run' does, unless another setting is named."""
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena, options.enable_mem_pattern = MEMORY_SETTINGS[memory]
    options.log_severity_level = 3
    options.use_per_session_threads = not share_threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def _time_calls(session: onnxruntime.InferenceSession, inputs: Mapping[str, Any], calls: int) -> list[float]:
    return [WallClock().seconds(lambda: session.run(None, inputs)) for _ in range(calls)]


def profile(path: Path, calls: int) -> tuple[float, dict[str, tuple[int, float]]]:
    """Median seconds of a call, and by operator how many run and their milliseconds; the first call is left out."""
    with tempfile.TemporaryDirectory() as folder:
        session = _session(path, Path(folder) / "profile")
        times = _time_calls(session, _inputs(session), calls + 1)
        events = json.loads(Path(session.end_profiling()).read_text())
    ends = sorted(event["ts"] + event["dur"] for event in events if event["name"] == "model_run")
    counts: Counter[str] = Counter()
    milliseconds: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time") and event["ts"] > ends[0]:
            name = event["args"]["op_name"]
            counts[name] += 1
            milliseconds[name] += event["dur"] / 1e3 / calls
    by_operator = {name: (counts[name] // calls, total) for name, total in milliseconds.most_common()}
    return statistics.median(times[1:]), by_operator


def _inputs(session: onnxruntime.InferenceSession) -> dict[str, np.ndarray[Any, Any]]:
    """Normal values; ones where an input is a timestep or the like."""
    generator = np.random.default_rng(0)
    return {
        value.name: (generator.standard_normal(value.shape) if len(value.shape) > 1 else np.ones(value.shape)).astype(
            DTYPES[value.type]
        )
        for value in session.get_inputs()
    }


@dataclass(frozen=True)
class Kept:
    """Seconds of calls in order; bytes that they added to the process at most, and that it holds after them."""

    seconds: tuple[float, ...]
    added_bytes: int
    held_bytes: int


def measure_memory(path: Path, setting: str, calls: int) -> Kept:
    """Call a file in this process, which should be fresh."""
    session = _session(path, memory=setting)
    inputs = _inputs(session)
    before = resident() if reset_peak() else None
    if before is None:
        raise click.ClickException("this system's /proc does not tell the memory of a call")
    times = _time_calls(session, inputs, calls)
    after = resident()
    assert after is not None
    return Kept(
        tuple(times), after.peak_bytes - before.now_bytes, max(0, after.anonymous_bytes - before.anonymous_bytes)
    )


def memory_table(kept: Mapping[tuple[str, str], Kept]) -> str:
    """Markdown: a row per file and setting."""
    lines = ["| file | memory of calls | first call | second | median of the others | added | held after |"]
    lines.append("|---" * 7 + "|")
    for (name, setting), one in kept.items():
        first, second, *others = one.seconds
        lines.append(
            f"| {name} | {setting} | {first:.2f} s | {second:.2f} s | {statistics.median(others):.2f} s | "
            f"{one.added_bytes / 2**20:,.0f} MiB | {one.held_bytes / 2**20:,.0f} MiB |"
        )
    return "\n".join(lines)


def profile_table(profiles: Mapping[str, tuple[float, Mapping[str, tuple[int, float]]]]) -> str:
    """Markdown: a row per operator of any file, its milliseconds and how often it ran in each."""
    totals: Counter[str] = Counter()
    for _, by_operator in profiles.values():
        totals.update({name: milliseconds for name, (_, milliseconds) in by_operator.items()})
    lines = ["| operator | " + " | ".join(profiles) + " |", "|---" * (1 + len(profiles)) + "|"]
    for name, _ in totals.most_common():
        cells = (by_operator.get(name) for _, by_operator in profiles.values())
        texts = ("-" if cell is None else f"{cell[1]:.1f} ms ({cell[0]})" for cell in cells)
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    sums = (sum(ms for _, ms in by_operator.values()) for _, by_operator in profiles.values())
    lines.append("| all operators | " + " | ".join(f"{total:.1f} ms" for total in sums) + " |")
    lines.append("| one call | " + " | ".join(f"{median:.3f} s" for median, _ in profiles.values()) + " |")
    return "\n".join(lines)


def _machine() -> str:
    today = datetime.date.today().isoformat()
    return f"{today}, {_processor()}, onnxruntime {onnxruntime.__version__}, {platform.system()} {platform.machine()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def _numbers(_: click.Context, __: click.Parameter, value: str) -> list[int]:
    return [int(number) for number in value.split(",")]


@click.group()
def main() -> None:
    """Measure onnxruntime on this machine's CPU."""


@main.command()
@click.option("--head-dims", default="64,128", show_default=True, callback=_numbers)
@click.option("--tokens", default="64,128,256,384,512,768,1024,2048,4096", show_default=True, callback=_numbers)
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Timed calls; the median counts.")
def attention(head_dims: list[int], tokens: list[int], rounds: int) -> None:
    """Time every attention form on windows, and print the rule that follows."""
    share_threads()
    timings = [
        time_forms(head_dim, size, size, rounds, shared_threads=True) for head_dim in head_dims for size in tokens
    ]
    click.echo(f"{_machine()}; GFLOP/s, median of {rounds}\n\n{table(timings)}\n")
    click.echo(
        f"MultiHeadAttention where it takes at most {LEEWAY:.0%} of the fastest form's time, for all sizes above:"
    )
    for bound in rule_of(timings):
        click.echo(f"    {bound},")


@main.command(name="profile")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--calls", default=3, show_default=True, type=click.IntRange(1))
def profile_command(files: tuple[Path, ...], calls: int) -> None:
    """Time exported files by operator."""
    profiles = {str(path): profile(path, calls) for path in files}
    click.echo(f"{_machine()}; operators: mean of {calls} calls, one call: median\n\n{profile_table(profiles)}")


@main.command(name="memory")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--calls", default=3, show_default=True, type=click.IntRange(1), help="After the first two.")
def memory_command(files: tuple[Path, ...], calls: int) -> None:
    """Time exported files with and without keeping the memory of a call for the next."""
    kept = {}
    for path in files:
        for setting in MEMORY_SETTINGS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                kept[str(path), setting] = process.submit(measure_memory, path, setting, calls + 2).result()
    click.echo(f"{_machine()}\n\n{memory_table(kept)}")


if __name__ == "__main__":
    main()
