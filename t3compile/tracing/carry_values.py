"""Real values beside a trace: what Python reads from a tensor, and shapes that depend on data, become constants.

Every call that forward makes is made twice: traced, and on real tensors. Where the real call reads values (``item``,
``nonzero``, a boolean index ...), the trace gets the real result, and the inputs it came from are recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from t3compile.program import is_fake

aten = torch.ops.aten

_MASKS = (torch.bool, torch.uint8)
# They read memory without a call that a mode could see.
_READERS = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__contains__, Tensor.data_ptr)
_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
_SELECTING = (torch.masked_select, Tensor.masked_select)
_SELECTING_PLACES = (torch.index_select, Tensor.index_select)
_REPEATING = (torch.repeat_interleave, Tensor.repeat_interleave)


class _ValueReads(TorchDispatchMode):
    """Whether any call inside the block reads values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or reads_values(func, args)
        return func(*args, **(kwargs or {}))


def reads_values(func: Any, args: Sequence[Any]) -> bool:
    """Whether an aten call's result is a Python value, or has a shape that depends on data."""
    tags = getattr(func, "tags", ())
    if torch.Tag.data_dependent_output in tags:
        return True
    if torch.Tag.dynamic_output_shape not in tags:
        return False
    if func.overloadpacket is aten.index:
        return any(_dtype(x) in _MASKS for x in args[1])
    return True


def _dtype(value: Any) -> torch.dtype | None:
    """The dtype of a tensor, or of a graph node that stands for one."""
    value = getattr(value, "meta", {}).get("val", value) if not isinstance(value, Tensor) else value
    return value.dtype if isinstance(value, Tensor) else None


class ReadsActivationsError(Exception):
    """Forward reads what its layers compute: a graph of it is right for one input only."""


