"""Run the zoo and write docs/models.md and tests/zoo/expected.json: python -m tests.zoo [NAME ...]"""

from __future__ import annotations

import sys

from tests.zoo.models import ENTRIES
from tests.zoo.run_zoo import run_zoo

if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - {entry.name for entry in ENTRIES}
    if unknown:
        sys.exit(f"unknown models: {', '.join(sorted(unknown))}")
    run_zoo(sys.argv[1:])
