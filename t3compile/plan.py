"""Plan: what will be done to every site. Decided on integers, JSON, editable by hand, bound to one graph."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t3compile.errors import GridError, PatternError, PlanError
from t3compile.geometry import FRAME_MAJOR, TokenGrid, is_token_order
from t3compile.pattern import Schedule, WindowPattern, pattern_from_json
from t3compile.presets import preset_for, preset_named
from t3compile.schedule import generate_schedule
from t3compile.sites import AttentionSite, SiteSurvey

PLAN_VERSION = 1
# Below this the linear layers dominate and windows gain nothing (specs: "roughly 4k tokens").
MIN_TOKENS = 4000
# Fused attention kernels launch one block row per window, head and branch; grid dimension limit.
LAUNCH_LIMIT = 65_535
# fp16 sums over more keys than this overflow in fused kernels.
FP16_KEY_LIMIT = 65_504

# A mapping gives every grid its own; sites of a grid that it leaves out stay full.
ScheduleChoice = str | Schedule | Sequence[tuple[int, int, int]] | Mapping[TokenGrid, str | Schedule]


@dataclass(frozen=True)
class SitePlan:
    """What happens to one site: its pattern, or None with the reason why it stays full.

    Grid and pattern are in (T, H, W) whatever the ``order`` of the tokens; see AttentionSite for the other fields.
    """

    node: str
    grid: TokenGrid
    prefix: int
    suffix: int
    pattern: WindowPattern | None
    reason: str = ""
    query_prefix: int = None  # type: ignore[assignment]  # not given: as many as the keys have
    query_suffix: int = None  # type: ignore[assignment]
    order: str = FRAME_MAJOR

    def __post_init__(self) -> None:
        if self.query_prefix is None:
            object.__setattr__(self, "query_prefix", self.prefix)
        if self.query_suffix is None:
            object.__setattr__(self, "query_suffix", self.suffix)
        if self.prefix < 0 or self.suffix < 0:
            raise PlanError(f"site '{self.node}': prefix {self.prefix} and suffix {self.suffix} must not be negative")
        if self.query_prefix < 0 or self.query_suffix < 0:
            raise PlanError(
                f"site '{self.node}': query_prefix {self.query_prefix} and query_suffix {self.query_suffix} must not "
                "be negative"
            )
        if not is_token_order(self.order):
            raise PlanError(f"site '{self.node}': order {self.order!r} must be t, h, w in some order, such as 'thw'")
        if self.pattern is not None:
            self.pattern.check_fit(self.grid)

    @classmethod
    def of_site(cls, site: AttentionSite, pattern: WindowPattern | None, reason: str = "") -> SitePlan:
        """The plan of a site with its place in the sequence."""
        return cls(
            site.node,
            site.grid,
            site.prefix,
            site.suffix,
            pattern,
            reason,
            site.query_prefix,
            site.query_suffix,
            site.order,
        )

    @property
    def tokens(self) -> int:
        """Keys."""
        return self.prefix + self.grid.tokens + self.suffix

    @property
    def query_tokens(self) -> int:
        return self.query_prefix + self.grid.tokens + self.query_suffix

    def to_json(self) -> dict[str, Any]:
        return {
            "node": self.node,
            "grid": list(self.grid.sizes),
            "order": self.order,
            "prefix": self.prefix,
            "suffix": self.suffix,
            "query_prefix": self.query_prefix,
            "query_suffix": self.query_suffix,
            "pattern": None if self.pattern is None else self.pattern.to_json(),
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Plan:
    """The patterns of all found sites of the graph with this fingerprint."""

    fingerprint: str
    schedule: str
    sites: tuple[SitePlan, ...]

    @property
    def rewritten(self) -> tuple[SitePlan, ...]:
        return tuple(site for site in self.sites if site.pattern is not None)

    @property
    def left_full(self) -> tuple[SitePlan, ...]:
        return tuple(site for site in self.sites if site.pattern is None)

    def site(self, node: str) -> SitePlan | None:
        return next((site for site in self.sites if site.node == node), None)

    def with_pattern(self, pattern: WindowPattern) -> Plan:
        """The same plan with this pattern at every rewritten site."""
        return replace(
            self,
            sites=tuple(site if site.pattern is None else replace(site, pattern=pattern) for site in self.sites),
        )

    def check_against(self, survey: SiteSurvey) -> None:
        """Raise PlanError unless the plan was made for this survey's graph and names its sites."""
        if self.fingerprint != survey.fingerprint:
            raise PlanError(
                f"the plan was made for another graph (fingerprint {self.fingerprint[:12]}, this graph has "
                f"{survey.fingerprint[:12]}): make a new one with 't3compile plan'"
            )
        found = {site.node: site for site in survey.found}
        for planned in self.sites:
            site = found.get(planned.node)
            if site is None:
                raise PlanError(
                    f"the plan names site '{planned.node}', which is not among the found ones: "
                    f"{', '.join(found) or 'none'}"
                )
            _check_place(planned, SitePlan.of_site(site, None))
        missing = [node for node in found if self.site(node) is None]
        if missing:
            raise PlanError(
                f'the plan lacks the sites {", ".join(missing)}; list each, with "pattern": null and '
                "a reason where it should stay full"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "t3compile_plan": PLAN_VERSION,
            "fingerprint": self.fingerprint,
            "schedule": self.schedule,
            "sites": [site.to_json() for site in self.sites],
        }

    def dumps(self) -> str:
        return json.dumps(self.to_json(), indent=2) + "\n"

    @classmethod
    def loads(cls, text: str) -> Plan:
        """Read and check a plan file; PlanError names the place of the first mistake."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"the plan is not JSON: {error}; write one with 't3compile plan'") from None
        return cls.from_json(data)

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read and check a plan file; PlanError where it cannot be read."""
        try:
            return cls.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan '{path}': {error}") from None

    @classmethod
    def from_json(cls, data: object) -> Plan:
        fields = _fields(data, "plan", {"t3compile_plan", "fingerprint", "schedule", "sites"})
        if fields["t3compile_plan"] is True or fields["t3compile_plan"] != PLAN_VERSION:
            raise PlanError(f"plan version {fields['t3compile_plan']!r}: this t3compile reads version {PLAN_VERSION}")
        if not isinstance(fields["fingerprint"], str) or not isinstance(fields["schedule"], str):
            raise PlanError("plan: fingerprint and schedule must be strings")
        if not isinstance(fields["sites"], list):
            raise PlanError("plan: sites must be a list")
        sites = tuple(_site_from_json(entry, i) for i, entry in enumerate(fields["sites"]))
        nodes = [site.node for site in sites]
        twice = sorted({node for node in nodes if nodes.count(node) > 1})
        if twice:
            raise PlanError(f"plan: site '{twice[0]}' is listed twice")
        return cls(fields["fingerprint"], fields["schedule"], sites)