class CarryValues(TorchFunctionMode):
    """Carries a real tensor, and the names of the inputs it came from, beside every traced one.

    ``frozen`` lists, by input, the calls that read values derived from it. ``largest`` is the number of elements
    above which no value is carried, for models whose size forbids computing them.
    """

    def __init__(self, largest: int | None = None) -> None:
        super().__init__()
        self._constants = WeakIdKeyDictionary()
        self.frozen: dict[str, set[str]] = {}
        self._activation_readers: set[str] = set()
        self._largest = largest
        self._values = WeakIdKeyDictionary()
        self._sources = WeakIdKeyDictionary()

    def carry(self, tensor: Tensor, value: Tensor, name: str) -> None:
        """Give the real value of a traced tensor, and the name that is reported when it is read."""
        self._sources[tensor] = frozenset({name})
        if self._largest is None or value.numel() <= self._largest:
            self._values[tensor] = value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("__get__", "__set__", "size", "dim", "stride", "numel"):
            result = func(*args, **kwargs)
            if not isinstance(result, Tensor):
                return result
        tensors = _tensors((args, kwargs))
        if not all(map(self._has_value, tensors)) or self._is_large(tensors, (args, kwargs)):
            return self._lose(func, func(*args, **kwargs), tensors)
        real, reads = self._compute(func, args, kwargs)
        if reads:
            return self._freeze(func, args, kwargs, real)
        if self._is_constant(func, tensors, real):
            return _mapped(self._constant, real)
        if func in _SELECTING_PLACES and (selected := self._select_run(*_call_of_select(args, kwargs))) is not None:
            return self._follow(func, selected, real, tensors)
        return self._follow(func, func(*args, **kwargs), real, tensors)

    def _is_constant(self, func: Any, tensors: Sequence[Tensor], real: Any) -> bool:
        """Whether a call makes a new tensor of constants of the trace only."""
        if not tensors or func is Tensor.__setitem__ or not all(x in self._constants for x in tensors):
            return False
        name = getattr(func, "__name__", "")
        return bool(_tensors(real)) and not (name.endswith("_") and not name.endswith("__"))

    def _select_run(self, x: Tensor, dim: int, places: Tensor) -> Tensor | None:
        """index_select by a run of constant places, as a slice or nothing; None where it is no run."""
        if places not in self._constants or places.dim() != 1 or not places.numel():
            return None
        with untraced():
            value = self._values[places]
            first = int(value[0])
            is_run = first >= 0 and torch.equal(value, torch.arange(first, first + value.numel()).to(value))
        if not is_run:
            return None
        return x if (first, value.numel()) == (0, x.shape[dim]) else x.narrow(dim, first, value.numel())

    def _has_value(self, tensor: Tensor) -> bool:
        if tensor in self._values:
            return True
        if type(tensor) not in (Tensor, nn.Parameter):
            return False
        with untraced():
            if is_fake(tensor):
                return False
            # Weights are not written, and too many to copy.
            value = tensor.detach()
            self._values[tensor] = value if isinstance(tensor, nn.Parameter) else value.clone()
        return True

    def _is_large(self, tensors: Sequence[Tensor], call: Any) -> bool:
        if self._largest is None:
            return False
        sizes: list[int] = []
        for tensor in tensors:
            sizes += [1] * (tensor.dim() - len(sizes))
            for i, size in enumerate(reversed(tensor.shape)):
                sizes[i] = max(sizes[i], int(size))
        numbers = [number for number in _leaves(call) if type(number) is int and number > 1]
        return max(math.prod(sizes), math.prod(numbers)) > self._largest

    def _compute(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, bool]:
        """The call on real values, and whether it reads them."""
        with untraced(), _ValueReads() as reads:
            real_args, real_kwargs = _mapped(self._values.__getitem__, (args, kwargs))
            result = func(*real_args, **real_kwargs)
        writes_where = func is Tensor.__setitem__ and _has_mask(args[1]) and _tensors(args[2]) and args[2].dim() > 0
        return result, reads.found or func in _READERS or bool(writes_where)

    def _follow(self, func: Any, traced: Any, real: Any, tensors: Sequence[Tensor]) -> Any:
        """The traced result, with its value and sources beside it."""
        sources = self._joined_sources(tensors)
        results, values = _tensors(traced), _tensors(real)
        for i, result in enumerate(results):
            # A call that writes in place wrote the value in place too.
            if len(values) == len(results) and not any(result is x for x in tensors):
                self._values[result] = values[i]
            self._sources[result] = sources
        if func is Tensor.__setitem__:
            self._sources[tensors[0]] = sources
        return traced

    def _lose(self, func: Any, traced: Any, tensors: Sequence[Tensor]) -> Any:
        """The traced result of a call that some value is missing for."""
        sources = self._joined_sources(tensors)
        written = tensors[:1] if func is Tensor.__setitem__ else []
        for result in (*_tensors(traced), *written):
            self._sources[result] = sources
            self._values.pop(result, None)
        return traced

    def _joined_sources(self, tensors: Sequence[Tensor]) -> frozenset[str]:
        return frozenset().union(*(self._sources.get(x, frozenset()) for x in tensors))

    def _freeze(self, func: Any, args: Any, kwargs: Any, real: Any) -> Any:
        """The result of a call that reads values, with as little of it constant as can be."""
        tensors = _tensors((args, kwargs))
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype in _MASKS and args[1].dim():
            return self._follow(func, self._select_masked(func, args[0], args[1]), real, tensors)
        if func in _INDEXING:
            index = self._constant_index(func, args[1])
            return self._follow(func, func(args[0], index, *args[2:], **kwargs), real, tensors)
        if not _tensors(real):
            self._record(func, tensors)
            return real
        if func in _SELECTING:
            x, mask = tensors
            whole = x.expand(torch.broadcast_shapes(x.shape, mask.shape))
            return self._follow(func, self._select_masked(func, whole, mask, whole.shape), real, tensors)
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats")
        if func in _REPEATING and isinstance(repeats, Tensor):
            return self._repeat(func, args[0], repeats, args[2] if len(args) > 2 else kwargs.get("dim"), real)
        counts = [x for x in tensors if _is_count(x)]
        if counts:
            fixed_args, fixed_kwargs = _mapped(lambda x: self._int(x) if _is_count(x) else x, (args, kwargs))
            try:
                _, still_reads = self._compute(func, fixed_args, fixed_kwargs)
            except (TypeError, RuntimeError):
                still_reads = True
            if not still_reads:
                self._record(func, counts)
                return self._follow(func, func(*fixed_args, **fixed_kwargs), real, tensors)
        self._record(func, tensors)
        return _mapped(self._constant, real)

    def _select_masked(self, func: Any, x: Tensor, mask: Tensor, shape: torch.Size | None = None) -> Tensor:
        """x's elements, over the mask's leading axes, where the mask is set; ``shape`` is the mask's, broadcast."""
        shape = mask.shape if shape is None else shape
        self._record(func, [mask])
        with untraced():
            places = self._values[mask].expand(shape).flatten().nonzero().flatten()
        flat = x.flatten(0, len(shape) - 1) if len(shape) > 1 else x
        constant = self._constant(places)
        run = self._select_run(flat, 0, constant)
        return flat.index_select(0, constant) if run is None else run

    def _repeat(self, func: Any, x: Tensor, repeats: Tensor, dim: int | None, real: Tensor) -> Any:
        self._record(func, [repeats])
        source = x.flatten() if dim is None else x
        axis = 0 if dim is None else dim
        with untraced():
            places = torch.repeat_interleave(self._values[repeats].expand(source.shape[axis]))
        return self._follow(func, source.index_select(axis, self._constant(places)), real, [x])

    def _constant_index(self, func: Any, index: Any) -> Any:
        """An index whose masks are places, and whose scalars and slice bounds are numbers."""
        entries: list[Any] = []
        for entry in index if isinstance(index, tuple) else (index,):
            if isinstance(entry, Tensor) and entry.dtype in _MASKS and entry.dim() > 0:
                self._record(func, [entry])
                with untraced():
                    places = self._values[entry].nonzero(as_tuple=True)
                entries += map(self._constant, places)
            elif isinstance(entry, slice) or (isinstance(entry, Tensor) and _is_count(entry)):
                self._record(func, _tensors(entry))
                entries.append(_mapped(self._int, entry))
            else:
                entries.append(entry)
        return tuple(entries)

    def _int(self, tensor: Tensor) -> int:
        with untraced():
            return int(self._values[tensor])

    def _constant(self, value: Tensor) -> Tensor:
        """A constant of the trace."""
        with untraced():
            kept, own = value.detach().clone(), value.detach().clone()
        constant: Tensor = aten.lift_fresh_copy.default(kept)
        self._values[constant] = own
        self._sources[constant] = frozenset()
        self._constants[constant] = True
        return constant

    def _record(self, func: Any, tensors: Sequence[Tensor]) -> None:
        reader = getattr(func, "__name__", str(func))
        for tensor in tensors:
            sources = self._sources.get(tensor, frozenset())
            for name in sources:
                self.frozen.setdefault(name, set()).add(reader)
            if {name.partition(" ")[0] for name in sources} >= {"input", "weight"}:
                self._activation_readers.add(reader)

    def refuse_activations(self) -> None:
        """Raise where a value was read that depends on inputs through weights, as expert routing does."""
        if self._activation_readers:
            raise ReadsActivationsError(
                f"forward reads what its layers compute ({', '.join(sorted(self._activation_readers))}), as routing "
                "to experts does: the graph would be right for the example inputs only"
            )


@contextmanager
def untraced() -> Iterator[None]:
    """Plain eager computing, whatever is being traced around it."""
    with (
        _disable_current_modes(),
        torch._C.DisableTorchFunction(),
        torch._C._DisablePythonDispatcher(),
        torch.no_grad(),
    ):
        yield


def _mapped(change: Callable[[Tensor], Any], value: Any) -> Any:
    """A call's arguments or result with every tensor changed; slices are looked into."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        items = [_mapped(change, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        return [_mapped(change, item) for item in value]
    if isinstance(value, dict):
        return {key: _mapped(change, item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_mapped(change, part) for part in (value.start, value.stop, value.step)))
    return value


def _call_of_select(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, int, Tensor]:
    given = dict(zip(("input", "dim", "index"), args, strict=False)) | dict(kwargs)
    return given["input"], given["dim"], given["index"]


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _leaves(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, slice):
        return _leaves([value.start, value.stop, value.step])
    return [value]


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(value) if isinstance(leaf, Tensor)]


def _is_count(tensor: Tensor) -> bool:
    return (
        tensor.dim() == 0 and not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    )


def _has_mask(index: Any) -> bool:
    return any(tensor.dtype in _MASKS for tensor in _tensors(index))
