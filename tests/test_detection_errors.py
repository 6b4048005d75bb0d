"""What a user reads when a grid, a schedule or a shape is not plain: every message names the values and the way out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import t3compile
from t3compile.cli import main
from t3compile.errors import GridError, PatternError
from t3compile.geometry import TokenGrid
from t3compile.pattern import Schedule
from t3compile.plan import parse_schedule
from t3compile.program import Program, trace

DIM = 8
GRID = TokenGrid(3, 4, 6)
COARSE = TokenGrid(3, 2, 3)


class Stage(nn.Module):
    """Self-attention of the tokens of one resolution, after the patches of the stage."""

    def __init__(self, channels: int, patch: tuple[int, int, int], blocks: int) -> None:
        super().__init__()
        self.patchify = nn.Conv3d(channels, DIM, patch, patch)
        self.blocks = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, DIM, T, H/ph, W/pw]"""
        x = self.patchify(x)
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            q = block(tokens).unsqueeze(1)
            tokens = tokens + scaled_dot_product_attention(q, q, q).squeeze(1)
        return tokens.transpose(1, 2).reshape(x.shape)


class TwoResolutions(nn.Module):
    """Three blocks at 3x4x6 tokens, then two at 3x2x3."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = Stage(4, (1, 2, 2), 3)
        self.coarse = Stage(DIM, (1, 2, 2), 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.coarse(self.fine(x))
        return out


class TwoGrids(nn.Module):
    """Two videos of one size in one sequence."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = torch.cat([x.flatten(2), y.flatten(2)], 2).transpose(1, 2).unsqueeze(1)
        return scaled_dot_product_attention(q, q, q)


