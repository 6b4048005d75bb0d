"""Detection, planning and rewriting take work that grows linearly with the number of nodes.

Counted in function calls, so that the test says the same on every machine. Run as a program, this file measures
seconds at 15, 30 and 60 blocks of published configurations.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import t3compile
from t3compile.demo import WAN_1_3B
from t3compile.inputs import VideoSize
from t3compile.loading import load_program
from t3compile.passes.find_attention import find_attention
from t3compile.plan import make_plan
from t3compile.program import Program, trace
from t3compile.report import say, show_table
from tests.tiny_models import HandWrittenDiT

FEW, MANY = 3, 9
# Work per node may grow by this factor from FEW to MANY blocks; quadratic work would grow by MANY / FEW.
MOST_GROWTH = 1.2
DIM, HEADS = 16, 2

Result = TypeVar("Result")


class JointDiT(nn.Module):
    """Packed latents [B, S, dim] with position ids [S, 3] and text, in one sequence; rotary tables from the ids."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.latents_in, self.text_in = nn.Linear(4, DIM), nn.Linear(6, DIM)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)]) for _ in range(blocks)
        )

    def forward(self, latents: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        x = torch.cat([self.text_in(text), self.latents_in(latents)], 1)
        ids = torch.cat([torch.zeros(text.shape[1], 3), ids])
        rates = torch.tensor([1.0, 0.1])
        angles = torch.cat([ids[:, axis, None] * rates for axis in (0, 1, 2, 2)], 1)  # [S, DIM / HEADS]
        cos, sin = angles.cos(), angles.sin()
        for qkv, out in self.blocks:  # type: ignore[misc]
            q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in qkv(x).chunk(3, -1))
            q, k = (y * cos + y.roll(1, -1) * sin for y in (q, k))
            x = x + out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x


def cross(blocks: int) -> Program:
    torch.manual_seed(0)
    model = HandWrittenDiT(blocks).eval()
    return trace(model, model.example_inputs())


def joint(blocks: int) -> Program:
    torch.manual_seed(0)
    ids = torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0), torch.arange(5.0))
    return trace(JointDiT(blocks).eval(), (torch.randn(1, 60, 4), torch.randn(1, 7, 6), ids))


def calls_of(work: Callable[[], Result]) -> tuple[int, Result]:
    """How many functions were called, C functions included, and the result."""
    count = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        result = work()
    finally:
        sys.setprofile(before)
    return count, result


@pytest.mark.parametrize("build", [cross, joint])
def test_work_per_node_does_not_grow_with_the_model(build: Callable[[int], Program]) -> None:
    per_node: dict[str, list[float]] = {"detect": [], "plan": [], "rewrite": [], "probe": []}
    for blocks in (FEW, MANY):
        program = build(blocks)
        nodes = len(program.graph.nodes)
        find_attention(program)  # warms what is looked up once
        calls, survey = calls_of(lambda program=program: find_attention(program))
        assert len(survey.found) == blocks
        per_node["detect"].append(calls / nodes)
        calls, plan = calls_of(lambda survey=survey: make_plan(survey, [(3, 1, 1), (1, 2, 2)]))
        per_node["plan"].append(calls / nodes)
        t3compile.rewrite(program, plan)
        calls, rewritten = calls_of(lambda program=program, plan=plan: t3compile.rewrite(program, plan))
        assert rewritten.plan == plan
        per_node["rewrite"].append(calls / nodes)
        calls, report = calls_of(lambda program=program, survey=survey: t3compile.probe(program, survey))
        assert report.passed
        per_node["probe"].append(calls / nodes)
    growth = {name: many / few for name, (few, many) in per_node.items()}
    assert max(growth.values()) < MOST_GROWTH, (growth, per_node)


def test_the_count_tells_quadratic_work() -> None:
    def quadratic(nodes: int) -> int:
        return sum(abs(j) for i in range(nodes) for j in range(i))

    few, many = (calls_of(lambda n=n: quadratic(n))[0] / n for n in (100, 400))
    assert many / few > 2 * MOST_GROWTH


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


def wan_like(blocks: int, folder: Path) -> Program:
    """Wan2.1-1.3B's configuration at 81 frames of 480x832, without weights."""
    (folder / "config.json").write_text(json.dumps(WAN_1_3B | {"num_layers": blocks}))
    return load_program(folder, size=VideoSize())


def flux_like(blocks: int, folder: Path) -> Program:
    """FLUX.1-dev's configuration at 1024x1024, a third of the blocks in the first stack, without weights."""
    layers = {"num_layers": blocks // 3, "num_single_layers": blocks - blocks // 3}
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


def _best_of_three(work: Callable[[], Result]) -> tuple[float, Result]:
    best, result = float("inf"), None
    for _ in range(3):
        start = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - start)
    assert result is not None
    return best, result


def main() -> None:
    """Print a table of seconds for both configurations at three depths."""
    rows = []
    for name, build in (("Wan2.1-1.3B", wan_like), ("FLUX.1-dev", flux_like)):
        for blocks in (15, 30, 60):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                program = build(blocks, Path(folder))
                traced_s = time.perf_counter() - start
            detect_s, survey = _best_of_three(lambda program=program: t3compile.detect(program))
            plan_s, plan = _best_of_three(lambda survey=survey: make_plan(survey))
            rewrite_s, _ = _best_of_three(lambda program=program, plan=plan: t3compile.rewrite(program, plan))
            nodes = len(program.graph.nodes)
            times = [f"{seconds:.2f} s" for seconds in (traced_s, detect_s, plan_s, rewrite_s)]
            per_node = f"{1e6 * (detect_s + plan_s + rewrite_s) / nodes:.0f} us"
            rows.append((name, str(blocks), str(nodes), str(len(survey.found)), *times, per_node))
            say(f"... {name}, {blocks} blocks: {times}")
    columns = (
        "configuration",
        "blocks",
        "nodes",
        "sites",
        "load",
        "detect",
        "plan",
        "rewrite",
        "per node, without load",
    )
    show_table(f"Best of three, {platform.machine()}, torch {torch.__version__}", columns, rows)


if __name__ == "__main__":
    main()