def _check_place(planned: SitePlan, found: SitePlan) -> None:
    """Raise PlanError unless the grid stands at the same place of the sequence, in the same order."""
    names = ["grid", "prefix", "suffix"]
    names += [n for n in ("order", "query_prefix", "query_suffix") if getattr(planned, n) != getattr(found, n)]
    at_plan, at_site = ([f"{name} {getattr(site, name)}" for name in names] for site in (planned, found))
    if at_plan != at_site:
        raise PlanError(f"site '{planned.node}': the plan has {', '.join(at_plan)}; the graph has {', '.join(at_site)}")


def _fields(data: object, where: str, names: set[str], optional: Set[str] = frozenset()) -> Mapping[str, Any]:
    known = ", ".join(sorted(names | optional))
    if not isinstance(data, Mapping):
        raise PlanError(f"{where}: expected an object with the keys {known}")
    missing, unknown = names - set(data), set(data) - names - optional
    if missing or unknown:
        problem = f"lacks {sorted(missing)}" if missing else f"has unknown keys {sorted(unknown)}"
        raise PlanError(f"{where} {problem}; its keys are {known}")
    return data


# Keys that plans written before they existed lack.
_LATER_KEYS = frozenset({"query_prefix", "query_suffix", "order"})


def _site_from_json(data: object, position: int) -> SitePlan:
    where = f"plan: sites[{position}]"
    required = {"node", "grid", "prefix", "suffix", "pattern", "reason"}
    fields = _fields(data, where, required, _LATER_KEYS)
    grid = fields["grid"]
    if not isinstance(grid, list) or len(grid) != 3:
        raise PlanError(f"{where}: grid {grid!r} must be three whole numbers [T, H, W]")
    for name in ("node", "reason"):
        if not isinstance(fields[name], str):
            raise PlanError(f"{where}: {name} {fields[name]!r} must be a string")
    for name in ("prefix", "suffix", "query_prefix", "query_suffix"):
        value = fields.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int):
            raise PlanError(f"{where}: {name} {value!r} must be a whole number")
    try:
        pattern = None if fields["pattern"] is None else pattern_from_json(fields["pattern"])
        return SitePlan(
            fields["node"],
            TokenGrid(*grid),
            fields["prefix"],
            fields["suffix"],
            pattern,
            fields["reason"],
            **{name: fields[name] for name in _LATER_KEYS if name in fields},
        )
    except (GridError, PatternError) as error:
        raise PlanError(f"{where} ('{fields['node']}'): {error}") from None


