"""ONNX file -> TensorRT engine with its manifest: plugin layers, TensorRT's own attention, or the faster of both.

TensorRT and GPUs were missing where this was written. Names and signatures of its API are checked against the real
bindings of several versions, the flow against a recording stand-in; what TensorRT makes of it is unknown.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import onnx_ir as ir
import torch

import t3compile
from t3compile.errors import EngineError, T3CompileError, first_line
from t3compile.export.build_network import BuildSettings, Built, build_network
from t3compile.export.cuda_device import CudaDevice
from t3compile.export.engine_layers import AttentionNode, attention_nodes
from t3compile.export.engine_manifest import (
    EngineManifest,
    PluginKernel,
    SiteLowering,
    external_locations,
    hash_file,
    hash_source,
    layers_path,
    manifest_path,
)
from t3compile.export.onnx_file import check_onnx_file
from t3compile.export.onnx_precision import Precision, check_precision
from t3compile.export.spell_operators import spell_operators
from t3compile.export.tensorrt_api import TensorRT, load_tensorrt_and_device, stdout_to_stderr
from t3compile.export.tensorrt_network import check_operators, parser_knows
from t3compile.export.tensorrt_session import TensorRTSession
from t3compile.export.timing_cache import read_timing_cache
from t3compile.export.write_onnx import PLAN_PROPERTY
from t3compile.files import check_writable, scratch_folder, staged_outputs
from t3compile.interruption import unfinished
from t3compile.progress import SILENT, Progress

Lowering = Literal["plugin", "native"]
Attention = Literal["auto", "plugin", "native"]

PURPOSE = "building an engine"


@dataclass(frozen=True)
class EngineReport:
    """What a build wrote: the manifest, and what the user should know of it."""

    path: str
    manifest: EngineManifest
    notes: tuple[str, ...]

    def with_notes(self, notes: tuple[str, ...]) -> EngineReport:
        """The same after these notes."""
        return replace(self, notes=(*notes, *self.notes))

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "notes": list(self.notes), "manifest": self.manifest.to_json()}


def build_engine(
    onnx: Path,
    path: Path,
    *,
    precision: Precision | None = None,
    attention: Attention = "auto",
    settings: BuildSettings | None = None,
    progress: Progress = SILENT,
) -> EngineReport:
    """Build ``path`` from an ONNX file, with ``path``.manifest.json and ``path``.layers.json, whole or not at all.

    ``precision`` must be what the file computes in, None takes it as it is. ``attention`` "plugin" makes window
    functions plugin layers where the kernel can, "native" leaves all to TensorRT, "auto" builds both and keeps the
    one whose median call is faster, or the only one that runs. EngineError where TensorRT, a GPU, an operator or a
    build fails; KeyboardInterrupt cancels the build and leaves nothing behind.
    """
    settings = settings or BuildSettings()
    check_writable(path)
    check_onnx_file(onnx)
    tensorrt, device = load_tensorrt_and_device(PURPOSE)
    if settings.timing_cache is not None:
        read_timing_cache(settings.timing_cache)
    model = ir.load(onnx)
    found = check_precision(model, onnx, precision)
    attempts, notes = _attempts(tensorrt.module, device, model, attention, progress)
    with staged_outputs(path) as stage, ExitStack() as stack:
        sources = [_place(attempt, onnx, path, stack) for attempt in _spelled(tensorrt, attempts, notes)]
        # Not in the stage: what is left there becomes an output.
        work = stack.enter_context(scratch_folder(path.parent, path.name))
        built: list[Built] = []
        for attempt, source in zip(attempts, sources, strict=True):
            progress(f"building {attempt.lowering} attention")
            engine = work / attempt.lowering
            try:
                one = build_network(tensorrt, device, source, engine, attempt.nodes, settings, progress)
            except T3CompileError as error:
                failures = _plugin_failures() if attempt.kernels else ()
                if attempt is attempts[-1] and not built:
                    if failures:
                        raise EngineError("; ".join([str(error), *failures])) from error
                    raise
                notes.append(f"{attempt.lowering} attention was given up: {'; '.join([str(error), *failures])}")
                continue
            built.append(replace(one, lowering=attempt.lowering))
        best, times, given_up = _fastest(tensorrt, device, built, settings, progress)
        notes += given_up
        os.replace(best.engine, stage / path.name)
        progress("hashing the engine and its sources")
        chosen = next(attempt for attempt in attempts if attempt.lowering == best.lowering)
        manifest = EngineManifest(
            t3compile_version=t3compile.__version__,
            tensorrt_version=tensorrt.version_text,
            compute_capability=device.compute_capability,
            gpu=device.name,
            driver_cuda=device.driver_cuda,
            precision=found,
            lowering=best.lowering,
            inputs=best.inputs,
            outputs=best.outputs,
            sites=chosen.sites,
            plugins=chosen.kernels,
            onnx=hash_source(onnx, external_locations(model)),
            engine_sha256=hash_file(stage / path.name),
            engine_bytes=(stage / path.name).stat().st_size,
            stripped=settings.strip_weights,
            weight_streaming=settings.weight_streaming,
            settings={**settings.to_json(), "tf32": best.tf32},
            layer_check=best.check.to_json(),
            times_s=times,
            metadata=_own_metadata(model),
            plan=_plan(model),
        )
        layers_path(stage / path.name).write_text(best.layers_json, encoding="utf-8")
        manifest_path(stage / path.name).write_text(manifest.dumps(), encoding="utf-8")
    return EngineReport(str(path), manifest, (*notes, *best.notes, *best.check.warnings))


@dataclass(frozen=True)
class _Attempt:
    """One way to lower attention: the model to parse, the nodes to look for, and what the manifest says of sites."""

    lowering: Lowering
    model: ir.Model
    nodes: tuple[AttentionNode, ...]
    sites: tuple[SiteLowering, ...]
    kernels: tuple[PluginKernel, ...] = ()
    # Whether the model is another than the file's.
    changed: bool = False


def _attempts(
    trt: ModuleType, device: CudaDevice, model: ir.Model, attention: Attention, progress: Progress
) -> tuple[list[_Attempt], list[str]]:
    """What to build, the preferred first, and notes on functions that stay native."""
    nodes = attention_nodes(model)
    native = _Attempt("native", model, nodes, tuple(_native_site(node) for node in nodes))
    if attention == "native":
        return [native], []
    if not any(node.function for node in nodes):
        return [native], ["the model has no window attention: all attention is TensorRT's own"]
    try:
        plugin, notes = _plugin_attempt(trt, device, model, nodes, progress)
    except T3CompileError as error:
        if attention == "plugin":
            raise
        return [native], [f"no plugin layers: {error}"]
    if plugin is None:
        return [native], [*notes, "no window function can be a plugin layer: all attention is TensorRT's own"]
    return ([plugin] if attention == "plugin" else [plugin, native]), notes


def _plugin_attempt(
    trt: ModuleType, device: CudaDevice, model: ir.Model, nodes: Sequence[AttentionNode], progress: Progress
) -> tuple[_Attempt | None, list[str]]:
    from t3compile.export.prepare_plugins import prepare_plugins

    with stdout_to_stderr():
        prepared = prepare_plugins(
            model,
            trt,
            architectures=(int(device.compute_capability.replace(".", "")),),
            on_layer=lambda layer: progress(f"compiling the kernels of {layer.name}"),
        )
    plugins = prepared.plugins
    notes = [
        f"function '{function}' of sites {_named(nodes, function)} stays native: {reason}"
        for function, reason in plugins.declined.items()
    ]
    if not plugins.layers:
        return None, notes
    made = _plugin_nodes(prepared.model, {layer.name for layer in plugins.layers})
    lowered, sites = [], []
    for node, names in zip(nodes, _by_site(model, nodes, made), strict=True):
        if names:
            lowered.append(replace(node, lowering="plugin", layers=names))
            sites.append(SiteLowering(node.site, node.function, "plugin"))
        else:
            lowered.append(node)
            sites.append(_native_site(node, plugins.declined.get(node.function, "")))
    kernels = tuple(
        PluginKernel(layer, tactic, kernel.sha256) for (layer, tactic), kernel in prepared.kernels.compiled().items()
    )
    return _Attempt("plugin", prepared.model, tuple(lowered), tuple(sites), kernels, changed=True), notes


def _plugin_failures() -> tuple[str, ...]:
    """TensorRT says that a plugin failed and not why; the plugin remembers."""
    from t3compile.export.tensorrt_plugin import plugin_failures

    return tuple(f"plugin {name}: {reason}" for name, reason in plugin_failures().items())


def _native_site(node: AttentionNode, reason: str = "") -> SiteLowering:
    return SiteLowering(node.site, node.function, "native", reason)


def _named(nodes: Sequence[AttentionNode], function: str) -> str:
    return ", ".join(repr(node.site) for node in nodes if node.function == function)


def _plugin_nodes(model: ir.Model, names: set[str]) -> dict[str, ir.Node]:
    """Plugin nodes by the name of their output."""
    return {str(node.outputs[0].name): node for node in model.graph if node.op_type in names}


def _by_site(model: ir.Model, nodes: Sequence[AttentionNode], made: dict[str, ir.Node]) -> list[tuple[str, ...]]:
    """Names of the plugin nodes that stand for each site: the one that writes its output, and those that it reads."""
    outputs = {str(node.name): str(node.outputs[0].name) for node in model.graph}
    last = {outputs[site.site] for site in nodes if site.site in outputs}
    inner = {output: node for output, node in made.items() if output not in last}
    found = []
    for site in nodes:
        names: list[str] = []
        node = made.get(outputs.get(site.site, ""))
        while node is not None:
            names.append(str(node.name))
            read = (str(value.name) for value in node.inputs if value is not None)
            node = next((inner[name] for name in read if name in inner), None)
        found.append(tuple(reversed(names)))
    return found


def _spelled(tensorrt: TensorRT, attempts: Sequence[_Attempt], notes: list[str]) -> list[_Attempt]:
    """The attempts in operators that this version's parser knows; ExportError names those that remain."""
    knows = parser_knows(tensorrt)
    result = []
    for attempt in attempts:
        model, spelled = spell_operators(attempt.model, knows)
        check_operators(model, knows, tensorrt.version_text)
        note = f"TensorRT {tensorrt.version_text} does not know {', '.join(spelled)}: spelled with older operators"
        if spelled and note not in notes:
            notes.append(note)
        result.append(replace(attempt, model=model, changed=attempt.changed or bool(spelled)))
    return result


