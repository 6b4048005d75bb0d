"""Run a module and leave no trace in it: attributes, containers and tensors come back as they were."""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from t3compile.program import is_fake

_LIBRARIES = ("torch", "builtins", "numpy")
_CONTAINERS: tuple[type, ...] = (dict, OrderedDict, defaultdict, list, set, deque)


@contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
    """Put back, at the end, what forward changes: attributes of submodules and of objects that they hold,
    dicts, lists and sets in place, written buffers and tensor attributes, and torch's random state.
    """
    state = _State()
    for child in module.modules():
        state.remember(child)
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            state.restore()


class _State:
    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._attributes: list[tuple[Any, dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, int, Tensor]] = []
        self._caches: dict[int, tuple[Any, int]] = {}

    def remember(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Parameter):
            # Weights are too many to copy, and inference does not write them.
            return
        if isinstance(value, Tensor):
            if not is_fake(value) and not value.is_inference():
                self._tensors.append((value, value._version, value.detach().clone()))
        elif type(value) in _CONTAINERS:
            self._containers.append((value, value.copy()))
            for item in list(value.values()) if isinstance(value, dict) else list(value):
                self.remember(item)
        elif isinstance(value, tuple):
            for item in value:
                self.remember(item)
        elif _holds_attributes(value):
            self._attributes.append((value, dict(vars(value))))
            for kind in type(value).__mro__:
                self._remember_caches(kind)
            for item in list(vars(value).values()):
                self.remember(item)

    def _remember_caches(self, kind: type) -> None:
        """What functools caches for the methods of a class and the functions beside it."""
        if id(kind) in self._seen or kind.__module__.partition(".")[0] in _LIBRARIES:
            return
        self._seen.add(id(kind))
        beside = vars(sys.modules[kind.__module__]) if kind.__module__ in sys.modules else {}
        for function in (*vars(kind).values(), *beside.values()):
            cached = getattr(function, "__func__", function)
            if isinstance(cached, _lru_cache_wrapper):
                self._caches[id(cached)] = (cached, cached.cache_info().misses)

    def restore(self) -> None:
        for cached, misses in self._caches.values():
            # What was computed meanwhile may be of a trace; it is computed again when it is needed.
            if cached.cache_info().misses != misses:
                cached.cache_clear()
        for owner, attributes in self._attributes:
            present = vars(owner)
            if not _same(present, attributes):
                present.clear()
                present.update(attributes)
        for container, content in self._containers:
            if isinstance(container, dict):
                if not _same(container, content):
                    container.clear()
                    container.update(content)
            elif isinstance(container, set):
                container.clear()
                container.update(content)
            else:
                container.clear()
                container.extend(content)
        with torch.no_grad():
            for tensor, version, content in self._tensors:
                if tensor._version != version:
                    tensor.copy_(content)


def _same(present: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return list(present) == list(before) and all(present[key] is before[key] for key in before)


def _holds_attributes(value: object) -> bool:
    """Modules, and plain objects of the model's own code; not classes, functions or what libraries manage."""
    if isinstance(value, nn.Module):
        return True
    kind = type(value)
    is_plain = kind.__setattr__ is object.__setattr__ and hasattr(value, "__dict__")
    is_code = isinstance(value, type | FunctionType | MethodType | partial)
    return is_plain and not is_code and kind.__module__.partition(".")[0] not in _LIBRARIES
