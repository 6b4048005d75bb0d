"""The whole line on Wan2.1-T2V-1.3B's published configuration, with fewer layers and random weights.

Run by `make demo`; every step is a command that a user would type. `make bench` measures the same model at length.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t3compile.report import count, say, show_table, size_bytes

# Source: Hugging Face Wan-AI/Wan2.1-T2V-1.3B-Diffusers, transformer/config.json; published with 30 layers.
WAN_1_3B = {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 12,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
LAYERS = 2
# Grid 7x30x52: 480p, one second of 25 frames.
SIZE = ["--frames", "25", "--height", "480", "--width", "832", "--text-tokens", "512"]
# The rewritten model must reach this share of its whole-model MAC ratio as time.
REQUIRED_SHARE = 0.6


def write_model(folder: Path) -> Path:
    """The configuration of the demo's model as a diffusers folder without weights, inside ``folder``."""
    model = folder / f"wan2.1-1.3b-{LAYERS}-layers"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(WAN_1_3B | {"num_layers": LAYERS}, indent=2))
    return model


def _command(*arguments: str | Path) -> Any:
    """Run one t3compile command, shown as it would be typed; its JSON result if it was asked for one."""
    texts = [str(argument) for argument in arguments]
    say(f"\n$ t3compile {' '.join(texts)}")
    as_json = "--json" in texts
    done = subprocess.run(
        [sys.executable, "-m", "t3compile", *texts], stdout=subprocess.PIPE if as_json else None, check=False
    )
    if done.returncode != 0:
        say(f"the command failed with exit code {done.returncode}")
        sys.exit(1)
    return json.loads(done.stdout) if as_json else None


@dataclass(frozen=True)
class _Timing:
    median_s: float
    peak_bytes: int


def _write_inputs(path: Path) -> None:
    """Random latents, a timestep and text embeddings of the demo's size."""
    generator = np.random.default_rng(0)
    np.savez(
        path,
        hidden_states=generator.standard_normal((1, 16, 7, 60, 104), dtype=np.float32),
        timestep=np.full((1,), 500.0, dtype=np.float32),
        encoder_hidden_states=generator.standard_normal((1, 512, 4096), dtype=np.float32),
    )


def _compare(folder: Path) -> dict[str, _Timing]:
    """One call of the full and of the rewritten model, each in a process of its own."""
    timings = {}
    for name in ("full", "windows"):
        files = (folder / f"{name}.onnx", "--inputs", folder / "inputs.npz", "-o", folder / f"{name}.npz")
        result = _command("run", *files, "--json")
        timings[name] = _Timing(result["median_s"], result["peak_memory_bytes"])
    return timings


def _show(cost: dict[str, Any], timings: dict[str, _Timing], error: float, magnitude: float) -> float:
    full, windows = timings["full"], timings["windows"]
    speedup = full.median_s / windows.median_s
    rows = [
        (
            "MACs, attention over the grid",
            count(cost["dense_attention_macs"]),
            count(cost["planned_attention_macs"]),
            f"{cost['attention_factor']:.2f}x",
        ),
        ("MACs, whole model", count(cost["dense_macs"]), count(cost["planned_macs"]), f"{cost['model_factor']:.2f}x"),
        ("time of one forward pass", f"{full.median_s:.2f} s", f"{windows.median_s:.2f} s", f"{speedup:.2f}x"),
        (
            "peak memory of the process",
            size_bytes(full.peak_bytes),
            size_bytes(windows.peak_bytes),
            f"{full.peak_bytes / windows.peak_bytes:.2f}x",
        ),
    ]
    show_table(f"onnxruntime, CPU ({platform.machine()})", ("", "full", "windows", "gain"), rows)
    share: float = speedup / cost["model_factor"]
    print(f"time gain / MAC gain: {share:.0%} (at least {REQUIRED_SHARE:.0%} is expected)")  # noqa: T201
    print(f"rewritten model, onnxruntime against torch: largest error {error:.3g} at magnitude {magnitude:.3g}")  # noqa: T201
    return share


def main() -> None:
    """Run the demo; exits with 1 when a step fails or the gain is too small."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    options = parser.parse_args()
    start = time.perf_counter()
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    model = write_model(folder)
    _write_inputs(folder / "inputs.npz")

    source: list[str | Path] = [model, "--random-weights", *SIZE]
    _command("inspect", *source)
    rewritten = _command("rewrite", *source, "-o", folder / "windows.pt2", "--json")
    _command("export", folder / "windows.pt2", "-o", folder / "windows.onnx", "--no-check")
    _command("export", *source, "-o", folder / "full.onnx", "--no-check")
    timings = _compare(folder)
    in_torch = folder / "torch.npz"
    _command("run", folder / "windows.pt2", "--inputs", folder / "inputs.npz", "-o", in_torch)
    with np.load(folder / "windows.npz") as ours, np.load(in_torch) as reference:
        error = float(np.abs(ours["output"] - reference["output"]).max())
        magnitude = float(np.abs(reference["output"]).max())
    print()  # noqa: T201
    share = _show(rewritten["cost"], timings, error, magnitude)
    say(f"{time.perf_counter() - start:.0f} s in all; files are in {folder}/")
    sys.exit(0 if share >= REQUIRED_SHARE else 1)


if __name__ == "__main__":
    main()
