"""Every zoo model is no worse than recorded, the page shows what is recorded, and the runner itself can fail."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import t3compile
from t3compile.geometry import Splits, TokenGrid
from t3compile.ops.reference import branch_mask
from t3compile.pattern import WindowPattern
from t3compile.plan import Plan
from t3compile.program import Program
from t3compile.sites import AttentionSite, SiteSurvey

pytest.importorskip("diffusers")

from tests.zoo.entry import ZooEntry
from tests.zoo.models import DIFFUSERS, ENTRIES, entry_named, exported_transformers
from tests.zoo.run_entry import STAGES, Row, Stage, fitted_pattern, run_entry
from tests.zoo.table import PAGE, Record, changes, read_records, render
from tests.zoo.window_reference import EagerCall, match_calls, run_windowed, window_masks


def _is_exported_here(name: str) -> bool:
    """Export takes most of a row's time: the suite exports every eighth model, `make models` all of them."""
    return os.environ.get("T3COMPILE_ZOO") == "all" or [entry.name for entry in ENTRIES].index(name) % 8 == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [entry.name for entry in ENTRIES])
def test_model_is_as_recorded(name: str) -> None:
    record = read_records().get(name)
    assert record is not None, f"{name} has no record: run 'make models'"
    onnx = _is_exported_here(name)
    row = run_entry(entry_named(name), onnx=onnx)
    if not onnx:
        row = replace(row, stages={**row.stages, "onnx": Stage(record.status["onnx"])})
    found = changes(row, record)
    assert not found["worse"], f"{name} is worse than recorded: {found}"
    assert not any(found.values()), f"{name} is not as recorded, run 'make models': {found}"


def test_every_exported_transformer_is_in_the_zoo() -> None:
    names = [entry.name for entries in DIFFUSERS.values() for entry in entries]
    assert sorted(names) == sorted(exported_transformers())
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)


def test_the_page_shows_what_is_recorded() -> None:
    records = read_records()
    assert list(records) == [entry.name for entry in ENTRIES]
    assert PAGE.read_text() == render(records)


class _Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-1, -2)) * 0.3).softmax(-1) @ v


class _TwoLayers(nn.Module):
    """Two attentions over a 2x4x3 grid, one by torch's own call; ``spelling`` is how the other is written."""

    def __init__(self, spelling: str = "sdpa") -> None:
        super().__init__()
        self.spelling = spelling
        self.patchify = nn.Conv3d(2, 8, 1)
        self.qkv = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.attention = _Attention()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patchify(x).flatten(2).transpose(1, 2)
        for number, qkv in enumerate(self.qkv):
            q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in qkv(tokens).chunk(3, dim=-1))
            if number == 1 and self.spelling == "softmax":
                y = functional.softmax((q @ k.transpose(-1, -2)) * 0.3, dim=-1) @ v
            elif number == 1 and self.spelling == "module":
                y = self.attention(q, k, v)
            elif number == 1 and self.spelling == "grouped":
                y = functional.scaled_dot_product_attention(q, k[:, :1], v[:, :1], scale=0.3, enable_gqa=True)
            else:
                y = functional.scaled_dot_product_attention(q, k, v, scale=0.3)
            tokens = tokens + y.transpose(1, 2).flatten(2)
        return tokens


GRID = TokenGrid(2, 4, 3)
SMALL = ZooEntry("small", _TwoLayers, lambda: {"x": torch.randn(1, 2, *GRID.sizes)}, grid_sites=2, grid=GRID)


def _statuses(row: Row) -> dict[str, str]:
    return {name: stage.status for name, stage in row.stages.items()}


@pytest.fixture(scope="module")
def small_row() -> Row:
    return run_entry(SMALL)


def test_a_model_passes_every_stage(small_row: Row) -> None:
    assert set(_statuses(small_row).values()) == {"ok"}
    assert (small_row.found, small_row.expected, small_row.grids, small_row.declined) == (2, 2, ("2x4x3",), {})
    assert json.loads(json.dumps(small_row.to_json())) == {**small_row.to_json(), "grids": ["2x4x3"]}


def test_wrong_splits_at_one_site_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = t3compile.rewrite

    def sabotaged(program: Program, plan: Plan) -> Program:
        first, last = plan.sites
        assert last.pattern is not None
        if not last.pattern.is_full():
            plan = replace(plan, sites=(first, replace(last, pattern=WindowPattern(Splits(2, 1, 3)))))
        return right(program, plan)

    monkeypatch.setattr(t3compile, "rewrite", sabotaged)
    row = run_entry(SMALL, onnx=False)
    assert _statuses(row) == dict.fromkeys(STAGES, "ok") | {"windows": "failed", "onnx": "not run"}
    assert "output 0 differs by" in row.stages["windows"].phrase


