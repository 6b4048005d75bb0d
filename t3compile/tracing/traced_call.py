"""The call that is traced: a module with arguments that torch.export takes."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from t3compile.program import Inputs, distinct_fake_inputs, is_fake

Forward = Callable[..., Any]
ForwardWrapper = Callable[[Forward], Forward]
# From the plain form of an argument, and copies of the objects closed over by place, to the argument.
_Rebuild = Callable[[Any, Mapping[str, object]], Any]

_CONSTANTS = (int, float, bool, str, type(None))


@dataclass(frozen=True)
class TracedCall:
    """A module and plain arguments: nests of tensors and Python constants.

    ``closed`` holds the objects that have a None in their place; forward gets copies of them. ``rebuild`` makes
    forward's own arguments from plain ones; None where they are the same.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    closed: Mapping[str, object]
    rebuild: _Rebuild | None
    notes: tuple[str, ...] = ()

    @property
    def input_tensors(self) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def is_real(self) -> bool:
        """Whether every value is there: no parameter, buffer or input is a fake tensor."""
        tensors = [*self.module.parameters(), *self.module.buffers(), *self.input_tensors]
        return not any(is_fake(tensor) for tensor in tensors)

    @property
    def is_graph(self) -> bool:
        """Whether torch.export interprets the module's graph instead of calling its forward."""
        return isinstance(self.module, fx.GraphModule)

    def with_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TracedCall:
        """The same call on other plain arguments."""
        return replace(self, args=tuple(args), kwargs=dict(kwargs))

    def traceable_inputs(self) -> Inputs:
        """Every tensor an object of its own, and in the fake mode of the module's parameters if these are fake."""
        return distinct_fake_inputs(self.module, self.args, self.kwargs)

    def cloned_inputs(self) -> Inputs:
        """Inputs that a call may write to."""
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), (self.args, self.kwargs))
        return args, kwargs

    def named_leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The leaves of plain arguments by the names that torch.export gives their placeholders."""
        named: dict[str, Any] = {}
        arguments = {**dict(zip(_positional_names(self.module, len(args)), args, strict=True)), **kwargs}
        for path, leaf in pytree.tree_flatten_with_path(arguments)[0]:
            place = _place("", path).removeprefix(".")
            named[re.sub(r"[^a-zA-Z0-9]", "_", place).lower()] = leaf
        return named

    @contextmanager
    def callable_module(self, wrap: ForwardWrapper | None = None) -> Iterator[nn.Module]:
        """The module, which for the time of the block takes plain arguments and returns plain outputs.

        ``wrap`` goes around forward as it sees the plain arguments.
        """
        if self.is_graph and wrap is None and self.rebuild is None:
            yield self.module
            return
        copies = {place: _copied(value) for place, value in self.closed.items()}
        original = self.module.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.rebuild is not None:
                args, kwargs = self.rebuild((args, kwargs), copies)
            return plain_output(original(*args, **kwargs))

        outer = forward if wrap is None else functools.wraps(original)(wrap(forward))
        attributes = self.module.__dict__
        had, before = "forward" in attributes, attributes.get("forward")
        attributes["forward"] = outer
        try:
            yield self.module
        finally:
            if had:
                attributes["forward"] = before
            else:
                attributes.pop("forward", None)


def make_call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TracedCall:
    """The call with plain arguments: other containers are taken as dicts, other objects are closed over."""
    closed: dict[str, object] = {}
    notes: list[str] = []
    names = _positional_names(module, len(args))
    opened_args = [_open(value, name, closed, notes) for value, name in zip(args, names, strict=True)]
    opened_kwargs = {name: _open(value, name, closed, notes) for name, value in kwargs.items()}
    rebuilds = [rebuild for _, rebuild in (*opened_args, *opened_kwargs.values())]

    def rebuild_call(call: Any, copies: Mapping[str, object]) -> Any:
        plain_args, plain_kwargs = call
        return (
            tuple(
                _rebuilt(x, opened_args[i][1] if i < len(opened_args) else None, copies)
                for i, x in enumerate(plain_args)
            ),
            {
                name: _rebuilt(x, opened_kwargs[name][1] if name in opened_kwargs else None, copies)
                for name, x in plain_kwargs.items()
            },
        )

    return TracedCall(
        module,
        tuple(plain for plain, _ in opened_args),
        {name: plain for name, (plain, _) in opened_kwargs.items()},
        closed,
        rebuild_call if any(rebuilds) else None,
        tuple(notes),
    )


def _rebuilt(plain: Any, rebuild: _Rebuild | None, copies: Mapping[str, object]) -> Any:
    return plain if rebuild is None else rebuild(plain, copies)


def _open(value: Any, place: str, closed: dict[str, object], notes: list[str]) -> tuple[Any, _Rebuild | None]:
    """The plain form of an argument and the way back; None where it is plain already."""
    if isinstance(value, (Tensor, *_CONSTANTS)):
        return value, None
    content = _content(value)
    if content is not None:
        notes.append(f"argument '{place}' ({type(value).__name__}) is taken as a dict")
        opened = {key: _open(item, f"{place}.{key}", closed, notes) for key, item in content.items()}

        def refill(plain: Any, copies: Mapping[str, object]) -> Any:
            return _refilled(value, {key: _rebuilt(plain[key], opened[key][1], copies) for key in opened})

        return {key: item for key, (item, _) in opened.items()}, refill
    entries, spec = pytree.tree_flatten_with_path(value)
    if len(entries) == 1 and entries[0][1] is value:
        closed[place] = value
        notes.append(
            f"argument '{place}' ({type(value).__name__}) is closed over: the graph holds its example value, "
            "and the program takes None in its place"
        )
        return None, lambda _, copies: copies[place]
    leaves = [_open(leaf, _place(place, path), closed, notes) for path, leaf in entries]
    if not any(rebuild for _, rebuild in leaves):
        return value, None

    def rebuild_nest(plain: Any, copies: Mapping[str, object]) -> Any:
        # An opened leaf is a dict now, so the nest is cut at the leaves that it had.
        parts = spec.flatten_up_to(plain)
        return spec.unflatten(
            [_rebuilt(part, rebuild, copies) for part, (_, rebuild) in zip(parts, leaves, strict=True)]
        )

    return spec.unflatten([leaf for leaf, _ in leaves]), rebuild_nest


def _content(value: object) -> dict[str, Any] | None:
    """What a container that torch's pytrees do not know holds by name: a dataclass, or a kind of dict."""
    if type(value) in pytree.SUPPORTED_NODES:
        return None
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: getattr(value, entry.name) for entry in fields(value)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return dict(value)
    return None


