"""Wan 14B at 4K through every command, from a sharded checkpoint larger than memory: wall time and peak memory of each.

Run by `make bench-14b` or `python -m tests.bench_14b [--layers 40] [--folder DIR]`; not one of the tests. The
checkpoint holds random numbers and is written streaming; whatever was written is deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Source: Hugging Face Wan-AI/Wan2.1-T2V-14B-Diffusers, transformer/config.json.
WAN_14B = {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 40,
    "num_layers": 40,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
# Token grid (21, 136, 240): five seconds at 4K.
SIZE = ["--frames", "81", "--height", "2176", "--width", "3840", "--text-tokens", "512"]
SHARD_BYTES = 5 * 2**30
STEM = "diffusion_pytorch_model"


def write_checkpoint(folder: Path, config: Mapping[str, object], *, shard_bytes: int = SHARD_BYTES) -> int:
    """Write a diffusers folder with bfloat16 weights of random numbers, in shards; returns the bytes of the weights.

    No more than one block of random numbers is held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    shards = _split(_shapes(config), shard_bytes)
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(2**26, generator=generator) * 0.02).to(torch.bfloat16)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(shards, start=1):
        name = f"{STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shapes, name)
        total += _write_shard(folder / name, shapes, block, number)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    return total


def _shapes(config: Mapping[str, object]) -> dict[str, torch.Size]:
    import diffusers

    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel.from_config(dict(config))
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _split(shapes: Mapping[str, torch.Size], shard_bytes: int) -> list[dict[str, torch.Size]]:
    shards: list[dict[str, torch.Size]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size and size + 2 * shape.numel() > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * shape.numel()
    return shards


def _write_shard(path: Path, shapes: Mapping[str, torch.Size], block: Tensor, seed: int) -> int:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = memoryview(block.view(torch.uint8).numpy())
    at = 2 * 1009 * seed  # no two tensors are alike
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = 2 * shape.numel()
            while left:
                part = data[at : at + left]
                file.write(part)
                left -= len(part)
                at = (at + len(part) + 2 * 1009) % len(data)
    return end


# Peak resident memory of every command, seconds of inspect, and of rewrite and export together beyond copying.
MOST_BYTES = 4 * 2**30
MOST_INSPECT_S = 30.0
MOST_REWRITE_AND_EXPORT_S = 120.0


@dataclass(frozen=True)
class Run:
    """One command in a process of its own: seconds, highest resident memory, and of that not backed by files."""

    name: str
    wall_s: float
    cpu_s: float
    peak_bytes: int
    peak_anonymous_bytes: int
    written_bytes: int


def run_command(name: str, *arguments: str | Path, writes: Path | None = None) -> Run:
    """Run one t3compile command; RuntimeError with its messages when it fails."""
    command = [sys.executable, "-m", "t3compile", *map(str, arguments)]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=messages)
        peak = anonymous = finished = 0
        try:
            while not finished:
                memory = _memory(process.pid)
                peak, anonymous = max(peak, memory.get("VmHWM", 0)), max(anonymous, memory.get("RssAnon", 0))
                time.sleep(0.02)
                finished, status, usage = os.wait4(process.pid, os.WNOHANG)
        finally:
            if not finished:
                process.terminate()
                process.wait()
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - start
        # 3: done, but some attention was left full.
        if process.returncode not in (0, 3):
            messages.seek(0)
            raise RuntimeError(f"{name} failed with {process.returncode}: {messages.read().decode()[-2000:]}")
    written = 0 if writes is None else sum(file.stat().st_size for file in _made(writes))
    return Run(name, wall, usage.ru_utime + usage.ru_stime, peak, anonymous, written)


def _memory(pid: int) -> dict[str, int]:
    """Bytes by name; rusage would count what this process held when it forked."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM:", "RssAnon:"))
    }


def _made(path: Path) -> list[Path]:
    """An output and what lies beside it under its name, links left out."""
    return [file for file in path.parent.glob(f"{path.name}*") if file.stat().st_nlink == 1]


def _remove(path: Path) -> None:
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()


def _copy_seconds(source: Path, target: Path) -> float:
    """How long a plain copy of the checkpoint takes here; the copy is removed."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


@contextmanager
def scratch_folder(parent: Path | None) -> Iterator[Path]:
    """A new folder in ``parent`` that is removed at the end, also when the run is stopped."""
    folder = Path(tempfile.mkdtemp(prefix="bench-14b.", dir=parent))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_all(folder: Path, layers: int) -> tuple[list[Run], float]:
    """All commands on a checkpoint of so many layers, and the seconds of copying its files once."""
    checkpoint = folder / "wan"
    start = time.perf_counter()
    total = write_checkpoint(checkpoint, {**WAN_14B, "num_layers": layers})
    _say(f"checkpoint of {layers} layers: {total / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s")
    model: list[str | Path] = [checkpoint, *SIZE]
    inside, outside, onnx = folder / "inside.pt2", folder / "outside.pt2", folder / "model.onnx"
    runs: list[Run] = []

    def add(name: str, *arguments: str | Path, writes: Path | None = None) -> None:
        runs.append(run_command(name, *arguments, writes=writes))
        _show(runs[-1])

    add("inspect", "inspect", *model)
    add("plan", "plan", *model, "-o", folder / "plan.json")
    plan = ("--plan", folder / "plan.json")
    add(
        "rewrite, weights external",
        "rewrite",
        *model,
        *plan,
        "-o",
        outside,
        "--store-weights",
        "external",
        writes=outside,
    )
    add("export, weights shared", "export", outside, "-o", onnx, "--share-weights", "--no-check", writes=onnx)
    _remove(onnx)
    add("export, weights copied", "export", outside, "-o", onnx, "--no-check", writes=onnx)
    _remove(onnx)
    _remove(outside)
    add("rewrite, weights inside", "rewrite", *model, *plan, "-o", inside, "--no-verify", writes=inside)
    _remove(inside)
    copied = _copy_seconds(checkpoint, folder / "copy")
    _say(f"copying the checkpoint's files one by one: {copied:.1f} s")
    return runs, copied


def failures(runs: list[Run], copied_s: float) -> list[str]:
    """The limits that were not kept."""
    by_name = {run.name: run for run in runs}
    failed = [f"{run.name}: {run.peak_bytes / 2**30:.2f} GiB" for run in runs if run.peak_bytes > MOST_BYTES]
    if by_name["inspect"].wall_s > MOST_INSPECT_S:
        failed.append(f"inspect: {by_name['inspect'].wall_s:.0f} s, at most {MOST_INSPECT_S:.0f} s")
    together = by_name["rewrite, weights external"].wall_s + by_name["export, weights copied"].wall_s
    most = MOST_REWRITE_AND_EXPORT_S + copied_s
    if together > most:
        failed.append(f"rewrite and export: {together:.0f} s, at most {most:.0f} s")
    return failed


def _show(run: Run) -> None:
    _say(
        f"{run.name:<28}{run.wall_s:8.1f} s wall {run.cpu_s:8.1f} s cpu   peak {run.peak_bytes / 2**30:5.2f} GiB, "
        f"anonymous {run.peak_anonymous_bytes / 2**30:5.2f} GiB   wrote {run.written_bytes / 1e9:6.2f} GB"
    )


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def main() -> None:
    """Run the benchmark; exits with 1 when a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--folder", type=Path, help="where about twice the checkpoint (57 GB for 40 layers) has room")
    options = parser.parse_args()
    with scratch_folder(options.folder) as folder:
        failed = failures(*run_all(folder, options.layers))
    for text in failed:
        _say(f"limit not kept: {text}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