def test_swapped_patterns_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = t3compile.rewrite

    def sabotaged(program: Program, plan: Plan) -> Program:
        first, last = plan.sites
        swapped = (replace(first, pattern=last.pattern), replace(last, pattern=first.pattern))
        return right(program, replace(plan, sites=swapped))

    monkeypatch.setattr(t3compile, "rewrite", sabotaged)
    row = run_entry(SMALL, onnx=False)
    assert row.stages["identity"].status == "ok"
    assert row.stages["windows"].status == "failed"


def test_a_rewrite_that_does_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t3compile, "rewrite", lambda program, plan: program)
    row = run_entry(SMALL, onnx=False)
    assert row.stages["identity"].status == "ok"
    assert row.stages["windows"].status == "failed"


def test_a_wrong_grid_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = t3compile.detect

    def sabotaged(program: Program, grid: Any) -> SiteSurvey:
        survey = right(program, grid)
        return replace(survey, found=tuple(replace(site, grid=TokenGrid(2, 3, 4)) for site in survey.found))

    monkeypatch.setattr(t3compile, "detect", sabotaged)
    row = run_entry(SMALL, onnx=False)
    assert row.stages["sites"] == Stage("failed", "grids 2x3x4 instead of 2x4x3")


def test_a_wrong_expected_count_is_seen(small_row: Row) -> None:
    row = run_entry(replace(SMALL, grid_sites=3), onnx=False)
    assert row.stages["sites"] == Stage("failed", "2 of 3 sites found")
    assert _statuses(row) == _statuses(small_row) | {"sites": "failed", "onnx": "not run"}


def test_a_wrong_graph_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = t3compile.trace

    def sabotaged(model: nn.Module, kwargs: dict[str, Any]) -> Program:
        with torch.no_grad():
            model.get_parameter("qkv.0.bias").add_(1e-3)
        return right(model, kwargs=kwargs)

    monkeypatch.setattr(t3compile, "trace", sabotaged)
    assert run_entry(SMALL, onnx=False).stages["graph"].status == "failed"


