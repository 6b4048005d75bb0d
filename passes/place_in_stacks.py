"""Which stack of blocks a call is in, and its index there: schedules count within each stack. Edits nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import fx

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that made the node; empty where the trace does not tell."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(value[0]) for value in stack.values()]
    return paths[-1] if paths else ""


def place_in_stacks(calls: Sequence[fx.Node]) -> list[tuple[str, int]]:
    """(stack, index within it) of every call.

    A stack is a module path with the block's number left open. The block's number is the last one in the path that
    differs between calls of the same form: ``stages.0.blocks.3.attn`` is block 3 of ``stages.0.blocks.*.attn``. Calls
    that share a path, or have none, are counted as they appear.
    """
    paths = [module_path(call) for call in calls]
    forms: dict[str, list[tuple[int, ...]]] = {}
    for path in paths:
        forms.setdefault(_NUMBER.sub("*", path), []).append(_numbers(path))
    seen: dict[str, int] = {}
    counted: dict[tuple[str, int], int] = {}
    places = []
    for path in paths:
        numbers = _numbers(path)
        column = _block_column(forms[_NUMBER.sub("*", path)])
        stack = path if column is None else _open(path, column)
        rank = seen.get(stack, 0)
        seen[stack] = rank + 1
        # Several calls of one block, or of a module that is called again, must not share an index.
        number = None if column is None else numbers[column]
        repeated = number is not None and counted.get((stack, number), 0)
        if number is not None:
            counted[stack, number] = counted.get((stack, number), 0) + 1
        places.append((stack, rank if number is None or repeated else number))
    return places


def _numbers(path: str) -> tuple[int, ...]:
    return tuple(int(number) for number in _NUMBER.findall(path))


def _block_column(rows: Sequence[tuple[int, ...]]) -> int | None:
    """The last number that differs between the paths of one form; the last of all where none does."""
    if not rows[0]:
        return None
    varying = [i for i in range(len(rows[0])) if len({row[i] for row in rows}) > 1]
    return varying[-1] if varying else len(rows[0]) - 1


def _open(path: str, column: int) -> str:
    """The path with its number at ``column`` left open."""
    match = list(_NUMBER.finditer(path))[column]
    return f"{path[: match.start()]}*{path[match.end() :]}"