def parse_schedule(text: str) -> str | Schedule | Mapping[TokenGrid, str | Schedule]:
    """Read a schedule from the command line: ``auto``, a preset's name, or splits ``5,1,1/1,3,4``.

    ``TxHxW=SCHEDULE;TxHxW=SCHEDULE`` gives every grid its own. Raises PatternError for what is none of these,
    an unknown name or a grid named twice, and GridError for a malformed grid.
    """
    if "=" not in text:
        return _parse_one_schedule(text)
    by_grid: dict[TokenGrid, str | Schedule] = {}
    for part in text.split(";"):
        name, equals, schedule = part.partition("=")
        if not equals:
            raise PatternError(
                f"schedule '{text}': '{part}' names no grid; write for example 21x30x52=5,1,1/1,3,4;21x15x26=auto"
            )
        grid = TokenGrid.parse(name)
        if grid in by_grid:
            raise PatternError(f"schedule '{text}' names grid {grid} twice; leave one out")
        by_grid[grid] = _parse_one_schedule(schedule.strip())
    return by_grid


def _parse_one_schedule(text: str) -> str | Schedule:
    if not any(character.isdigit() for character in text) or "-" in text:
        if text != "auto":
            preset_named(text)
        return text
    triples: list[tuple[int, int, int]] = []
    for part in text.split("/"):
        numbers = part.strip().strip("()").split(",")
        if len(numbers) != 3 or not all(number.strip().isdecimal() for number in numbers):
            raise PatternError(
                f"schedule '{text}': '{part}' is not three whole numbers n_t,n_h,n_w; write for example 5,1,1/1,3,4"
            )
        triples.append((int(numbers[0]), int(numbers[1]), int(numbers[2])))
    return Schedule.from_splits(triples)


def make_plan(survey: SiteSurvey, schedule: ScheduleChoice = "auto", *, min_tokens: int = MIN_TOKENS) -> Plan:
    """Choose a pattern for every found site; a pure function of integers.

    ``schedule`` is "auto" (the preset trained at the site's grid, else a generated schedule), a preset's
    name, a Schedule, a list of (n_t, n_h, n_w), or a mapping from grids to names and Schedules; sites of grids
    that the mapping leaves out stay full. Under "auto" a site with fewer than ``min_tokens`` grid tokens stays
    full. Raises PatternError when a schedule does not fit a grid.
    """
    by_grid = _schedules_by_grid(survey, schedule)
    generated: dict[tuple[TokenGrid, int, int], Schedule] = {}
    names: dict[str, None] = {}
    sites = []
    for site in survey.found:
        choice = by_grid.get(site.grid)
        if choice is None:
            reason = f"the schedule has no patterns for grid {site.grid}"
            sites.append(SitePlan.of_site(site, None, reason))
            continue
        if choice == "auto" and site.grid.tokens < min_tokens:
            reason = f"too short: {site.grid.tokens} tokens, windows gain nothing below {min_tokens}"
            sites.append(SitePlan.of_site(site, None, reason))
            continue
        chosen = _schedule_for(site, choice, generated)
        names[chosen.name] = None
        pattern = chosen.pattern_at(site.index)
        sites.append(SitePlan.of_site(site, pattern))
    fallback = schedule.name if isinstance(schedule, Schedule) else schedule if isinstance(schedule, str) else "custom"
    return Plan(survey.fingerprint, "+".join(names) or fallback, tuple(sites))


