"""Probing: true layouts are confirmed, doctored ones contradicted, mixed tokens left undecided; the command line."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import t3compile
from t3compile.cli import main
from t3compile.errors import InputsError, PlanError
from t3compile.execute import watch
from t3compile.geometry import TokenGrid
from t3compile.pipeline import verify
from t3compile.probing import ProbeReport, probe
from t3compile.program import Program, copy_exported, trace
from t3compile.sites import AttentionSite, GridAxis, SiteSurvey
from tests.tiny_models import HandWrittenDiT

DIM, HEADS = 12, 2
GRID = TokenGrid(3, 4, 5)


class Net(nn.Module):
    """Conv3d patches and projections; what is done with them is the test's own function."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run = run
        self.patchify = nn.Conv3d(4, DIM, (1, 2, 2), (1, 2, 2))
        self.overlapping = nn.Conv3d(4, DIM, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.text_in = nn.Linear(6, DIM)
        self.group_norm = nn.GroupNorm(2, DIM)
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM) for _ in range(3))

    def volume(self, x: Tensor) -> Tensor:
        """[B, 4, T, 2H, 2W] -> [B, T, H, W, dim]"""
        return self.patchify(x).permute(0, 2, 3, 4, 1)

    def attend(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """[B, S, dim] -> [B, S, dim], with the residual."""
        queries = x if queries is None else queries
        q, k, v = (
            y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (self.to_q(queries), self.to_k(x), self.to_v(x))
        )
        return queries + scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.run(self, x, y)


VIDEO = torch.randn(1, 4, 3, 8, 10, generator=torch.Generator().manual_seed(1))
TEXT = torch.randn(1, 7, 6, generator=torch.Generator().manual_seed(2))
FLAT = torch.randn(1, 60, 6, generator=torch.Generator().manual_seed(3))


def plain(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.attend(net.volume(x).flatten(1, 3)))


def joint(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(torch.cat([net.text_in(y), net.volume(x).flatten(1, 3)], 1))


def grid_queries(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """Separate query streams: the grid's queries on the keys of both."""
    tokens = net.volume(x).flatten(1, 3)
    return net.attend(torch.cat([net.text_in(y), tokens], 1), tokens)


def time_innermost(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.volume(x).permute(0, 2, 3, 1, 4).flatten(1, 3))


def packed(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.text_in(y))


def group_norm(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """Statistics over all tokens."""
    tokens = net.volume(x).flatten(1, 3)
    return net.attend(net.group_norm(tokens.transpose(1, 2)).transpose(1, 2))


def overlapping(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.attend(net.overlapping(x).flatten(2).transpose(1, 2))


@functools.cache
def made(run: Callable[..., Tensor], y: Tensor = TEXT, grid: str | None = None) -> tuple[Program, SiteSurvey]:
    torch.manual_seed(0)
    program = trace(Net(run).eval(), (VIDEO, y))
    survey = t3compile.detect(program, grid)
    assert survey.found
    return program, survey


def doctored(survey: SiteSurvey, **changes: Any) -> SiteSurvey:
    """The survey with other claims about the layout of every site."""
    return replace(survey, found=tuple(replace(site, **changes) for site in survey.found))


def claimed(program: Program, site: AttentionSite, **changes: Any) -> SiteSurvey:
    """A survey that holds this one site, with other claims."""
    return replace(t3compile.detect(program), found=(replace(site, **changes),), declined=())


def verdicts(report: ProbeReport) -> list[str]:
    return [site.verdict for site in report.sites]


@pytest.mark.parametrize(
    ("run", "order", "prefixes"),
    [(plain, "thw", (0, 0)), (joint, "thw", (7, 7)), (grid_queries, "thw", (7, 0)), (time_innermost, "hwt", (0, 0))],
)
def test_true_layouts_are_confirmed(run: Callable[..., Tensor], order: str, prefixes: tuple[int, int]) -> None:
    program, survey = made(run)
    site = survey.found[0]
    assert (site.order, site.prefix, site.query_prefix) == (order, *prefixes)
    report = probe(program, survey)
    assert set(verdicts(report)) == {"confirmed"}
    assert [result.node for result in report.sites] == [site.node for site in survey.found]
    assert report.passed
    assert report.sites[0].cells >= 8
    assert f"{report.sites[0].cells} cells of input 'x' each move their own position alone" in report.sites[0].detail


def test_a_whole_model_is_confirmed() -> None:
    torch.manual_seed(0)
    model = HandWrittenDiT(2).eval()
    program = trace(model, model.example_inputs())
    assert verdicts(probe(program, t3compile.detect(program))) == ["confirmed"] * 2


@pytest.mark.parametrize(
    ("run", "changes", "words"),
    [
        (plain, {"order": "hwt"}, "should move position 2 of the queries, but moves 40"),
        (time_innermost, {"order": "thw"}, "should move position 40 of the queries, but moves 2"),
        (joint, {"prefix": 6, "suffix": 1}, "should move position 6 of the keys, but moves 7"),
        (joint, {"query_prefix": 6}, "should move position 6 of the queries, but moves 7"),
        (joint, {"prefix": 0, "query_prefix": 0, "suffix": 7}, "should move position 0 of the queries, but moves 7"),
        (grid_queries, {"query_prefix": 7}, "the queries have 60 positions, but the grid would end at 67"),
        (
            plain,
            {"grid": TokenGrid(3, 5, 4)},
            "grid 3x5x4 has 5 tokens along h, but axis 3 of input 'x' holds 4 patches",
        ),
        (plain, {"grid": TokenGrid(2, 4, 5), "suffix": 20}, "grid 2x4x5 has 2 tokens along t, but axis 2"),
    ],
)
def test_false_layouts_are_contradicted(run: Callable[..., Tensor], changes: dict[str, Any], words: str) -> None:
    program, survey = made(run)
    report = probe(program, doctored(survey, **changes))
    assert set(verdicts(report)) == {"contradicted"}
    assert not report.passed
    assert words in report.sites[0].detail


def test_exchanged_axes_of_one_size_are_contradicted() -> None:
    """Rows for columns on a square grid: sizes cannot tell, the experiment does."""
    torch.manual_seed(0)
    program = trace(Net(plain), (torch.randn(1, 4, 3, 8, 8), TEXT))
    survey = t3compile.detect(program)
    axes = survey.found[0].axes
    report = probe(program, doctored(survey, axes=(axes[0], axes[2], axes[1])))
    assert verdicts(report) == ["contradicted"] * 2
    contradiction = report.sites[0].contradiction
    assert contradiction is not None
    assert (contradiction.cell, contradiction.side) == ((0, 3, 0), "queries")
    assert (contradiction.expected, contradiction.moved) == (12, (3,))


def test_an_axis_of_another_input_is_contradicted_or_moves_nothing() -> None:
    program, survey = made(joint)
    site = survey.found[0]
    elsewhere = claimed(program, site, axes=(GridAxis("nothing", 2, 1), *site.axes[1:]))
    assert "come from several inputs" in probe(program, elsewhere).sites[0].detail
    unused, survey = made(plain)
    report = probe(unused, doctored(survey, grid=TokenGrid(1, 1, 7), axes=(GridAxis("y", 1, 1),), suffix=53))
    assert set(verdicts(report)) == {"inconclusive"}
    assert "changing input 'y' moves no position" in report.sites[0].detail


@pytest.mark.parametrize("run", [group_norm, overlapping])
def test_tokens_mixed_by_other_operations_are_inconclusive(run: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    program = trace(Net(run), (VIDEO, TEXT))
    true = t3compile.detect(trace(Net(plain), (VIDEO, TEXT))).found[0]
    call = next(node for node in program.graph.nodes if "scaled_dot" in str(node.target))
    report = probe(program, claimed(program, true, node=call.name))
    assert verdicts(report) == ["inconclusive"]
    assert "spills: changing grid cell" in report.sites[0].detail
    assert report.passed


def test_packed_tokens_are_confirmed_in_their_order() -> None:
    program, survey = made(packed, FLAT, "3x4x5")
    assert not survey.found[0].axes
    report = probe(program, survey)
    assert verdicts(report) == ["confirmed"]
    assert "the order of the tokens; rows and columns are those of the positions or of --grid" in report.sites[0].detail


@pytest.mark.parametrize("shift", [1, 30])
def test_packed_tokens_elsewhere_are_contradicted(shift: int) -> None:
    def rolled(net: Net, x: Tensor, y: Tensor) -> Tensor:
        return net.attend(torch.cat([net.text_in(y)[:, -shift:], net.text_in(y)[:, :-shift]], 1))

    straight, survey = made(packed, FLAT, "3x4x5")
    torch.manual_seed(0)
    program = trace(Net(rolled), (VIDEO, FLAT))
    call = next(node for node in program.graph.nodes if "scaled_dot" in str(node.target))
    claim = replace(survey, fingerprint=program.fingerprint(), found=(replace(survey.found[0], node=call.name),))
    assert probe(straight, survey).passed
    report = probe(program, claim)
    assert verdicts(report) == ["contradicted"]
    contradiction = report.sites[0].contradiction
    assert contradiction is not None
    assert (contradiction.expected, contradiction.moved) == (0, (shift,))


def test_packed_tokens_inside_a_longer_sequence_of_one_input() -> None:
    program, survey = made(packed, FLAT, "3x3x4@20")
    assert (survey.found[0].prefix, survey.found[0].suffix) == (20, 4)
    assert verdicts(probe(program, survey)) == ["confirmed"]


def test_rows_of_a_flattened_axis() -> None:
    class FlatSpace(nn.Module):
        """Latents [B, C, T, H*W]."""

        def forward(self, x: Tensor) -> Tensor:
            q = x.flatten(2).transpose(1, 2).unsqueeze(1)
            return scaled_dot_product_attention(q, q, q)

    program = trace(FlatSpace(), (torch.randn(1, 8, 3, 20, generator=torch.Generator().manual_seed(0)),))
    assert verdicts(probe(program, t3compile.detect(program, "3x4x5"))) == ["confirmed"]


def test_text_of_the_grids_length_does_not_disturb() -> None:
    """Packed latents beside text with as many tokens: either input might hold the grid."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(packed)

        def forward(self, text: Tensor, latents: Tensor) -> Tensor:
            return self.net.attend(torch.cat([self.net.text_in(text), self.net.text_in(latents)], 1))

    torch.manual_seed(0)
    program = trace(Two(), (torch.randn(1, 60, 6), FLAT))
    survey = t3compile.detect(program, "3x4x5@60")
    assert survey.found[0].prefix == 60
    (result,) = probe(program, survey).sites
    assert result.verdict == "confirmed"
    assert "'latents'" in result.detail


def test_whole_numbers_are_changed_for_others_that_occur() -> None:
    class Codes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, DIM)

        def forward(self, codes: Tensor) -> Tensor:
            q = self.embedding(codes).flatten(1, 3).unsqueeze(1)
            return scaled_dot_product_attention(q, q, q)

    codes = torch.arange(60).remainder(9).reshape(1, 3, 4, 5)
    program = trace(Codes(), (codes,))
    call = next(node for node in program.graph.nodes if "scaled_dot" in str(node.target))
    base = made(plain)[1].found[0]
    axes = (GridAxis("codes", 1, 1), GridAxis("codes", 2, 1), GridAxis("codes", 3, 1))
    assert verdicts(probe(program, claimed(program, base, node=call.name, axes=axes))) == ["confirmed"]
    constant = trace(Codes(), (torch.zeros_like(codes),))
    (result,) = probe(constant, claimed(constant, base, node=call.name, axes=axes)).sites
    assert (result.verdict, result.detail) == ("inconclusive", "nothing of input 'codes' can be changed")


def test_values_that_are_not_finite_prove_nothing() -> None:
    torch.manual_seed(0)
    program = trace(Net(plain), (VIDEO / 0, TEXT))
    (result, _) = probe(program, t3compile.detect(program)).sites
    assert result.verdict == "inconclusive"
    assert "not finite on the example inputs: give others with --inputs FILE" in result.detail


def test_only_named_sites_are_probed_and_unknown_ones_refused() -> None:
    program, survey = made(plain)
    second = survey.found[1].node
    assert [site.node for site in probe(program, survey, sites=[second]).sites] == [second]
    with pytest.raises(PlanError, match=f"'no_such' is no found site: {survey.found[0].node}, {second}"):
        probe(program, survey, sites=["no_such"])


def test_where_sites_are_large_one_stands_for_its_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    program, survey = made(plain)
    monkeypatch.setattr("t3compile.probing._MOST_ELEMENTS", 1)
    (result,) = probe(program, survey).sites
    assert (result.node, result.stands_for) == (survey.found[0].node, tuple(site.node for site in survey.found[1:]))


def test_a_survey_of_another_graph_and_missing_inputs_are_refused() -> None:
    program, survey = made(plain)
    other, _ = made(joint)
    with pytest.raises(PlanError, match="detect the sites of this program again"):
        probe(other, survey)
    exported = copy_exported(program.exported)
    exported.example_inputs = None
    with pytest.raises(InputsError, match="no example inputs; give them with --inputs FILE"):
        probe(replace(program, exported=exported), survey)


def test_watching_computes_only_what_is_needed_and_cuts_the_rest() -> None:
    program, survey = made(plain)
    first, second = (site.node for site in survey.found)
    seen: dict[str, Tensor] = {}
    nodes = {node.name: node for node in program.graph.nodes}
    (user,) = nodes[first].users
    watch(program, {"x": VIDEO, "y": TEXT}, {first: lambda value: seen.update(cut=value)}, cut=[first, second])
    assert seen["cut"].shape == nodes[first].meta["val"].shape
    assert not seen["cut"].any()
    # Without the weights that only the cut call needs nothing is missing.
    needless = {name for name in program.weights.names() if name.startswith("to_")}

    class Fewer:
        def names(self) -> tuple[str, ...]:
            return program.weights.names()

        def load(self, name: str) -> Tensor:
            assert name not in needless
            return program.weights.load(name)

    lean = replace(program, weights=Fewer())
    watch(lean, {"x": VIDEO, "y": TEXT}, {user.name: lambda value: seen.update(user=value)}, cut=[first, second])
    assert seen["user"].shape == user.meta["val"].shape


def test_verify_counts_layouts_among_its_checks() -> None:
    program, survey = made(joint)
    plan = t3compile.make_plan(survey, [(3, 1, 1)])
    rewritten = t3compile.rewrite(program, plan)
    assert not [check for check in verify(program, rewritten, plan).checks if check.kind == "layout"]
    report = verify(program, rewritten, plan, probe=True)
    (layout,) = [check for check in report.checks if check.kind == "layout"]
    assert (layout.passed, layout.error) == (True, 0.0)
    assert layout.magnitude >= 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "joint.pt2"
    made(joint)[0].save(path)
    return str(path)


def test_command_line_shows_confirmed_layouts(model: str, tmp_path: Path) -> None:
    shown = CliRunner().invoke(main, ["inspect", model, "--probe"])
    assert shown.exit_code == 0, shown.output
    assert "Token layouts by experiment: 1 sites probed" in shown.stdout
    assert "confirmed" in shown.stdout
    result = CliRunner().invoke(main, ["inspect", model, "--probe", "--json"])
    probed = json.loads(result.stdout)["probe"]
    assert probed["passed"]
    assert [site["verdict"] for site in probed["sites"]] == ["confirmed"]
    output = tmp_path / "out.pt2"
    command = ["rewrite", model, "--schedule", "3,1,1", "-o", str(output), "--probe", "--json"]
    assert json.loads(CliRunner().invoke(main, command).stdout)["probe"]["passed"]
    checked = CliRunner().invoke(main, ["verify", model, str(output), "--probe"])
    assert checked.exit_code == 0, checked.output
    assert "layout" in checked.stdout


@pytest.mark.parametrize("command", ["inspect", "plan", "rewrite"])
def test_command_line_stops_before_anything_is_written(
    command: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from t3compile import pipeline

    truth = pipeline.find_attention
    monkeypatch.setattr(pipeline, "find_attention", lambda *given: doctored(truth(*given), order="hwt"))
    output = tmp_path / "out"
    arguments = [] if command == "inspect" else ["-o", str(output)]
    result = CliRunner().invoke(main, [command, model, "--schedule", "3,1,1", "--probe", *arguments])
    assert result.exit_code == 1, result.output
    assert "layout contradicted: scaled_dot_product_attention:" in result.stderr
    assert not output.exists()
