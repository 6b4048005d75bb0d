"""Program: an exported graph and where its weights are."""

from __future__ import annotations

import copy
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, TensorArgument
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.utils import _pytree as pytree

from t3compile.archive import is_plain, without_values, write_archive
from t3compile.errors import OutputError, TraceError, WeightsError, first_line
from t3compile.files import check_space, check_writable, staged_outputs
from t3compile.functionalize import METADATA_ASSERTION, functionalize_by_kind
from t3compile.mapped_files import Extent
from t3compile.plan import Plan
from t3compile.progress import SILENT, Progress
from t3compile.weight_references import refer, whole_tensors
from t3compile.weights import TensorWeights, Weights

PLAN_ENTRY = "t3compile_plan.json"

_WITHOUT_STACK_TRACES = "do_not_emit_stack_traces"

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Program:
    """A functional graph of aten calls (attention still one call), its weights, and its example inputs.

    ``exported.state_dict`` may hold fake tensors: values come from ``weights``. ``retrace`` makes the same
    model's program for other inputs, where the module is at hand. ``plan`` is set on a rewritten program.
    ``traced_by`` names the tracing strategy; ``notes`` are what the user should know about how it was traced and
    loaded, one sentence each.
    """

    exported: ExportedProgram
    weights: Weights
    source: str
    retrace: Callable[[tuple[Any, ...], dict[str, Any]], Program] | None = None
    plan: Plan | None = None
    notes: tuple[str, ...] = ()
    traced_by: str = ""

    @property
    def graph(self) -> fx.Graph:
        graph: fx.Graph = self.exported.graph
        return graph

    @property
    def example_inputs(self) -> Inputs:
        if self.exported.example_inputs is None:
            return (), {}
        args, kwargs = self.exported.example_inputs
        return tuple(args), dict(kwargs)

    def fingerprint(self) -> str:
        """sha256 of the graph: operations, wiring, shapes and dtypes; not weights and not node names."""
        return graph_fingerprint(self.graph)

    @property
    def weight_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.exported.state_dict.values())

    def load_weights(self) -> dict[str, Tensor]:
        """All weights, mapped where they lie in files; parameters come back as nn.Parameter."""
        parameters = set(self.exported.graph_signature.parameters)
        loaded: dict[str, Tensor] = {}
        for name in self.exported.state_dict:
            tensor = self.weights.view(name)
            is_plain = name in parameters and not isinstance(tensor, nn.Parameter)
            loaded[name] = nn.Parameter(tensor, tensor.is_floating_point()) if is_plain else tensor
        return loaded

    def with_weights(self) -> ExportedProgram:
        """The exported program with real tensors in its state_dict."""
        return copy_exported(self.exported, state_dict=self.load_weights())

    def module(self) -> nn.Module:
        """A module with the original's call signature and real weights."""
        module: nn.Module = self.with_weights().module()
        return module

    def with_graph(self, graph_module: fx.GraphModule, **changes: Any) -> Program:
        """The same weights under another graph with the same inputs and outputs."""
        exported = copy_exported(self.exported, graph_module=graph_module)
        return replace(self, exported=exported, **changes)

    def require_weights(self) -> None:
        """Raise WeightsError, before any work, where there are no weights: the smallest is read."""
        state = self.exported.state_dict
        smallest = min(state, key=lambda name: state[name].numel(), default=None)
        if smallest is not None:
            self.weights.load(smallest)

    def external_weights(self) -> dict[str, Extent]:
        """The weights whose very bytes are a tensor of a safetensors file, or part of one, by name."""
        state = self.exported.state_dict
        located = {name: extent for name in state if (extent := self.weights.locate(name)) is not None}
        return whole_tensors(located, {name: state[name].dtype for name in located})

    def check_kept(self, written: Sequence[Path]) -> None:
        """Raise OutputError where one of these (resolved) is a file that weights are read from where they lie."""
        extents = (self.weights.locate(name) for name in self.exported.state_dict)
        sources = {extent.file.path for extent in extents if extent is not None}
        for path in sorted(source for source in sources if source.resolve() in written):
            raise OutputError(f"cannot write '{path}': the model's weights are read from it; give another name")

    def check_savable(self, path: str | Path, *, external: bool = False) -> None:
        """Raise, before any work, what ``save`` would raise for missing weights, a bad path or too little room."""
        self.require_weights()
        check_writable(Path(path))
        check_space(Path(path), self._stored_bytes(self._extents_for(external, Path(path))))

    def save(self, path: str | Path, *, external: bool = False, progress: Progress = SILENT) -> Path:
        """Write a torch.export ``.pt2`` (with the plan inside, if rewritten), beside first, then renamed.

        No more than one weight is held at a time. ``external``: weights that lie in safetensors files as they are stay
        there, and the ``.pt2`` refers to them; only t3compile can load it. Raises OutputError, WeightsError.
        """
        path = Path(path)
        extra = {} if self.plan is None else {PLAN_ENTRY: self.plan.dumps()}
        extents = self._extents_for(external, path)
        stored = self._stored_bytes(extents)
        progress(f"writing {path}")
        with staged_outputs(path, needed_bytes=stored) as stage, quiet_torch():
            target = stage / path.name
            if self._is_plain():
                forms = copy_exported(self.exported, state_dict=without_values(self.exported.state_dict))
                references = refer(extents, path.parent) if external else None
                with progress.measure(stored, "bytes") as advance:
                    write_archive(target, forms, self.weights, extra, references, advance)
            else:
                # torch.export.save insists on the suffix; the staged name must be the final one.
                suffixed = stage / f"{path.name}.pt2"
                torch.export.save(self.with_weights(), suffixed, extra_files=extra)
                suffixed.rename(target)
        return path

    def _extents_for(self, external: bool, path: Path) -> dict[str, Extent]:
        """What a .pt2 there will refer to."""
        if not external:
            return {}
        extents = self.external_weights()
        if not extents:
            raise WeightsError(
                f"no weight of {self.source} lies in a safetensors file as it is, so none can be referred to; "
                "store the weights inside"
            )
        if not self._is_plain():
            raise WeightsError(
                f"some weights of {self.source} are of a tensor class that only torch can store, all or none; "
                "store the weights inside"
            )
        self.check_kept([path.resolve()])
        return extents

    def _is_plain(self) -> bool:
        return all(map(is_plain, self.exported.state_dict.values()))

    def _stored_bytes(self, extents: Mapping[str, Extent]) -> int:
        return self.weight_bytes - sum(extent.nbytes for extent in extents.values())