def _schedules_by_grid(survey: SiteSurvey, schedule: ScheduleChoice) -> Mapping[TokenGrid, str | Schedule]:
    """The schedule of every grid of the survey; PatternError where one cannot be the schedule of its grid."""
    if isinstance(schedule, Mapping):
        unknown = [grid for grid in schedule if grid not in survey.grids]
        if unknown:
            raise PatternError(
                f"the schedule names grid {unknown[0]}, but the sites have {_grids_text(survey) or 'none'}: "
                "name one of these, or leave it out"
            )
        return schedule
    if not isinstance(schedule, str | Schedule):
        schedule = Schedule.from_splits([(t, h, w) for t, h, w in schedule])
    by_grid = dict.fromkeys(survey.grids, schedule)
    if len(by_grid) > 1:
        _check_fits_all(survey, schedule)
    return by_grid


def _check_fits_all(survey: SiteSurvey, schedule: str | Schedule) -> None:
    """Raise PatternError, with the way out, where sites of several grids cannot share this schedule."""
    if schedule == "auto":
        return
    if isinstance(schedule, str):
        preset_named(schedule)
    try:
        for site in survey.found:
            _schedule_for(site, schedule, {})
    except PatternError as error:
        first = survey.grids[0]
        raise PatternError(
            f"{error}; the model has sites of several grids, {_grids_text(survey)}: give each grid its own schedule, "
            f"such as --schedule '{';'.join(f'{grid}=auto' for grid in survey.grids)}', or only some, such as "
            f"'{first}=auto': sites of the others stay full"
        ) from None


def _grids_text(survey: SiteSurvey) -> str:
    """Every grid with its number of sites and the first of them."""
    texts = []
    for grid in survey.grids:
        sites = [site for site in survey.found if site.grid == grid]
        texts.append(f"{grid} ({len(sites)} site{'s' * (len(sites) > 1)} from '{sites[0].node}')")
    return " and ".join(texts)


def _schedule_for(
    site: AttentionSite,
    schedule: str | Schedule,
    generated: dict[tuple[TokenGrid, int, int], Schedule],
) -> Schedule:
    if isinstance(schedule, Schedule):
        schedule.check_fit(site.grid)
        return schedule
    if schedule != "auto":
        preset = preset_named(schedule)
        if preset.grid != site.grid:
            raise PatternError(
                f"preset '{preset.name}' was trained at grid {preset.grid}, but site '{site.node}' has grid "
                f"{site.grid}: use --schedule auto, or inputs of the preset's size"
            )
        return preset.schedule
    trained = preset_for(site.grid)
    if trained is not None:
        return trained.schedule
    key = (site.grid, site.heads, site.batch)
    if key not in generated:
        generated[key] = generate_schedule(site.grid, heads=site.heads, batch=site.batch)
    return generated[key]


def plan_warnings(survey: SiteSurvey, plan: Plan) -> tuple[str, ...]:
    """Limits of fused attention kernels that a plan exceeds, one sentence each."""
    warnings = []
    for planned in plan.rewritten:
        site = survey.site(planned.node)
        if site is None or planned.pattern is None:
            continue
        launches = planned.pattern.launched_windows(site.grid) * site.heads * site.batch
        if launches >= LAUNCH_LIMIT:
            warnings.append(
                f"site '{site.node}': {launches} windows*heads*branches*batch reach the launch limit "
                f"{LAUNCH_LIMIT} of fused attention kernels; use fewer splits than {planned.pattern.splits}"
            )
        keys = planned.pattern.largest_window_tokens(site.grid) + site.extra_tokens
        if keys > FP16_KEY_LIMIT:
            warnings.append(
                f"site '{site.node}': windows of {keys} keys exceed {FP16_KEY_LIMIT}, where float16 attention "
                "overflows in fused kernels; use bfloat16 or float32 there"
            )
    return tuple(warnings)
