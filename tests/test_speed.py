"""Every step takes work that grows linearly with the number of nodes.

Counted in function calls, so that the test says the same on every machine; speed.py measures seconds.
"""

from __future__ import annotations

import cProfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import t3compile
from t3compile.passes.find_attention import find_attention
from t3compile.pipeline import ONNX_LEGALIZATION, export_onnx_report, load_program
from t3compile.plan import make_plan
from t3compile.program import Program, trace
from tests import speed
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
    profile = cProfile.Profile()
    result = profile.runcall(work)
    return sum(entry.callcount for entry in profile.getstats()), result


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


# Verification and export run whole models: fewer blocks, so that the test is quick.
ONE, SOME = 1, 4


@pytest.fixture(scope="module")
def programs() -> dict[int, Program]:
    return {blocks: cross(blocks) for blocks in (ONE, SOME)}


def _growth(work: Callable[[int], object], programs: dict[int, Program]) -> float:
    """By what factor the calls for one node grow from ONE to SOME blocks."""
    # What is looked up once.
    work(ONE)
    few, many = (calls_of(lambda n=n: work(n))[0] / len(program.graph.nodes) for n, program in programs.items())
    return many / few


def _rewritten(program: Program, *splits: tuple[int, int, int]) -> Program:
    return t3compile.rewrite(program, make_plan(find_attention(program), splits or [(3, 1, 1), (1, 2, 2)]))


def test_verification_does_work_for_every_node_once_and_less_than_tracing(programs: dict[int, Program]) -> None:
    rewritten = {n: _rewritten(program) for n, program in programs.items()}

    def verify(blocks: int) -> None:
        plan = rewritten[blocks].plan
        assert plan is not None
        assert t3compile.verify(programs[blocks], rewritten[blocks], plan).passed

    assert _growth(verify, programs) < MOST_GROWTH
    retrace, (args, kwargs) = programs[SOME].retrace, programs[SOME].example_inputs
    assert retrace is not None
    assert calls_of(lambda: verify(SOME))[0] < calls_of(lambda: retrace(args, kwargs))[0]


def test_saving_and_loading_do_work_for_every_node_once(programs: dict[int, Program], tmp_path: Path) -> None:
    rewritten = {n: _rewritten(program) for n, program in programs.items()}
    assert _growth(lambda n: rewritten[n].save(tmp_path / f"{n}.pt2"), programs) < MOST_GROWTH
    assert _growth(lambda n: load_program(tmp_path / f"{n}.pt2"), programs) < MOST_GROWTH


def test_export_does_work_for_every_node_once(programs: dict[int, Program], tmp_path: Path) -> None:
    # One pattern, whose function is exported before the calls are counted.
    rewritten = {n: _rewritten(program, (1, 2, 2)) for n, program in programs.items()}

    def export(blocks: int) -> None:
        export_onnx_report(rewritten[blocks], tmp_path / f"{blocks}.onnx", check=False)

    assert _growth(lambda n: [legalize(rewritten[n]) for legalize in ONNX_LEGALIZATION], programs) < MOST_GROWTH
    assert _growth(export, programs) < MOST_GROWTH


# --- what `make speed` says of its figures -------------------------------------------------------


def _row(blocks: int, **seconds: float) -> speed.Row:
    return speed.Row("narrow Wan", blocks, 100 * blocks, blocks, {"load": 9.0, "trace": 1.0, **seconds})


def test_slow_steps_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    speed.show([_row(10, detect=0.1, verify=0.5), _row(40, detect=0.4, verify=4.0, export=9.0)])
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "slower than tracing: verify, narrow Wan, 40 blocks: 4.00 times as long",
        "not linear: verify, narrow Wan, 10 to 40 blocks: 2.00 a node",
    ]
    assert "narrow Wan  40      4000   40     9     1      0.4" in shown.out


def test_measurements_add_up_in_their_file(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    first, second = _row(10, detect=0.1), replace(_row(10, detect=0.2), seconds={"detect": 0.2})
    speed.write_rows(path, speed.merged(speed.read_rows(path), [_row(40), first]))
    speed.write_rows(path, speed.merged(speed.read_rows(path), [second]))
    rows = speed.read_rows(path)
    assert [row.blocks for row in rows] == [10, 40]
    assert rows[0].seconds == {"load": 9.0, "trace": 1.0, "detect": 0.2}


@pytest.mark.parametrize("model", ["narrow Wan", "FLUX.1-dev"])
def test_steps_of_every_model_can_be_measured(model: str) -> None:
    row = speed.measure(model, 1, ["detect", "plan"])
    assert list(row.seconds) == ["load", "detect", "plan"]
    assert all(seconds > 0 for seconds in row.seconds.values())
    assert row.nodes > 100
    assert row.sites == 1


def test_rows_are_plotted_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    row = _row(1, detect=0.1, plan=0.1)
    for name in ("one.png", "two.png"):
        speed.plot([row, _row(10, detect=0.1, plan=0.1)], tmp_path / name)
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert one.startswith(b"\x89PNG")
    assert one == two
    assert len(one) < 60_000


def test_the_count_tells_quadratic_work() -> None:
    def quadratic(nodes: int) -> int:
        return sum(abs(j) for i in range(nodes) for j in range(i))

    few, many = (calls_of(lambda n=n: quadratic(n))[0] / n for n in (100, 400))
    assert many / few > 2 * MOST_GROWTH