def copy_exported(
    exported: ExportedProgram,
    *,
    graph_module: fx.GraphModule | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    signature: ExportGraphSignature | None = None,
    constants: Mapping[str, Any] | None = None,
    verifiers: Sequence[Any] | None = None,
) -> ExportedProgram:
    """An ExportedProgram with some parts replaced; the given one is untouched and shares its tensors."""
    root = exported.graph_module if graph_module is None else graph_module
    signature = copy.deepcopy(exported.graph_signature) if signature is None else signature
    _name_outputs(signature, root.graph)
    with quiet_torch():
        call_graph = copy.deepcopy(exported.module_call_graph)
    return ExportedProgram(
        root=root,
        graph=root.graph,
        graph_signature=signature,
        state_dict=dict(exported.state_dict if state_dict is None else state_dict),
        range_constraints=_used_ranges(exported, root.graph),
        module_call_graph=call_graph,
        example_inputs=exported.example_inputs,
        constants=dict(exported.constants if constants is None else constants),
        verifiers=list(exported.verifiers if verifiers is None else verifiers),
    )


def _used_ranges(exported: ExportedProgram, graph: fx.Graph) -> dict[Any, Any]:
    """The ranges of symbols that a length or a stride still has; torch keeps those of inputs with unusual strides,
    and a file with any would pass for one of dynamic shapes.
    """
    if not exported.range_constraints:
        return {}
    values = pytree.tree_leaves([node.meta.get("val") for node in graph.nodes])
    lengths = [length for x in values for length in ((*x.shape, *x.stride()) if isinstance(x, Tensor) else (x,))]
    used = {symbol for x in lengths if isinstance(x, SymInt) for symbol in x.node.expr.free_symbols}
    return {symbol: span for symbol, span in exported.range_constraints.items() if symbol in used}


def _name_outputs(signature: ExportGraphSignature, graph: fx.Graph) -> None:
    """The signature lists outputs by node name; an edit may have put another node in an output's place."""
    (returned,) = graph.output_node().args
    assert isinstance(returned, list | tuple)
    for spec, node in zip(signature.output_specs, returned, strict=True):
        if isinstance(node, fx.Node):
            spec.arg = replace(spec.arg, name=node.name)


def copy_graph_module(exported: ExportedProgram) -> fx.GraphModule:
    """A copy of the graph that can be edited; node names are kept, tensors are shared."""
    original = exported.graph_module
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    returned = graph.graph_copy(original.graph, values)
    for node, copied_node in values.items():
        copied_node.name = node.name  # fx renames what is called like a Python builtin, such as `input`
    output = graph.output(returned)
    output.meta = dict(original.graph.output_node().meta)
    graph._codegen = copy.deepcopy(original.graph._codegen)
    copied = fx.GraphModule(original, graph)
    copied.meta = dict(original.meta)
    return copied


