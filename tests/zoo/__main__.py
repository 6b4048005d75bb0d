"""Run the whole zoo and write docs/models.md and tests/zoo/expected.json: python -m tests.zoo [NAME ...]"""

from __future__ import annotations

import os
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

# Before torch starts its threads: two processes with one each.
os.environ["OMP_NUM_THREADS"] = "1"
WORKERS = 2

from rich.console import Console  # noqa: E402

from tests.zoo.models import ENTRIES, entry_named  # noqa: E402
from tests.zoo.run_entry import STAGES, Row, run_entry  # noqa: E402
from tests.zoo.table import EXPECTED, Record, read_records, write_records  # noqa: E402


def _run_named(name: str) -> Row:
    warnings.simplefilter("ignore")
    return run_entry(entry_named(name))


def main(names: list[str]) -> int:
    """Run the named models, or all; the others keep their records."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    unknown = set(names) - {entry.name for entry in ENTRIES}
    if unknown:
        console.print(f"unknown models: {', '.join(sorted(unknown))}")
        return 2
    chosen = names or [entry.name for entry in ENTRIES]
    records = read_records() if names and EXPECTED.exists() else {}
    began = time.perf_counter()
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(_run_named, name) for name in chosen]
        for done, future in enumerate(as_completed(running), start=1):
            row = future.result()
            records[row.name] = Record.of(row)
            failed = [f"{name}: {row.stages[name].phrase}" for name in STAGES if row.stages[name].status == "failed"]
            console.print(f"[{done}/{len(chosen)}] {row.name} {row.seconds:.0f} s", "; ".join(failed), markup=False)
            write_records([records[entry.name] for entry in ENTRIES if entry.name in records])
    console.print(f"{len(chosen)} models in {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
