"""How much memory this process holds and held, read from the kernel; None where there is no /proc."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
# proc(5): writing 5 sets the peak back to what is resident now.
_RESET_PEAK = "5"


@dataclass(frozen=True)
class Resident:
    """Resident bytes of this process: now, at their peak since it began or since the last reset, and of no file now."""

    now_bytes: int
    peak_bytes: int
    anonymous_bytes: int


def resident() -> Resident | None:
    """What /proc/self/status says (VmRSS, VmHWM and RssAnon)."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        now, peak, anonymous = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM", "RssAnon"))
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return Resident(now, peak, anonymous)


def reset_peak() -> bool:
    """Give back what is free, and let the peak begin anew at what is resident; whether the kernel did so."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    after = resident()
    # A kernel that ignores the request leaves the old peak.
    return after is not None and after.peak_bytes <= after.now_bytes + after.now_bytes // 8