def trace(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    weights: Weights | None = None,
    source: str = "",
) -> Program:
    """Export a module to a Program by non-strict torch.export alone, computing nothing.

    For graphs of the compiler's own making; models go through ``t3compile.trace``, which tries more and compares.
    Raises TraceError with torch.export's own reason.
    """
    named = dict(kwargs or {})
    source = source or type(module).__name__
    fake_args, fake_kwargs = distinct_fake_inputs(module, args, named)
    try:
        with quiet_torch(), traced_lightly(), torch.no_grad():
            exported = torch.export.export(module, fake_args, fake_kwargs, strict=False)
            exported = functionalized(exported)
    except Exception as error:
        raise TraceError(
            f"torch.export could not trace {source}: {type(error).__name__}: {first_line(error)}"
        ) from error
    exported.example_inputs = (args, named)
    if weights is None:
        weights = TensorWeights(dict(exported.state_dict))
    kept = weights

    def retrace(new_args: tuple[Any, ...], new_kwargs: dict[str, Any]) -> Program:
        return trace(module, new_args, new_kwargs, weights=kept, source=source)

    return Program(exported, weights, source, retrace)


def distinct_fake_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """Every input a tensor of its own, and in the fake mode of the module's parameters if these are fake.

    torch.export reads a tensor that is given twice from one placeholder only.
    """
    seen: set[int] = set()

    def own(x: Tensor) -> Tensor:
        repeated = id(x) in seen
        seen.add(id(x))
        return x.clone() if repeated else x

    args, kwargs = pytree.tree_map_only(Tensor, own, (args, kwargs))
    fakes = [parameter for parameter in module.parameters() if is_fake(parameter)]
    if not fakes:
        return args, kwargs
    mode = detect_fake_mode(fakes)
    assert mode is not None
    args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
    return args, kwargs


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor, or a parameter's data, has a shape and no values."""
    return isinstance(tensor, FakeTensor) or isinstance(tensor.data, FakeTensor)


def functionalized(exported: ExportedProgram) -> ExportedProgram:
    """The form every Program has: no in-place calls, no metadata assertions, composite calls kept whole."""
    with quiet_torch(), traced_lightly(), torch.no_grad():
        by_kind = functionalize_by_kind(exported)
        if by_kind is not None:
            return copy_exported(exported, graph_module=by_kind[0], verifiers=by_kind[1])
        functional: ExportedProgram = exported.run_decompositions({})
    _drop_metadata_assertions(functional.graph_module)
    return functional


def _drop_metadata_assertions(graph_module: fx.GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        if node.target is METADATA_ASSERTION:
            graph_module.graph.erase_node(node)
    graph_module.recompile()


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Errors of torch carry their message; its logged tracebacks and warnings are kept from the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", message="The tensor attribute")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def traced_lightly() -> Iterator[None]:
    """Graphs made inside carry no stack traces, and most graphs on the way to them no Python code until they run.

    Both cost a sixth of the time of tracing a large model; only whoever debugs torch's own tracing would miss them.
    """
    had = getattr(fx.config, _WITHOUT_STACK_TRACES, None)  # torch 2.13 has it, 2.11 may not
    try:
        if had is not None:
            setattr(fx.config, _WITHOUT_STACK_TRACES, True)
        with _use_lazy_graph_module(True):
            yield
    finally:
        if had is not None:
            setattr(fx.config, _WITHOUT_STACK_TRACES, had)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's default floating dtype for the time of a block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def graph_fingerprint(graph: fx.Graph) -> str:
    """sha256 over operations, wiring, shapes and dtypes, independent of node names and weights."""
    numbers = {node: i for i, node in enumerate(graph.nodes)}
    digest = hashlib.sha256()
    for node in graph.nodes:
        args = fx.map_arg((node.args, node.kwargs), lambda used: f"%{numbers[used]}")
        # An output node's metadata is not kept by saved files; its arguments say the same.
        value = None if node.op == "output" else node.meta.get("val")
        digest.update(f"{node.op} {node.target} {args} {_value_text(value)}\n".encode())
    return digest.hexdigest()


def _value_text(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return "[" + " ".join(_value_text(item) for item in value) + "]"
    return repr(value)


def user_input_names(exported: ExportedProgram) -> tuple[str, ...]:
    """Names of the placeholders that are tensor inputs of the model, in call order."""
    return tuple(
        spec.arg.name
        for spec in exported.graph_signature.input_specs
        if spec.kind == InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument)
    )