def test_windows_without_effect_are_no_proof() -> None:
    class Deaf(_TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0 + x.sum()

    row = run_entry(replace(SMALL, build=Deaf), onnx=False)
    assert row.stages["windows"].status == "failed"
    assert "change nothing" in row.stages["windows"].phrase


def test_a_model_that_cannot_run_hides_nothing_else() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no such model")

    row = run_entry(ZooEntry("broken", Broken, lambda: {"x": torch.zeros(1)}, grid_sites=1, grid=GRID))
    assert row.stages["eager"] == Stage("failed", "ValueError: no such model")
    assert row.stages["trace"].status == "failed"
    assert row.stages["onnx"] == Stage("not run")


@pytest.mark.parametrize("spelling", ["sdpa", "softmax", "module", "grouped"])
def test_the_reference_reads_every_spelling(spelling: str) -> None:
    """Windows under which every key is seen change nothing but rounding; one window of one token gives the values."""
    torch.manual_seed(0)
    model = _TwoLayers(spelling)
    if spelling == "module":
        model.attention_calls = lambda: [model.attention]  # type: ignore[assignment]
    inputs = {"x": torch.randn(1, 2, *GRID.sizes)}
    modules = spelling == "module"
    full, calls = run_windowed(model, inputs, {}, modules=modules)
    last = len(calls) - 1
    assert calls[last] == EagerCall("sdpa" if spelling == "grouped" else spelling, 24, 24)  # type: ignore[arg-type]
    everything = torch.ones(24, 24, dtype=torch.bool)
    same, again = run_windowed(model, inputs, {last: [everything, everything]}, modules=modules)
    assert again == calls
    assert (same - full).abs().max() <= 4 * torch.finfo(torch.float32).eps * full.abs().max()
    single, _ = run_windowed(model, inputs, {last: [torch.eye(24, dtype=torch.bool)]}, modules=modules)
    tokens = model.patchify(inputs["x"]).flatten(2).transpose(1, 2)
    with torch.no_grad():
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in model.qkv[0](tokens).chunk(3, dim=-1))
        y = functional.scaled_dot_product_attention(q, k, v, scale=0.3)
        tokens = tokens + y.transpose(1, 2).flatten(2)
        values = model.qkv[1](tokens).chunk(3, dim=-1)[2].unflatten(-1, (2, 4))
        values = values[:, :, :1].expand_as(values) if spelling == "grouped" else values
        expected = tokens + values.flatten(2)
    assert (single - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps * expected.abs().max()


def test_multi_head_attention_of_torch_is_one_call() -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, x, x, need_weights=False)[0]

    x = torch.randn(1, 5, 8)
    out, calls = run_windowed(Model(), {"x": x}, {})
    assert calls == [EagerCall("sdpa", 5, 5)]
    single, _ = run_windowed(Model(), {"x": x}, {0: [torch.eye(5, dtype=torch.bool)]})
    with torch.no_grad():
        values = functional.linear(x, layer.in_proj_weight[16:], layer.in_proj_bias[16:])
        expected = layer.out_proj(values)
    assert (single - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (out - expected).abs().max() > 1e-3


def _site(**changes: Any) -> AttentionSite:
    fields: dict[str, Any] = {
        "node": "a",
        "module": "",
        "stack": "",
        "index": 0,
        "grid": GRID,
        "prefix": 2,
        "suffix": 1,
        "batch": 1,
        "heads": 1,
        "head_dim": 4,
        "value_dim": 4,
        "dtype": "float32",
        **changes,
    }
    return AttentionSite(**fields)


def test_masks_of_frame_major_sites_are_the_reference_masks() -> None:
    pattern = WindowPattern(Splits(2, 2, 3))
    masks = window_masks(_site(), pattern)
    expected = [branch_mask(GRID, pattern, branch, prefix=2, suffix=1) for branch in pattern.branches]
    assert all(torch.equal(mask, other) for mask, other in zip(masks, expected, strict=True))
    alone = window_masks(_site(query_prefix=0, query_suffix=0), pattern)
    assert all(torch.equal(mask, other[2:-1]) for mask, other in zip(alone, expected, strict=True))


def test_masks_follow_the_order_of_the_sequence() -> None:
    pattern = WindowPattern(Splits(2, 2, 3))
    site = _site(order="hwt", query_prefix=0, query_suffix=3)
    places = [(t, h, w) for h in range(4) for w in range(3) for t in range(2)]
    for branch, mask in zip(pattern.branches, window_masks(site, pattern), strict=True):
        frame_major = branch_mask(GRID, pattern, branch)
        assert mask.shape == (27, 27)
        assert mask[24:].all()
        assert mask[:, :2].all()
        assert mask[:, 26:].all()
        for i, query in enumerate(places):
            for j, key in enumerate(places):
                assert mask[i, 2 + j] == frame_major[GRID.index(*query), GRID.index(*key)]


def test_neighbours_have_different_patterns_that_fit() -> None:
    for grid in (TokenGrid(3, 4, 6), TokenGrid(1, 4, 4), TokenGrid(1, 1, 2)):
        for number in range(4):
            fitted_pattern(number, grid).check_fit(grid)
    for grid in (TokenGrid(3, 4, 6), TokenGrid(1, 4, 4)):
        assert fitted_pattern(0, grid) != fitted_pattern(1, grid)


def test_calls_are_matched_in_order() -> None:
    sdpa = [EagerCall("sdpa", 24, 24), EagerCall("sdpa", 24, 8)]
    softmax = EagerCall("softmax", 24, 4)
    assert match_calls(sdpa, [(24, 24), (24, 8)]) == [0, 1]
    assert match_calls([softmax, *sdpa], [(24, 24), (24, 8)]) == [1, 2]
    assert match_calls([sdpa[0], softmax, EagerCall("softmax", 24, 8)], [(24, 24), (24, 8)]) == [0, 2]
    assert match_calls([EagerCall("module", 24, 24), *sdpa], [(24, 24)]) == [0]
    assert isinstance(match_calls(sdpa, [(24, 8), (24, 24)]), str)
    assert isinstance(match_calls(sdpa, [(24, 24)]), str)
    assert isinstance(match_calls([softmax], [(24, 24)]), str)


def test_what_changed_is_told_apart(small_row: Row) -> None:
    record = Record.of(small_row)
    assert Record.from_json("small", json.loads(json.dumps(record.to_json()))) == record
    assert not any(changes(small_row, record).values())
    failed = replace(small_row, stages={**small_row.stages, "onnx": Stage("failed", "no kernel")})
    assert changes(failed, record) == {"worse": ["onnx: ok -> failed (no kernel)"], "better": [], "other": []}
    assert changes(small_row, Record.of(failed))["better"] == ["onnx: failed -> ok"]
    assert changes(replace(small_row, found=1), record)["worse"] == ["sites: 2/2 -> 1/2"]
    assert changes(replace(small_row, declined={"masked": 1}), record)["other"] == ["declined: {} -> {'masked': 1}"]
