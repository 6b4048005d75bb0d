"""Run many zoo models in two processes and record the results."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from rich.console import Console

from tests.shared_exports import shared_exports
from tests.zoo.models import ENTRIES, entry_named
from tests.zoo.run_entry import STAGES, Row, run_entry
from tests.zoo.table import EXPECTED, Record, read_records, write_records

WORKERS = 2


def run_named(name: str) -> Row:
    """The row of the model with this name."""
    warnings.simplefilter("ignore")
    with shared_exports():
        return run_entry(entry_named(name))


def run_zoo(names: Sequence[str] = ()) -> None:
    """Run the named models, or all, and write expected.json and the page; the others keep their records."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    chosen = names or [entry.name for entry in ENTRIES]
    records = read_records() if EXPECTED.exists() else {}
    began = time.perf_counter()
    # Two processes of one thread each; children read it when they import torch.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(run_named, name) for name in chosen]
        for done, future in enumerate(as_completed(running), start=1):
            row = future.result()
            records[row.name] = Record.of(row)
            failed = [f"{name}: {row.stages[name].phrase}" for name in STAGES if row.stages[name].status == "failed"]
            console.print(f"[{done}/{len(chosen)}] {row.name} {row.seconds:.0f} s", "; ".join(failed), markup=False)
            write_records([records[entry.name] for entry in ENTRIES if entry.name in records])
    console.print(f"{len(chosen)} models in {time.perf_counter() - began:.0f} s")