def _place(attempt: _Attempt, onnx: Path, path: Path, stack: ExitStack) -> Path:
    """The file to parse: the given one, or a changed model whose external data are found and not copied.

    A changed model stands beside the given one for as long as the build takes; where that folder is read-only, beside
    the engine with symbolic links to the data, which not every parser follows.
    """
    if not attempt.changed:
        return onnx
    try:
        handle, name = tempfile.mkstemp(prefix=f".{onnx.stem}.", suffix=".onnx", dir=onnx.parent)
    except OSError:
        placed = stack.enter_context(scratch_folder(path.parent, path.name)) / onnx.name
        for location in external_locations(attempt.model):
            link = placed.parent / location
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((onnx.parent / location).resolve())
    else:
        os.close(handle)
        placed = Path(name)
        stack.enter_context(unfinished(placed))
        stack.callback(placed.unlink, missing_ok=True)
    ir.save(attempt.model, placed)
    return placed


def _fastest(
    tensorrt: TensorRT, device: CudaDevice, built: Sequence[Built], settings: BuildSettings, progress: Progress
) -> tuple[Built, dict[str, float], list[str]]:
    """The engine whose median call is faster; where there is a choice, the seconds of each that runs, and notes on
    those that do not. EngineError where none does."""
    if len(built) == 1:
        return built[0], {}, []
    times: dict[str, float] = {}
    failures: dict[str, str] = {}
    for one in built:
        progress(f"timing {one.lowering} attention")
        try:
            times[one.lowering] = _time(tensorrt, device, one, settings)
        except (T3CompileError, torch.OutOfMemoryError) as error:
            # The text alone: the error holds the session, whose memory the next one needs.
            reasons = [first_line(error), *(_plugin_failures() if one.lowering == "plugin" else ())]
            failures[one.lowering] = "; ".join(reasons)
    if not times:
        texts = "; ".join(f"{lowering} attention: {reason}" for lowering, reason in failures.items())
        raise EngineError(f"the engines were built and none of them runs: {texts}")
    best = min((one for one in built if one.lowering in times), key=lambda one: times[one.lowering])
    return best, times, [f"{lowering} attention was given up: {reason}" for lowering, reason in failures.items()]


def _time(tensorrt: TensorRT, device: CudaDevice, built: Built, settings: BuildSettings) -> float:
    """Median seconds of a call; what the engine held is free again afterwards."""
    session = TensorRTSession(
        tensorrt,
        built.engine,
        device.index,
        refit_from=built.source if settings.strip_weights else None,
        streams=settings.weight_streaming,
    )
    return session.time()


def _own_metadata(model: ir.Model) -> dict[str, str]:
    return {
        key: value
        for key, value in model.metadata_props.items()
        if key.startswith("t3compile_") and key != PLAN_PROPERTY
    }


def _plan(model: ir.Model) -> Any:
    text = model.metadata_props.get(PLAN_PROPERTY)
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise EngineError(f"the ONNX file carries a damaged plan ({error}); export the model again") from None
