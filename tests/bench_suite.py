"""The measurements behind BENCHMARKS.md: attention of the 4K preset scaled to a CPU, and whole passes of Wan 1.3B.

    python -m tests.bench_suite [--folder bench]

Runs the tests first, unless they were green for these very files, and measures nothing when they are red. Writes
<date>-<cpu>-<subject>.json and .png into the folder and prints markdown.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from t3compile.benchmark.machine import this_machine
from t3compile.demo import write_model

ROOT = Path(__file__).parents[1]
SOURCES = ("t3compile", "passes", "export", "tests", "pyproject.toml", "constraints.txt")
GREEN = ROOT / ".pytest_cache" / "green-sources"
RUNTIMES = "torch,compile,ort,aoti"
# The preset's cycle at 21x16x24 tokens, which its scaled splits divide: (21,1,1), (1,2,3), (1,1,4), (3,2,1), (7,1,1).
ATTENTION = shlex.split("t3-wan2.1-4k --sizes 81x256x384 --what attention --repeats 5 --against full,paper")
# The preset's own splits on half its grid, 21x136x120 tokens, so that each pattern has its share of the work as at 4K.
# One head, and no full attention: over 342,720 tokens it takes minutes a call.
CYCLE = shlex.split(
    "t3-wan2.1-4k --sizes 81x2176x1920 --keep splits --heads 1 --what attention --repeats 3 --against paper"
)
# Grid 7x30x52, the demo's.
MODEL = shlex.split("--random-weights --sizes 480p:25 --text-tokens 512 --what model --repeats 3 --against full,paper")


def sources_digest(root: Path = ROOT) -> str:
    """sha256 over names and bytes of all that the tests depend on."""
    digest = hashlib.sha256()
    for name in SOURCES:
        path = root / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(root)}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def require_green_tests(command: Sequence[str], green: Path = GREEN, root: Path = ROOT) -> None:
    """Run the tests unless they passed on these very files before; SystemExit when they are red."""
    digest = sources_digest(root)
    if green.is_file() and green.read_text() == digest:
        click.echo("the tests were green for these files", err=True)
        return
    click.echo(f"$ {' '.join(command)}", err=True)
    done = subprocess.run(command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, stdout=2)
    if done.returncode != 0:
        click.echo(f"the tests are red (exit code {done.returncode}): nothing was measured", err=True)
        sys.exit(1)
    green.parent.mkdir(exist_ok=True)
    green.write_text(digest)


def output_name(cpu: str, day: datetime.date) -> str:
    """<date>-<cpu>, in letters, digits and dashes."""
    return f"{day.isoformat()}-{re.sub(r'[^a-z0-9]+', '-', cpu.lower()).strip('-')}"


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("bench"), show_default=True)
def main(folder: Path) -> None:
    """Run the tests, then every measurement; exits with 1 when a test, a process or a comparison fails."""
    require_green_tests((sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal"))
    folder.mkdir(parents=True, exist_ok=True)
    name = output_name(this_machine().cpu, datetime.date.today())
    failed = False
    with tempfile.TemporaryDirectory() as models:
        model = write_model(Path(models))
        for subject, arguments in (("attention", ATTENTION), ("cycle", CYCLE), ("model", [str(model), *MODEL])):
            output = folder / f"{name}-{subject}"
            written = ("-o", f"{output}.json", "--plot", f"{output}.png", "--markdown")
            command = ("bench", *arguments, "--runtime", RUNTIMES, *written)
            click.echo(f"$ t3compile {' '.join(command)}", err=True)
            done = subprocess.run((sys.executable, "-m", "t3compile", *command), check=False)
            failed |= done.returncode != 0
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
