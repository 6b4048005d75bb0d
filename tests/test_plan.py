"""Plans: chosen on integers, written as JSON, checked on reading, bound to one graph."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t3compile.errors import PatternError, PlanError
from t3compile.geometry import Splits, TokenGrid
from t3compile.pattern import Schedule, WindowPattern
from t3compile.plan import Plan, SitePlan, make_plan, parse_schedule, plan_warnings
from t3compile.presets import preset_named
from t3compile.schedule import generate_schedule
from t3compile.sites import AttentionSite, ModelCounts, SiteSurvey

FINGERPRINT = "f" * 64
LARGE, SMALL = TokenGrid(21, 30, 52), TokenGrid(3, 4, 5)


def site(index: int, grid: TokenGrid = LARGE, stack: str = "blocks.*", **fields: Any) -> AttentionSite:
    given = {
        "node": f"{stack.split('.')[0]}_{index}",
        "module": stack.replace("*", str(index)),
        "stack": stack,
        "index": index,
        "grid": grid,
        "prefix": 0,
        "suffix": 0,
        "batch": 1,
        "heads": 12,
        "head_dim": 128,
        "value_dim": 128,
        "dtype": "bfloat16",
    }
    return AttentionSite(**(given | fields))


def survey_of(*sites: AttentionSite) -> SiteSurvey:
    return SiteSurvey(FINGERPRINT, sites, (), ModelCounts(0, 0, 0, 0, 0))


def splits_of(plan: Plan) -> list[tuple[int, int, int] | None]:
    return [None if s.pattern is None else s.pattern.splits.counts for s in plan.sites]


def test_auto_takes_the_preset_trained_at_the_grid() -> None:
    preset = preset_named("t3-wan2.1-4k")
    plan = make_plan(survey_of(*(site(i, preset.grid) for i in range(7))))
    assert plan.schedule == "t3-wan2.1-4k"
    assert [s.pattern for s in plan.sites] == [preset.schedule.patterns[i % 5] for i in range(7)]


def test_auto_generates_for_any_other_grid() -> None:
    plan = make_plan(survey_of(*(site(i) for i in range(6))))
    expected = generate_schedule(LARGE, heads=12)
    assert [s.pattern for s in plan.sites] == [expected.patterns[i % 5] for i in range(6)]
    assert plan.schedule == expected.name
    assert plan.fingerprint == FINGERPRINT


def test_the_index_within_its_stack_picks_the_pattern() -> None:
    stacks = [site(i, stack="first.*") for i in (0, 1)] + [site(i, stack="second.*") for i in (0, 4)]
    plan = make_plan(survey_of(*stacks), [(1, 1, n) for n in range(1, 6)])
    assert splits_of(plan) == [(1, 1, 1), (1, 1, 2), (1, 1, 1), (1, 1, 5)]


def test_auto_leaves_short_sequences_full_and_says_so() -> None:
    plan = make_plan(survey_of(site(0), site(1, SMALL)))
    assert splits_of(plan) == [(21, 1, 1), None]
    (left,) = plan.left_full
    assert left.reason == "too short: 60 tokens, windows gain nothing below 4000"
    assert [s.node for s in plan.rewritten] == ["blocks_0"]


@pytest.mark.parametrize(("min_tokens", "planned"), [(60, True), (61, False)])
def test_min_tokens_is_the_first_length_that_is_planned(min_tokens: int, planned: bool) -> None:
    plan = make_plan(survey_of(site(0, SMALL)), min_tokens=min_tokens)
    assert bool(plan.rewritten) == planned


def test_prefix_tokens_do_not_make_a_grid_long() -> None:
    assert make_plan(survey_of(site(0, SMALL, prefix=5000))).rewritten == ()


@pytest.mark.parametrize("schedule", [[(3, 1, 1), (1, 2, 5)], Schedule.from_splits([(3, 1, 1), (1, 2, 5)])])
def test_a_schedule_given_by_the_user_holds_for_short_sequences_too(schedule: Any) -> None:
    plan = make_plan(survey_of(*(site(i, SMALL) for i in range(3))), schedule)
    assert splits_of(plan) == [(3, 1, 1), (1, 2, 5), (3, 1, 1)]
    assert plan.schedule == "custom"


def test_schedule_that_does_not_fit_names_axis_and_grid() -> None:
    """All its patterns, also those that no site would use."""
    with pytest.raises(PatternError, match=r"\(1,5,1\) do not fit grid 3x4x5: axis h has 4 tokens"):
        make_plan(survey_of(site(0, SMALL)), [(1, 1, 1), (1, 5, 1)])


def test_preset_on_another_grid_is_refused_with_both_grids() -> None:
    with pytest.raises(
        PatternError, match=r"'t3-wan2.2-4k' was trained at grid 21x68x120, .* 'blocks_0' has grid 21x30"
    ):
        make_plan(survey_of(site(0)), "t3-wan2.2-4k")
    plan = make_plan(survey_of(site(0, TokenGrid(21, 68, 120))), "t3-wan2.2-4k")
    assert splits_of(plan) == [(21, 1, 1)]


def test_unknown_schedule_lists_the_known_ones() -> None:
    with pytest.raises(PatternError, match=r"'t3' is unknown; known: auto, t3-wan2\.1-4k"):
        make_plan(survey_of(site(0)), "t3")


def test_no_sites_make_an_empty_plan() -> None:
    plan = make_plan(survey_of(), "auto")
    assert (plan.schedule, plan.sites) == ("auto", ())
    assert Plan.loads(plan.dumps()) == plan


def test_with_pattern_changes_rewritten_sites_only() -> None:
    plan = make_plan(survey_of(site(0), site(1, SMALL)))
    pattern = WindowPattern(Splits(1, 1, 1))
    changed = plan.with_pattern(pattern)
    assert [s.pattern for s in changed.sites] == [pattern, None]
    assert changed.site("blocks_1") == plan.site("blocks_1")
    assert changed.site("nothing") is None


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    nodes = draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=4))
    sites = []
    for node in nodes:
        sizes = [draw(st.integers(1, 9)) for _ in range(3)]
        counts = [draw(st.integers(1, size)) for size in sizes]
        branches = draw(st.sampled_from([("local",), ("dilated",), ("local", "dilated")]))
        pattern = draw(st.sampled_from([None, WindowPattern(Splits(*counts), branches)]))
        extra = draw(st.tuples(st.integers(0, 512), st.integers(0, 9)))
        queries = draw(st.sampled_from([extra, (0, 0), (3, 1)]))
        order = draw(st.sampled_from(["thw", "hwt", "wth"]))
        sites.append(SitePlan(node, TokenGrid(*sizes), *extra, pattern, draw(st.text(max_size=9)), *queries, order))
    return Plan(draw(st.text(max_size=9)), draw(st.text(max_size=9)), tuple(sites))


@given(plans())
def test_json_round_trip(plan: Plan) -> None:
    assert Plan.loads(plan.dumps()) == plan
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


VALID: dict[str, Any] = Plan(
    FINGERPRINT,
    "custom",
    (SitePlan("sdpa", SMALL, 2, 0, WindowPattern(Splits(3, 1, 1))), SitePlan("b", SMALL, 0, 0, None)),
).to_json()


def edited(*path: Any, value: Any = None, delete: bool = False) -> dict[str, Any]:
    data: Any = json.loads(json.dumps(VALID))
    place = data
    for key in path[:-1]:
        place = place[key]
    if delete:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    result: dict[str, Any] = data
    return result


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "plan: expected an object with the keys fingerprint, schedule, sites, t3compile_plan"),
        (edited("fingerprint", delete=True), r"plan lacks \['fingerprint'\]; its keys are"),
        (edited("note", value="mine"), r"plan has unknown keys \['note'\]"),
        (edited("t3compile_plan", value=2), "plan version 2: this t3compile reads version 1"),
        (edited("fingerprint", value=5), "fingerprint and schedule must be strings"),
        (edited("schedule", value=None), "fingerprint and schedule must be strings"),
        (edited("sites", value={}), "sites must be a list"),
        (edited("sites", 1, "node", value="sdpa"), "site 'sdpa' is listed twice"),
        (edited("sites", 1, value="b"), r"sites\[1\]: expected an object with the keys grid, node"),
        (edited("sites", 0, "reason", delete=True), r"sites\[0\] lacks \['reason'\]"),
        (edited("sites", 0, "patern", value=None), r"sites\[0\] has unknown keys \['patern'\]"),
        (edited("sites", 0, "grid", value=[3, 4]), r"sites\[0\]: grid \[3, 4\] must be three whole numbers"),
        (edited("sites", 0, "grid", value="3x4x5"), r"sites\[0\]: grid '3x4x5' must be three"),
        (edited("sites", 0, "grid", 1, value=0), r"sites\[0\] \('sdpa'\): grid \(3, 0, 5\): h is 0"),
        (edited("sites", 0, "grid", 1, value=4.0), r"sites\[0\] \('sdpa'\): .*h is 4.0"),
        (edited("sites", 0, "node", value=3), r"sites\[0\]: node 3 must be a string"),
        (edited("sites", 1, "reason", value=None), r"sites\[1\]: reason None must be a string"),
        (edited("sites", 0, "prefix", value="2"), r"sites\[0\]: prefix '2' must be a whole number"),
        (edited("sites", 0, "suffix", value=True), r"sites\[0\]: suffix True must be a whole number"),
        (edited("sites", 0, "query_prefix", value=None), r"sites\[0\]: query_prefix None must be a whole number"),
        (edited("sites", 0, "query_suffix", value=-2), "site 'sdpa': query_prefix 2 and query_suffix -2 must not be"),
        (edited("sites", 0, "order", value="htt"), "site 'sdpa': order 'htt' must be t, h, w in some order"),
        (edited("sites", 0, "order", value=3), "site 'sdpa': order 3 must be t, h, w in some order"),
        (edited("sites", 0, "prefix", value=-1), "site 'sdpa': prefix -1 and suffix 0 must not be negative"),
        (edited("sites", 0, "pattern", value=7), r"sites\[0\] \('sdpa'\): pattern 7: expected an object"),
        (
            edited("sites", 0, "pattern", "kind", value="bands"),
            r"sites\[0\] \('sdpa'\): pattern kind 'bands' is unknown",
        ),
        (edited("sites", 0, "pattern", "splits", value=[1, 1]), r"\('sdpa'\): splits \[1, 1\]: expected three"),
        (
            edited("sites", 0, "pattern", "splits", 2, value=6),
            r"\('sdpa'\): splits \(3,1,6\) do not fit grid 3x4x5: axis w",
        ),
    ],
)
def test_malformed_plan_names_the_place(data: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.loads(json.dumps(data))


def test_the_plan_that_the_malformed_ones_are_made_of_is_well_formed() -> None:
    assert Plan.from_json(VALID).to_json() == VALID


def test_plans_from_before_query_streams_and_orders_still_load() -> None:
    old = json.loads(json.dumps(VALID))
    for entry in old["sites"]:
        for key in ("query_prefix", "query_suffix", "order"):
            del entry[key]
    plan = Plan.from_json(old)
    assert plan == Plan.from_json(VALID)
    assert [(s.query_prefix, s.query_suffix, s.order) for s in plan.sites] == [(2, 0, "thw"), (0, 0, "thw")]


def test_a_plan_takes_the_place_of_its_site() -> None:
    found = site(0, SMALL, prefix=7, suffix=2, query_prefix=0, query_suffix=1, order="hwt", masked=True)
    assert (found.tokens, found.query_tokens, found.extra_tokens, found.extra_queries) == (69, 61, 9, 1)
    (planned,) = make_plan(survey_of(found), [(1, 1, 2)]).sites
    assert (planned.grid, planned.prefix, planned.suffix) == (SMALL, 7, 2)
    assert (planned.query_prefix, planned.query_suffix, planned.order) == (0, 1, "hwt")
    assert (planned.tokens, planned.query_tokens) == (69, 61)


def test_text_that_is_not_json() -> None:
    with pytest.raises(PlanError, match=r"the plan is not JSON: .*line 1 column 2"):
        Plan.loads("{plan}")


def without_first(plan: Plan) -> Plan:
    return replace(plan, sites=plan.sites[1:])


def renamed(plan: Plan) -> Plan:
    return replace(plan, sites=(replace(plan.sites[0], node="other"), *plan.sites[1:]))


def regridded(plan: Plan) -> Plan:
    return replace(plan, sites=(replace(plan.sites[0], grid=TokenGrid(3, 5, 4)), *plan.sites[1:]))


def with_prefix(plan: Plan) -> Plan:
    return replace(plan, sites=(replace(plan.sites[0], prefix=4), *plan.sites[1:]))


def reordered(plan: Plan) -> Plan:
    return replace(plan, sites=(replace(plan.sites[0], order="hwt"), *plan.sites[1:]))


def with_queries(plan: Plan) -> Plan:
    return replace(plan, sites=(replace(plan.sites[0], query_suffix=3), *plan.sites[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: replace(plan, fingerprint="a" * 64), "fingerprint aaaaaaaaaaaa, this graph has ffffffffffff"),
        (renamed, "names site 'other', which is not among the found ones: blocks_0, blocks_1"),
        (regridded, "'blocks_0': the plan has grid 3x5x4, prefix 0, suffix 0; the graph has grid 3x4x5, prefix 0"),
        (with_prefix, "'blocks_0': the plan has grid 3x4x5, prefix 4, suffix 0; the graph has grid 3x4x5, prefix 0"),
        (reordered, "prefix 0, suffix 0, order hwt; the graph has grid 3x4x5, prefix 0, suffix 0, order thw"),
        (with_queries, "prefix 0, suffix 0, query_suffix 3; the graph has grid .*, suffix 0, query_suffix 0"),
        (without_first, 'the plan lacks the sites blocks_0; list each, with "pattern": null'),
    ],
)
def test_plan_for_another_graph_is_refused(change: Callable[[Plan], Plan], message: str) -> None:
    survey = survey_of(site(0, SMALL), site(1, SMALL))
    plan = make_plan(survey, [(1, 1, 2)])
    plan.check_against(survey)
    with pytest.raises(PlanError, match=message):
        change(plan).check_against(survey)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5,1,1/1,3,4", [(5, 1, 1), (1, 3, 4)]),
        ("(5,1,1)/(1, 3, 4)", [(5, 1, 1), (1, 3, 4)]),
        ("2,2,2", [(2, 2, 2)]),
    ],
)
def test_schedule_on_the_command_line(text: str, expected: list[tuple[int, int, int]]) -> None:
    assert parse_schedule(text) == Schedule.from_splits(expected)


@pytest.mark.parametrize("text", ["auto", "t3-wan2.1-4k"])
def test_names_of_schedules_are_left_for_make_plan(text: str) -> None:
    assert parse_schedule(text) == text


def test_an_unknown_name_of_a_schedule_is_refused_with_those_there_are() -> None:
    with pytest.raises(PatternError, match=r"'nonsense' is unknown; known: auto, t3-wan2\.1-4k"):
        parse_schedule("nonsense")


@pytest.mark.parametrize("text", ["5,1", "5,1,1/", "5,1,1/a,b,c", "5,1,1,1", "5.0,1,1"])
def test_malformed_schedule_shows_the_form(text: str) -> None:
    with pytest.raises(PatternError, match="write for example 5,1,1/1,3,4") as caught:
        parse_schedule(text)
    assert f"'{text}'" in str(caught.value)


def test_schedule_of_zero_windows_is_refused() -> None:
    with pytest.raises(PatternError, match="t is 0"):
        parse_schedule("0,1,1")


def test_limits_of_fused_kernels_are_warned_of() -> None:
    grid = TokenGrid(4, 128, 256)
    many = make_plan(survey_of(site(0, grid)), [(4, 32, 32)])
    (warning,) = plan_warnings(survey_of(site(0, grid)), many)
    assert f"{4 * 32 * 32 * 12 * 2} windows*heads*branches*batch reach the launch limit 65535" in warning
    few = make_plan(survey_of(site(0, grid, prefix=10)), [(2, 1, 1)])
    (warning,) = plan_warnings(survey_of(site(0, grid, prefix=10)), few)
    assert f"windows of {2 * 128 * 256 + 10} keys exceed 65504" in warning
    fine = survey_of(site(0))
    assert plan_warnings(fine, make_plan(fine)) == ()


def test_planning_imports_no_torch() -> None:
    program = "import t3compile.plan, t3compile.cost, sys; assert not {'torch', 'numpy', 'onnx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"t3compile_plan": 1' + "0" * 5000 + "}"])
def test_absurd_json_is_one_sentence(text: str) -> None:
    with pytest.raises(PlanError, match="t3compile plan"):
        Plan.loads(text)
