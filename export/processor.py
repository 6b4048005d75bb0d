"""What this processor can execute, so that code compiled for another is refused before it ends the process."""

from __future__ import annotations

import platform
import re
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
# Of x86's flags, those that name instructions a compiler may choose; the others tell of the kernel and the machine.
_X86 = re.compile(r"(sse|ssse3|avx|amx|fma|f16c|bmi|movbe|popcnt|abm|v?aes|gfni|sha_ni|adx|v?pclmulqdq)\w*")


def instruction_sets() -> tuple[str, ...]:
    """The architecture, then the instruction-set extensions in alphabetical order, where the system lists them."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return (platform.machine(),)
    found: set[str] = set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            found.update(flag for flag in value.split() if _X86.fullmatch(flag))
        elif key.strip() == "Features":
            found.update(value.split())
    return (platform.machine(), *sorted(found))