class One(nn.Module):
    """One attention call over the tokens; ``options`` go to it."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        q = x.flatten(2).transpose(1, 2).unsqueeze(1)
        return scaled_dot_product_attention(q, q, q, **self.options)


LATENTS = torch.randn(1, DIM, *GRID.sizes, generator=torch.Generator().manual_seed(0))
PACKED = LATENTS.flatten(2)


@pytest.fixture(scope="module")
def two_resolutions() -> Program:
    torch.manual_seed(0)
    return trace(TwoResolutions(), (torch.randn(1, 4, 3, 8, 12),))


@pytest.fixture(scope="module")
def two_grids() -> Program:
    return trace(TwoGrids(), (LATENTS, LATENTS + 1))


@pytest.fixture(scope="module")
def one() -> Program:
    return trace(One(), (LATENTS,))


# --grid


@pytest.mark.parametrize("given", ["3x6x4", "6x4x3", "3x4x6@1"])
def test_a_conflicting_grid_says_what_the_graph_has(one: Program, given: str) -> None:
    with pytest.raises(GridError) as caught:
        t3compile.detect(one, given)
    message = str(caught.value)
    assert f"--grid {given} contradicts the grid 3x4x6" in message
    assert message.endswith("leave --grid out")


def test_a_grid_of_another_size_says_which_sequences_there_are(one: Program) -> None:
    with pytest.raises(GridError) as caught:
        t3compile.detect(one, "3x5x6")
    message = str(caught.value)
    assert "grid 3x5x6 has 90 tokens" in message
    assert "have 72 query tokens; give TxHxW of that many tokens, and TxHxW@START where the grid is a part" in message


@pytest.mark.parametrize("options", [{"is_causal": True}, {"attn_mask": torch.ones(72, 72)}])
def test_a_fitting_grid_is_not_blamed_for_what_else_keeps_a_call_full(options: dict[str, object]) -> None:
    survey = t3compile.detect(trace(One(**options), (PACKED,)), "3x4x6")
    assert [call.reason for call in survey.declined] == ["masked" if "attn_mask" in options else "causal"]


def test_two_grids_of_one_size_ask_for_a_choice_that_works(two_grids: Program) -> None:
    (declined,) = t3compile.detect(two_grids).declined
    assert declined.reason == "two-grids"
    assert declined.is_candidate
    hints = re.search(r"choose with --grid (\S+) or (\S+)$", declined.detail)
    assert hints is not None
    assert hints.groups() == ("3x4x6@0", "3x4x6@72")
    places = [
        (site.grid, site.prefix, site.suffix)
        for hint in hints.groups()
        for site in t3compile.detect(two_grids, hint).found
    ]
    assert places == [(GRID, 0, 72), (GRID, 72, 0)]


def test_a_grid_without_its_start_does_not_choose_between_two(two_grids: Program) -> None:
    with pytest.raises(GridError) as caught:
        t3compile.detect(two_grids, "3x4x6")
    message = str(caught.value)
    assert "--grid 3x4x6 does not say which grid is meant" in message
    assert message.endswith("choose with --grid 3x4x6@0 or 3x4x6@72")


@pytest.mark.parametrize("text", ["3x4", "3x4x6@", "3x4x6@-1", "3x4x6@x", "grid"])
def test_a_malformed_grid_shows_the_form(one: Program, text: str) -> None:
    with pytest.raises(GridError, match=r"is not of the form TxHxW(@START)?, for example"):
        t3compile.detect(one, text)


# Shapes


def test_dynamic_shapes_say_how_to_trace(one: Program) -> None:
    batch = torch.export.Dim("batch", min=2, max=8)
    exported = torch.export.export(One(), (LATENTS.repeat(2, 1, 1, 1, 1),), dynamic_shapes=({0: batch},))
    program = Program(exported.run_decompositions({}), one.weights, "dynamic")
    with pytest.raises(GridError) as caught:
        t3compile.detect(program)
    assert "the graph has dynamic shapes (first at node 'x'" in str(caught.value)
    assert str(caught.value).endswith("t3compile.trace does, and torch.export.export without dynamic_shapes")


def test_sizes_that_depend_on_values_say_so() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x[mask].sum(0)

    program = trace(Counts(), (torch.randn(5, 3), torch.ones(5, dtype=torch.bool)))
    with pytest.raises(GridError, match=r"depends on the values of an input, such as a mask; give the model .*no mask"):
        t3compile.detect(program)


# Several grids


def test_auto_gives_every_grid_its_own_schedule(two_resolutions: Program) -> None:
    survey = t3compile.detect(two_resolutions)
    assert [site.grid for site in survey.found] == [GRID] * 3 + [COARSE] * 2
    assert [site.index for site in survey.found] == [0, 1, 2, 0, 1]
    plan = t3compile.make_plan(survey, min_tokens=0)
    assert [site.pattern.splits.counts for site in plan.sites[:1] if site.pattern] == [(3, 1, 1)]
    for site in plan.sites:
        assert site.pattern is not None
        site.pattern.check_fit(site.grid)
    assert t3compile.verify(two_resolutions, t3compile.rewrite(two_resolutions, plan), plan).passed


@pytest.mark.parametrize("schedule", [[(3, 1, 1), (1, 4, 6)], Schedule.from_splits([(3, 1, 1), (1, 4, 6)])])
def test_a_schedule_too_fine_for_one_grid_names_grids_sites_and_remedy(
    two_resolutions: Program, schedule: object
) -> None:
    survey = t3compile.detect(two_resolutions)
    with pytest.raises(PatternError) as caught:
        t3compile.make_plan(survey, schedule)  # type: ignore[arg-type]
    message = str(caught.value)
    first, fourth = survey.found[0].node, survey.found[3].node
    assert "(1, 4, 6)" in message or "1,4,6" in message
    assert f"3x4x6 (3 sites from '{first}') and 3x2x3 (2 sites from '{fourth}')" in message
    remedy = re.search(r"--schedule '([^']+)', or only some, such as '([^']+)'", message)
    assert remedy is not None
    every, some = (parse_schedule(text) for text in remedy.groups())
    assert all(site.pattern for site in t3compile.make_plan(survey, every, min_tokens=0).sites)
    assert [site.pattern is None for site in t3compile.make_plan(survey, some, min_tokens=0).sites] == [False] * 3 + [
        True
    ] * 2


def test_a_preset_of_one_grid_says_what_to_do_with_the_others(two_resolutions: Program) -> None:
    with pytest.raises(PatternError) as caught:
        t3compile.make_plan(t3compile.detect(two_resolutions), "t3-wan2.1-4k")
    message = str(caught.value)
    assert "preset 't3-wan2.1-4k' was trained at grid 21x136x240" in message
    assert "--schedule '3x4x6=auto;3x2x3=auto'" in message


def test_an_unknown_schedule_is_not_explained_by_grids(two_resolutions: Program) -> None:
    with pytest.raises(PatternError) as caught:
        t3compile.make_plan(t3compile.detect(two_resolutions), "no-such")
    assert "known: auto, t3-wan2.1-4k" in str(caught.value)
    assert "several grids" not in str(caught.value)


def test_a_schedule_that_fits_every_grid_is_used_for_all(two_resolutions: Program) -> None:
    plan = t3compile.make_plan(t3compile.detect(two_resolutions), [(3, 1, 1), (1, 2, 3)])
    counts = [site.pattern.splits.counts for site in plan.sites if site.pattern]
    assert counts == [(3, 1, 1), (1, 2, 3), (3, 1, 1), (3, 1, 1), (1, 2, 3)]


def test_grids_without_a_schedule_stay_full_with_the_reason(two_resolutions: Program) -> None:
    survey = t3compile.detect(two_resolutions)
    plan = t3compile.make_plan(survey, {COARSE: Schedule.from_splits([(3, 2, 1)])})
    assert [site.reason for site in plan.sites] == ["the schedule has no patterns for grid 3x4x6"] * 3 + [""] * 2
    assert t3compile.verify(two_resolutions, t3compile.rewrite(two_resolutions, plan), plan).passed


def test_a_schedule_for_a_grid_that_no_site_has_is_refused(two_resolutions: Program) -> None:
    survey = t3compile.detect(two_resolutions)
    with pytest.raises(PatternError, match=r"names grid 3x4x5, but the sites have 3x4x6 .3 sites.* and 3x2x3 .2 sites"):
        t3compile.make_plan(survey, {TokenGrid(3, 4, 5): "auto"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("3x4x6=3,1,1;auto", r"'auto' names no grid; write for example 21x30x52=5,1,1/1,3,4;21x15x26=auto"),
        ("3x4x6=auto;3x4x6=auto", "names grid 3x4x6 twice; leave one out"),
        ("3x4x6=3,1", "'3,1' is not three whole numbers"),
    ],
)
def test_malformed_schedules_by_grid_show_the_form(text: str, words: str) -> None:
    with pytest.raises(PatternError, match=words):
        parse_schedule(text)


def test_schedules_by_grid_are_read() -> None:
    assert parse_schedule("3x4x6=3,1,1/1,2,3;3x2x3=t3-wan2.1-4k") == {
        GRID: Schedule.from_splits([(3, 1, 1), (1, 2, 3)]),
        COARSE: "t3-wan2.1-4k",
    }


def _written(program: Program, tmp_path: Path) -> str:
    return str(program.save(tmp_path / "model.pt2"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--schedule", "1,4,6"), 2, "the model has sites of several grids"),
        (("--schedule", "3x4x6=1,4,6"), 3, "the schedule has no patterns for grid 3x2x3"),
        (("--schedule", "3x4x6=1,4,6;3x2x3=1,2,3"), 0, "wrote"),
    ],
)
def test_command_line_plans_several_grids(
    two_resolutions: Program, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    path = _written(two_resolutions, tmp_path)
    result = CliRunner().invoke(main, ["plan", path, "-o", str(tmp_path / "plan.json"), *arguments])
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert (tmp_path / "plan.json").exists() == (code != 2)
