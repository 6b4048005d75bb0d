"""The kernel's benchmark where there is no GPU: its table from given times, and that it measures nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from click.testing import CliRunner

from t3compile.geometry import TokenGrid
from t3compile.pattern import Schedule
from t3compile.presets import Preset
from tests import bench_kernel
from tests.bench_kernel import Times, main, table, time_preset

PRESET = Preset(Schedule.from_splits([(2, 1, 1), (1, 2, 3)], name="tiny"), TokenGrid(2, 4, 6), heads=2, head_dim=16)


def test_the_table_has_a_row_per_pattern_and_one_per_cycle() -> None:
    even, other = PRESET.schedule.patterns
    rows = [
        Times("a", even, 100.0, 8.0, 4.0),
        Times("a", other, 100.0, 12.0, 6.0),
        Times("b", even, 5.0, 3.0, None, "no"),
    ]
    assert table(rows).splitlines()[2:] == [
        "| a | (2,1,1) | 100.00 | 8.00 | 4.00 | 25.0x | 2.00x |",
        "| a | (1,2,3) | 100.00 | 12.00 | 6.00 | 16.7x | 2.00x |",
        "| a | cycle of 2 | 200.00 | 20.00 | 10.00 | 20.0x | 2.00x |",
        "| b | (2,1,1) | 5.00 | 3.00 | not run: no | | |",
        "| b | cycle of 1 | 5.00 | 3.00 | not run: not every pattern ran | | |",
    ]


@pytest.mark.parametrize(("heads", "expected"), [(None, 2), (3, 3)])
def test_what_is_timed_has_the_sizes_of_the_preset(heads: int | None, expected: int) -> None:
    shapes: list[torch.Size] = []

    def timer(run: Callable[[], object]) -> float:
        out = run()
        assert isinstance(out, torch.Tensor)
        shapes.append(out.shape)
        return float(len(shapes))

    rows = list(time_preset(PRESET, heads, torch.float32, "cpu", timer))
    assert shapes == [(1, expected, 48, 16)] * 3
    assert [(row.full, row.regrouped, row.kernel) for row in rows] == [(1.0, 2.0, None), (1.0, 3.0, None)]
    assert {row.reason for row in rows} == {"the tensors are on cpu"}


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernel.torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 2
    assert result.stderr == "no CUDA device: not measured\n"
    assert result.stdout == ""


def test_heads_and_depth_of_each_preset_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def time_nothing(preset: Preset, heads: int | None, *_: object) -> list[Times]:
        asked.append(heads)
        return [Times(preset.name, preset.schedule.patterns[0], 4.0, 2.0, 1.0)]

    monkeypatch.setattr(bench_kernel.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_kernel.torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(bench_kernel, "time_preset", time_nothing)
    own = CliRunner().invoke(main, [], catch_exceptions=False).stdout
    assert "t3-wan2.1-4k: 12 heads of 128; t3-wan2.2-4k: 24 heads of 128" in own
    given = CliRunner().invoke(main, ["--heads", "5"], catch_exceptions=False).stdout
    assert "t3-wan2.1-4k: 5 heads of 128; t3-wan2.2-4k: 5 heads of 128" in given
    assert asked == [None, None, 5, 5]
