"""The zoo's results as a file to compare with and as a page to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.zoo.entry import ZooEntry
from tests.zoo.models import ENTRIES, kind_of
from tests.zoo.run_entry import STAGES, Row, Status

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = ROOT / "tests" / "zoo" / "expected.json"
PAGE = ROOT / "docs" / "models.md"

_RANK: dict[Status, int] = {"not run": 0, "failed": 1, "none": 2, "ok": 2}
_MARKS: dict[Status, str] = {"ok": "yes", "failed": "**no**", "not run": "", "none": "-"}

_HEAD = """# Models

Every transformer that diffusers exports, tiny and with random weights, and some hand-written ones. Written by
`make models`, kept true by `tests/test_zoo.py`.

- sites: attention calls found over the token grid / such calls in the model's source; declined: every other call
- graph: the traced graph's output equals the eager model's
- identity: splits (1,1,1) give the same bits
- windows: the rewritten graph equals the eager model whose attention is dense under the windows' masks
- ONNX: onnxruntime equals torch
- yes / **no** / nothing to do (-) / not run, since an earlier stage failed (empty)
"""
_COLUMNS = ("model", "traced by", "sites", "grid", "declined", "graph", "identity", "windows", "ONNX", "remark")


@dataclass(frozen=True)
class Record:
    """What a row is compared by, and the phrases of its failed stages."""

    name: str
    traced_by: str
    found: int
    expected: int
    grids: tuple[str, ...]
    declined: Mapping[str, int]
    status: Mapping[str, Status]
    phrases: Mapping[str, str]

    @classmethod
    def of(cls, row: Row) -> Record:
        status = {name: row.stages[name].status for name in STAGES}
        phrases = {name: row.stages[name].phrase for name in STAGES if row.stages[name].status == "failed"}
        return cls(row.name, row.traced_by, row.found, row.expected, row.grids, row.declined, status, phrases)

    @classmethod
    def from_json(cls, name: str, fields: Mapping[str, Any]) -> Record:
        return cls(name=name, **{**fields, "grids": tuple(fields["grids"])})

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "name"}


def changes(row: Row, record: Record) -> dict[str, list[str]]:
    """What differs from the record, in words, as ``worse``, ``better`` or ``other``; phrases are not compared."""
    now = Record.of(row)
    found: dict[str, list[str]] = {"worse": [], "better": [], "other": []}
    for name in STAGES:
        before, after = record.status[name], now.status[name]
        if before != after:
            rank = _RANK[after] - _RANK[before]
            kind = "worse" if rank < 0 else "better" if rank > 0 else "other"
            phrase = row.stages[name].phrase
            found[kind].append(f"{name}: {before} -> {after}" + (f" ({phrase})" if phrase else ""))
    missing = (abs(record.found - record.expected), abs(now.found - now.expected))
    if missing[0] != missing[1]:
        kind = "worse" if missing[1] > missing[0] else "better"
        found[kind].append(f"sites: {record.found}/{record.expected} -> {now.found}/{now.expected}")
    for name in ("traced_by", "grids", "declined"):
        before, after = getattr(record, name), getattr(now, name)
        if before != after:
            found["other"].append(f"{name}: {before!r} -> {after!r}")
    return found


def read_records() -> dict[str, Record]:
    return {name: Record.from_json(name, fields) for name, fields in json.loads(EXPECTED.read_text()).items()}


def write_records(records: Sequence[Record]) -> None:
    """Write expected.json and the page that shows it."""
    by_name = {record.name: record.to_json() for record in records}
    EXPECTED.write_text(json.dumps(by_name, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(render({record.name: record for record in records}))


def render(records: Mapping[str, Record]) -> str:
    """The page of all recorded models, a table for each kind."""
    lines = [_HEAD, *_summary(records)]
    kind = ""
    for entry in ENTRIES:
        record = records.get(entry.name)
        if record is None:
            continue
        if kind_of(entry.name) != kind:
            kind = kind_of(entry.name)
            lines += ["", f"## {kind.capitalize()}", "", _line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
        lines.append(_line(_cells(entry, record)))
    return "\n".join(lines) + "\n"


def _summary(records: Mapping[str, Record]) -> list[str]:
    words = {"trace": "traced", "sites": "every site found", "windows": "windows proven", "onnx": "ONNX proven"}
    counts = []
    for stage, word in words.items():
        right = sum(_RANK[record.status[stage]] == _RANK["ok"] for record in records.values())
        counts.append(f"{word} {right}")
    return [f"Of {len(records)} models: {', '.join(counts)}."]


def _cells(entry: ZooEntry, record: Record) -> list[str]:
    declined = ", ".join(f"{count} {reason}" for reason, count in record.declined.items())
    traced_by = record.traced_by or _MARKS[record.status["trace"]]
    failures = [f"{stage}: {phrase}" for stage, phrase in record.phrases.items()]
    remark = " ".join(f"{sentence.strip().rstrip('.')}." for sentence in [entry.expected, *failures] if sentence)
    sites = f"{record.found}/{record.expected}"
    marks = [_MARKS[record.status[stage]] for stage in ("graph", "identity", "windows", "onnx")]
    return [record.name, traced_by, sites, ", ".join(record.grids), declined, *marks, remark]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
