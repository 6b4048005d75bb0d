"""Refuse a ``.pt2`` archive that could run code when torch loads or runs it.

torch.export unpickles some payloads, evaluates symbolic expressions, resolves call targets by
attribute look-up from ``torch``, imports modules named in treespecs, loads compiled libraries, and
writes names into generated code. Everything is read here through the reader that torch itself uses,
so that both see the same bytes.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from t3compile.archive import EXTERNAL_PAYLOAD, REFERENCES_ENTRY
from t3compile.errors import ModelFileError

_LARGEST_JSON = 1 << 30
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Parameters, buffers, submodules (repeated calls have @1); none can end a quoted string.
_DOTTED = re.compile(r"[A-Za-z0-9_@-]+(\.[A-Za-z0-9_@-]+)*")
_PAYLOAD_NAME = re.compile(r"(weight|tensor)_\d+")
_OPERATOR_TARGET = re.compile(
    r"torch\.ops\.(?P<space>[A-Za-z]\w*)\.(?P<op>[A-Za-z_]\w*)(\.(?P<overload>[A-Za-z]\w*))?",
    re.ASCII,
)
_OP_NAMESPACES = frozenset({"aten", "prims", "t3"})
# These open files.
_FILE_OPS = frozenset({"from_file"})
_REGION_OPS = frozenset({"wrap_with_set_grad_enabled", "wrap_with_autocast"})
# Arithmetic on lengths; torch.export itself serializes no other calls outside torch.ops.
_ARITHMETIC = (
    *("eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "mul", "add", "sub", "floordiv", "mod"),
    *("pow", "truediv", "and_", "or_", "lshift", "rshift", "getitem"),
)
_LENGTH_TARGETS = frozenset(
    {
        *(f"_operator.{name}" for name in _ARITHMETIC),
        *(f"torch.sym_{name}" for name in ("not", "int", "float", "ite", "max", "min", "sqrt")),
        *("math.trunc", "math.ceil", "math.floor"),
    }
)
_TREE_TYPES = frozenset(
    {
        "builtins.tuple",
        "builtins.list",
        "builtins.dict",
        "collections.OrderedDict",
        "torch.Size",
        "torch.fx.immutable_collections.immutable_list",
        "torch.fx.immutable_collections.immutable_dict",
    }
)
_DIFFUSERS_OUTPUT = re.compile(r"diffusers\.models\.[a-z0-9_.]+\.[A-Za-z0-9]+Output")
_IDENTIFIER_KEYS = frozenset({"name", "as_name"})
_DOTTED_KEYS = frozenset(
    {
        "parameter_name",
        "buffer_name",
        "tensor_constant_name",
        "user_input_name",
        "fqn",
    }
)
_TRUST_REMEDY = "if you trust where it comes from, add --trust-pickle"


def check_archive(path: Path, *, trust_pickle: bool = False) -> frozenset[str]:
    """Raise ModelFileError unless the archive holds one static graph that loads without running
    foreign code.

    With ``trust_pickle`` only its form and its static shapes are checked. Returns the diffusers
    modules that define the containers of its outputs.
    """
    reader = _open_consistent(path)
    records = list(reader.get_all_records())
    models = [name for name in records if name.startswith("models/")]
    if models != ["models/model.json"]:
        raise ModelFileError(
            f"'{path}' holds {len(models)} exported models, not one named 'model'; "
            "save one program with torch.export.save"
        )
    program = _read_json(path, reader, "models/model.json")
    _refuse_dynamic_shapes(path, program)
    modules = frozenset(_output_modules(program))
    if trust_pickle:
        return modules
    for name in records:
        if name.startswith(("data/aotinductor/", "data/executorch/")):
            raise _risk(path, f"compiled code ('{name}')")
    _check_payloads(path, reader, "data/weights/", "model_weights_config.json")
    _check_payloads(path, reader, "data/constants/", "model_constants_config.json")
    _check_sample_inputs(path, reader)
    _check_graph(path, program)
    return modules


def _output_modules(program: Any) -> Iterator[str]:
    for text, is_input in _treespecs(program):
        if isinstance(text, str) and not is_input:
            for match in _DIFFUSERS_OUTPUT.finditer(text):
                yield match[0].rpartition(".")[0]


def _risk(path: Path, what: str) -> ModelFileError:
    return ModelFileError(f"'{path}' is not safe to load: it holds {what}; {_TRUST_REMEDY}")


def _open_consistent(path: Path) -> Any:
    """torch's reader of the archive, once Python's own reader sees the same stored files under one
    folder.
    """
    damaged = ModelFileError(
        f"'{path}' is damaged or was changed after torch.export.save wrote it; copy or save it again"
    )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        reader = torch._C.PyTorchFileReader(str(path))
        records = list(reader.get_all_records())
        # The sizes are asked for by name, as when loading.
        sizes = {name: reader.get_record_size(name) for name in records}
    except (zipfile.BadZipFile, RuntimeError, ValueError, NotImplementedError):
        raise damaged from None
    seen: dict[str, int] = {}
    for entry in entries:
        root, _, name = entry.filename.partition("/")
        parts = PurePosixPath(name).parts
        is_plain = bool(root) and bool(name) and ".." not in parts and not name.startswith("/")
        is_stored = entry.compress_type == zipfile.ZIP_STORED
        if not is_plain or not is_stored or name.lower() in seen:
            raise damaged
        seen[name.lower()] = entry.file_size
    roots = {entry.filename.partition("/")[0] for entry in entries}
    if len(roots) != 1 or seen != {name.lower(): size for name, size in sizes.items()}:
        raise damaged
    return reader


def _read_json(path: Path, reader: Any, name: str) -> Any:
    if not reader.has_record(name) or reader.get_record_size(name) > _LARGEST_JSON:
        raise ModelFileError(f"'{path}' lacks a usable '{name}'; save it again with torch.export.save")
    try:
        content = json.loads(reader.get_record(name))
    except (ValueError, RuntimeError, RecursionError):
        raise ModelFileError(f"'{path}' has a damaged '{name}'; copy it again") from None
    if not isinstance(content, dict):
        raise ModelFileError(f"'{path}' has a damaged '{name}'; copy it again")
    return content


def _refuse_dynamic_shapes(path: Path, program: Any) -> None:
    is_dynamic = bool(program.get("range_constraints")) or any(key == "as_expr" for key, _ in _walk(program))
    if is_dynamic:
        raise ModelFileError(
            f"'{path}' was exported with dynamic shapes, and windows are planned for one grid; "
            "export it again with static shapes (without dynamic_shapes)"
        )


def _check_payloads(path: Path, reader: Any, folder: str, config_name: str) -> None:
    if reader.has_record(f"{folder}model.pt"):
        raise _risk(path, f"pickled tensors of an old format ('{folder}model.pt')")
    config = _read_json(path, reader, f"{folder}{config_name}").get("config")
    if not isinstance(config, dict):
        raise ModelFileError(f"'{path}' has a damaged '{folder}{config_name}'; copy it again")
    for name, payload in config.items():
        if not isinstance(payload, dict) or payload.get("use_pickle") is not False:
            raise _risk(path, f"a pickled payload ('{_shown(name)}')")
        file_name = payload.get("path_name")
        is_external = file_name == EXTERNAL_PAYLOAD and reader.has_record(f"extra/{REFERENCES_ENTRY}")
        if not is_external and (not isinstance(file_name, str) or not _PAYLOAD_NAME.fullmatch(file_name)):
            raise _risk(path, f"a custom object ('{_shown(file_name)}')")
        _check_name(path, name, _DOTTED)
    if any(key == "as_expr" for key, _ in _walk(config)):
        raise _risk(path, "a symbolic expression in the shape of a tensor")


def _check_sample_inputs(path: Path, reader: Any) -> None:
    name = "data/sample_inputs/model.pt"
    if not reader.has_record(name):
        raise ModelFileError(f"'{path}' lacks '{name}'; save it again with torch.export.save")
    content = reader.get_record(name)
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError):
        raise _risk(path, "example inputs that are more than tensors") from None


def _check_graph(path: Path, program: Any) -> None:
    for key, value in _walk(program):
        if isinstance(value, dict):
            # Keyed by a name of the graph, or to be walked further.
            names, form = (list(value) if key == "tensor_values" else []), _IDENTIFIER
        elif key in ("target", "as_operator"):
            _check_target(path, value)
            continue
        elif key in _IDENTIFIER_KEYS:
            names, form = [value], _IDENTIFIER
        elif key in _DOTTED_KEYS:
            names, form = [value], _DOTTED
        elif key == "forward_arg_names":
            names, form = value or [], _IDENTIFIER
        else:
            continue
        for name in names:
            if name is not None and name != "":
                _check_name(path, name, form)
    if any(key in ("as_custom_obj", "custom_obj", "custom_obj_values") and value for key, value in _walk(program)):
        raise _risk(path, "a custom object")
    for text, is_input in _treespecs(program):
        _check_treespec(path, text, is_input=is_input)


def _treespecs(program: Any) -> Iterator[tuple[Any, bool]]:
    """The call signatures' containers, as (JSON text, whether of the inputs)."""
    for key, value in _walk(program):
        if key in ("in_spec", "out_spec") and not isinstance(value, dict):
            yield value, key == "in_spec"


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) below a JSON value."""
    pending = [value]
    while pending:
        current = pending.pop()
        if isinstance(current, dict):
            yield from current.items()
            pending.extend(current.values())
        elif isinstance(current, list):
            pending.extend(current)


def _check_target(path: Path, target: Any) -> None:
    if isinstance(target, str):
        if target in _LENGTH_TARGETS:
            return
        match = _OPERATOR_TARGET.fullmatch(target)
        if match and "__" not in target and _is_plain_operator(match["space"], match["op"]):
            return
    raise _risk(path, f"a call of '{_shown(target)}', which is no known tensor operation")


def _is_plain_operator(space: str, name: str) -> bool:
    if space == "higher_order":
        return name in _REGION_OPS
    if space not in _OP_NAMESPACES or name in _FILE_OPS:
        return False
    packet = getattr(getattr(torch.ops, space), name, None)
    return isinstance(packet, torch._ops.OpOverloadPacket)


def _check_name(path: Path, name: Any, form: re.Pattern[str]) -> None:
    is_good = isinstance(name, str) and form.fullmatch(name) is not None
    if not is_good or name.startswith("__"):
        raise _risk(path, f"the name '{_shown(name)}', which is no plain identifier")


def _check_treespec(path: Path, text: Any, *, is_input: bool) -> None:
    bad = _risk(path, f"an unknown container in its call signature ('{_shown(text)}')")
    if not isinstance(text, str):
        raise bad
    try:
        version, tree = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise bad from None
    pending = [tree]
    while pending:
        node = pending.pop()
        if version != 1 or not isinstance(node, dict):
            raise bad
        kind, context, children = (node.get(key) for key in ("type", "context", "children_spec"))
        if not isinstance(children, list):
            raise bad
        pending.extend(children)
        if kind is None and context is None and not children:
            continue
        is_output = not is_input and isinstance(kind, str) and _DIFFUSERS_OUTPUT.fullmatch(kind)
        if kind not in _TREE_TYPES and not is_output:
            raise bad
        try:
            names = [] if context is None else json.loads(context)
        except (ValueError, TypeError, RecursionError):
            raise bad from None
        if not isinstance(names, list | None):
            raise bad
        for name in names or []:
            if is_input or not isinstance(name, int):
                _check_name(path, name, _IDENTIFIER if is_input else _DOTTED)


def _shown(value: Any) -> str:
    """Text from the file, made safe to print on one line."""
    text = str(value)
    return repr(text if len(text) <= 80 else f"{text[:77]}...")[1:-1]