def _refilled(container: Any, content: Mapping[str, Any]) -> Any:
    """A container of the same kind with other content."""
    same = copy.copy(container)
    if is_dataclass(container):
        for name, value in content.items():
            object.__setattr__(same, name, value)
        return same
    for name, value in content.items():
        same[name] = value
    return same


def plain_output(value: Any) -> Any:
    """Outputs as nests of tensors and constants: other containers become dicts, other objects None."""
    if isinstance(value, (Tensor, *_CONSTANTS)):
        return value
    content = _content(value)
    if content is not None:
        return {key: plain_output(item) for key, item in content.items()}
    leaves, spec = pytree.tree_flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        return None
    return spec.unflatten([plain_output(leaf) for leaf in leaves])


def _positional_names(module: nn.Module, count: int) -> list[str]:
    names = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            break
        names.append(parameter.name)
    return [names[i] if i < len(names) else str(i) for i in range(count)]


def _place(parent: str, path: tuple[Any, ...]) -> str:
    keys = [getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry))) for entry in path]
    return ".".join([parent, *map(str, keys)])


def _copied(value: object) -> object:
    """A copy for one trace, so that a cache is not filled twice; the object itself where it cannot be copied."""
    try:
        return copy.deepcopy(value)
    except Exception:
        return value
