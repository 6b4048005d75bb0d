"""A torch.export ``.pt2`` -> Program."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import torch
from torch import SymInt, Tensor
from torch.export import ExportedProgram

from t3compile.errors import MissingExtraError, ModelFileError, PlanError, first_line
from t3compile.functionalize import METADATA_ASSERTION
from t3compile.inputs import bind_inputs
from t3compile.loading.check_archive import check_archive
from t3compile.loading.map_archive import split_archive
from t3compile.plan import Plan
from t3compile.program import PLAN_ENTRY, Program, copy_exported, functionalized
from t3compile.weights import TensorWeights

_OPS = "t3compile.ops"


def load_archive(
    path: Path,
    *,
    trust_pickle: bool = False,
    inputs: Mapping[str, Tensor] | None = None,
    weights: Sequence[Path] = (),
) -> Program:
    """Load a ``.pt2`` of torch.export.save or of Program.save; nothing in it can run code unless
    ``trust_pickle``.

    A program saved by t3compile comes back with the same node names, fingerprint and plan. Weights are mapped and not
    read. ``weights``: folders or files in which weights by reference are looked for, instead of its own folder.
    """
    modules = check_archive(path, trust_pickle=trust_pickle)
    plan = _read_plan(path)
    split = split_archive(path, weights)
    exported = _load_exported(path, split.skeleton, modules)
    try:
        mapped = split.map_weights(exported.state_dict)
    except (ValueError, RuntimeError) as error:
        raise ModelFileError(f"the weights of '{path}' are damaged ({first_line(error)}); copy it again") from None
    exported.state_dict.update(mapped.tensors)
    if _has_dynamic_shapes(exported):
        raise ModelFileError(
            f"'{path}' has dynamic shapes; export it again with static shapes (without dynamic_shapes)"
        )
    # Guards are Python text in the file; for static shapes the placeholders say the same.
    exported._guards_code = []
    if not _is_functional(exported):
        example_inputs = exported.example_inputs
        exported = functionalized(exported)
        exported.example_inputs = example_inputs
    kept = TensorWeights(dict(exported.state_dict), files=mapped.files)
    program = Program(exported, kept, str(path), plan=plan)
    if inputs is None:
        return program
    exported = copy_exported(exported)
    exported.example_inputs = bind_inputs(program, inputs)
    return replace(program, exported=exported)


def _read_plan(path: Path) -> Plan | None:
    with zipfile.ZipFile(path) as archive:
        entry = next(
            (name for name in archive.namelist() if name.partition("/")[2] == f"extra/{PLAN_ENTRY}"),
            None,
        )
        if entry is None:
            return None
        text = archive.read(entry)
    try:
        return Plan.loads(text.decode("utf-8"))
    except (PlanError, UnicodeDecodeError) as error:
        raise ModelFileError(
            f"the plan inside '{path}' cannot be read ({first_line(error)}); rewrite the model again"
        ) from None


def _load_exported(path: Path, skeleton: BinaryIO, modules: Collection[str]) -> ExportedProgram:
    # load_pt2, not torch.export.load: that one falls back to an old format which check_archive has
    # not seen.
    from torch.export.pt2_archive._package import load_pt2

    # Registers t3::window_attention.
    import_module(_OPS)
    for name in modules:
        _import_outputs(path, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: ExportedProgram = load_pt2(skeleton).exported_programs["model"]
    except Exception as error:
        raise ModelFileError(
            f"torch {torch.__version__} cannot load '{path}' ({type(error).__name__}: "
            f"{_reason(error)}); "
            "export it again with this torch, without custom operators and with plain outputs "
            "(return_dict=False)"
        ) from error
    return loaded


def _import_outputs(path: Path, name: str) -> None:
    """Register the output containers of a diffusers module."""
    if find_spec("diffusers") is None:
        raise MissingExtraError("diffusers", "diffusers", f"'{path}' (its outputs are of {name})")
    try:
        import_module(name)
    except ImportError:
        raise ModelFileError(
            f"'{path}' gives outputs of {name}, which the installed diffusers does not have; "
            "export it again with return_dict=False"
        ) from None


def _reason(error: BaseException) -> str:
    """The innermost cause: torch wraps each in a long dump of the node."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)[:200]


def _has_dynamic_shapes(exported: ExportedProgram) -> bool:
    values = (node.meta.get("val") for node in exported.graph.nodes)
    return any(
        isinstance(value, Tensor) and any(isinstance(length, SymInt) for length in value.shape) for value in values
    )


def _is_functional(exported: ExportedProgram) -> bool:
    if exported.dialect == "TRAINING":
        return False
    for node in exported.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return False
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target._schema.is_mutable or node.target is METADATA_ASSERTION:
            return False
    return True
