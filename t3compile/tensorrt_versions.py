"""Which versions of TensorRT build and run these engines."""

from __future__ import annotations

import re

from t3compile.errors import EngineError

OLDEST = (10, 13)
# Reported by others: engines with ahead-of-time Python plugins that 10.14 builds fail when they are loaded or run.
BROKEN = (10, 14)
SUPPORTED = "10.13, 10.15, 10.16 or 11.x"
UPGRADE = "pip install 'tensorrt>=10.15'"


def parse_version(text: str) -> tuple[int, ...]:
    """The leading numbers of a version, at most four: "10.14.1.48.post1" -> (10, 14, 1, 48)."""
    found = re.match(r"\d+(\.\d+){0,3}", text)
    if found is None:
        raise EngineError(f"TensorRT's version '{text}' cannot be read; use {SUPPORTED}")
    return tuple(map(int, found.group().split(".")))


def version_refusal(text: str) -> str | None:
    """Why a version cannot build or run these engines, or None for those that can."""
    try:
        release = parse_version(text)[:2]
    except EngineError as error:
        return str(error)
    if release < OLDEST:
        return f"TensorRT {text} is too old: ahead-of-time Python plugins need 10.13 or newer (but not 10.14)"
    if release == BROKEN:
        return f"TensorRT {text} is refused: 10.14 is reported to break ahead-of-time Python plugins"
    return None


def checked_version(text: str) -> tuple[int, ...]:
    """The numbers of a version that can build and run these engines; EngineError with reason and remedy for others."""
    version, refusal = parse_version(text), version_refusal(text)
    if refusal is not None:
        raise EngineError(f"{refusal}; upgrade with {UPGRADE}")
    return version
