"""Our side of the contract with TensorRT: every name, member, argument count and callback that the code uses exists in
the real bindings. TensorRT itself never runs here.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch

from t3compile.export import tensorrt_api
from t3compile.tensorrt_versions import OLDEST, parse_version, version_refusal
from tests.fake_tensorrt import Behaviour, make_tensorrt
from tests.tensorrt_bindings import ROOT, VERSIONS, run_with_bindings

FILES = sorted(
    [
        *(ROOT / "export").glob("tensorrt_*.py"),
        *(ROOT / "export").glob("build_*.py"),
        ROOT / "export" / "timing_cache.py",
    ]
)
# The names under which the code holds TensorRT's objects.
OBJECTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "cache": "ITimingCache",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "refitter": "Refitter",
    "parser_refitter": "OnnxParserRefitter",
    "tensor": "ITensor",
}
# In these functions the name holds something else.
NOT_TENSORRT = {("engine", "stat"), ("engine", "open"), ("engine", "name"), ("tensor", "is_complex")}


class Uses(ast.NodeVisitor):
    """Every use of TensorRT in a file: (class or "", attribute path, how, positional arguments, keywords)."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str, str, int, tuple[str, ...]]] = set()

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute):
            keywords = tuple(str(keyword.arg) for keyword in node.keywords)
            self._add(node.func, "call", len(node.args), keywords)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._add(node, "set" if isinstance(node.ctx, ast.Store) else "read", 0, ())
        self.generic_visit(node)

    def _add(self, node: ast.Attribute, how: str, positional: int, keywords: tuple[str, ...]) -> None:
        path: list[str] = []
        base: ast.expr = node
        while isinstance(base, ast.Attribute):
            path.insert(0, base.attr)
            base = base.value
        if not isinstance(base, ast.Name):
            return
        if base.id == "trt":
            self.found.add(("", ".".join(path), how, positional, keywords))
        elif base.id in OBJECTS and (base.id, path[0]) not in NOT_TENSORRT:
            self.found.add((OBJECTS[base.id], path[0], how, positional, keywords))


def _uses() -> list[tuple[str, str, str, int, tuple[str, ...]]]:
    visitor = Uses()
    for file in FILES:
        if file.name not in ("tensorrt_engine.py", "build_engine.py"):  # they hold paths and engines of ours
            visitor.visit(ast.parse(file.read_text(encoding="utf-8")))
    return sorted(visitor.found)


BEGIN = """
import inspect, json, sys
import tensorrt as trt

answers = {}
"""
END = """
print(json.dumps(answers))
"""
CHECK = """

def parameters(text):
    # "name(self: T, a: X, b: list[Y] = z) -> R": the parameters, outside of brackets, and how many have no default
    inside = text[text.index("(") + 1 : text.rindex(") ->") if ") ->" in text else text.rindex(")")]
    parts, depth = [""], 0
    for character in inside:
        depth += (character in "[(<") - (character in "])>")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]

def signatures(found):
    target = found.__init__ if inspect.isclass(found) else found
    lines = (target.__doc__ or "").splitlines()
    name = target.__name__
    plain = [line for line in lines[:1] if line.startswith(name + "(") and "*args" not in line]
    overloads = [line.split(". ", 1)[1] for line in lines if line[:1].isdigit() and f". {name}(" in line]
    return [parameters(line) for line in plain + overloads]

problems = []
for owner, path, how, positional, keywords in json.loads(sys.argv[1]):
    base = getattr(trt, owner) if owner else trt
    found = base
    for part in path.split("."):
        found = getattr(found, part, None)
    label = f"{owner or 'tensorrt'}.{path}"
    if found is None:
        problems.append(f"{label} does not exist")
    elif how == "set" and not (isinstance(found, property) and found.fset):
        problems.append(f"{label} cannot be set")
    elif how == "call" and path.endswith("__init__"):
        continue
    elif how == "call":
        for names in signatures(found) or [None]:
            if names is None:
                problems.append(f"{label} has no readable signature")
                break
            own = [n for n in names if not n.startswith("self")]
            needed = sum("=" not in name for name in own)
            given = positional + len(keywords)
            if needed <= given <= len(own) and set(keywords) <= {n.split(":")[0] for n in own}:
                break
        else:
            problems.append(f"{label} takes other arguments than {positional} and {keywords}: {signatures(found)}")
answers["problems"] = problems
"""


def _required() -> set[str]:
    return {f"{enum}.{name}" for enum, names in tensorrt_api.REQUIRED_MEMBERS.items() for name in names}


@lru_cache
def _answers(version: str) -> dict[str, Any]:
    """One process per version answers every question, as starting it takes most of the time."""
    members = [name.split(".") for name in _required()] + [list(pair) for pair in tensorrt_api.OPTIONAL_MEMBERS]
    code = BEGIN + PLUGIN + CHECK + MEMBERS + FLAGS + TYPES + CALLBACKS + END
    answers: dict[str, Any] = json.loads(run_with_bindings(version, code, json.dumps(_uses()), json.dumps(members)))
    return answers


@pytest.mark.parametrize("version", VERSIONS)
def test_our_uses_of_the_api_exist_in_the_bindings(version: str) -> None:
    uses = _uses()
    # The check is of something: the essentials are seen by the walk.
    seen = {(owner, path) for owner, path, *_ in uses}
    assert {
        ("", "Builder"),
        ("", "IStreamWriter.__init__"),
        ("", "ILogger.Severity.ERROR"),
        ("Builder", "build_serialized_network_to_stream"),
        ("OnnxParser", "parse_from_file"),
        ("IBuilderConfig", "set_timing_cache"),
        ("ICudaEngine", "weight_streaming_budget_v2"),
        ("IExecutionContext", "execute_async_v3"),
        ("OnnxParserRefitter", "refit_from_file"),
    } <= seen
    assert _answers(version)["problems"] == []


def test_the_check_sees_what_does_not_exist() -> None:
    wrong: list[tuple[Any, ...]] = [
        ("", "Bilder", "read", 0, ()),
        ("Builder", "build_cuda_engine", "call", 1, ()),
        ("OnnxParser", "parse_from_file", "call", 2, ()),
        ("OnnxParser", "parse_from_file", "call", 0, ("file",)),
        ("ICudaEngine", "num_layers", "set", 0, ()),
    ]
    problems = json.loads(run_with_bindings(VERSIONS[-1], BEGIN + CHECK + END, json.dumps(wrong)))["problems"]
    assert len(problems) == len(wrong), problems


MEMBERS = """
wanted = json.loads(sys.argv[2])
answers["missing"] = [f"{enum}.{name}" for enum, name in wanted if not hasattr(getattr(trt, enum), name)]
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_required_members_exist_in_the_bindings(version: str) -> None:
    assert [name for name in _answers(version)["missing"] if name in _required()] == []


def test_optional_members_are_missing_somewhere_and_present_elsewhere() -> None:
    for enum, name in tensorrt_api.OPTIONAL_MEMBERS:
        assert {f"{enum}.{name}" in _answers(version)["missing"] for version in VERSIONS} == {True, False}


def _member_names() -> Iterator[str]:
    """Members and flags that the code asks for by text."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "member":
                enum, name = (a.value if isinstance(a, ast.Constant) else None for a in node.args)
                if isinstance(enum, str) and isinstance(name, str):
                    yield f"{enum}.{name}"


def test_members_asked_for_by_text_are_in_the_table() -> None:
    asked = set(_member_names())
    assert len(asked) >= 4
    assert asked <= _required()


FLAGS = """
from t3compile.export.tensorrt_api import TensorRT
from t3compile.tensorrt_versions import parse_version
from t3compile.export.tensorrt_network import network_flags
api = TensorRT(trt, parse_version(trt.__version__))
kinds = trt.NetworkDefinitionCreationFlag
bits = network_flags(api)
names = sorted(name for name, kind in kinds.__members__.items() if bits >> int(kind) & 1)
answers["flags"] = [api.version_text, *names]
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_network_flags_of_each_version(version: str) -> None:
    batch = ["EXPLICIT_BATCH"] if version.startswith("10.") else []
    wanted = [version, *batch, "PREFER_AOT_PYTHON_PLUGINS", "STRONGLY_TYPED"]
    assert _answers(version)["flags"] == wanted


# A call through the base class goes through C++'s virtual table back to Python, as TensorRT calls it.
CALLBACKS = """
import ctypes, io
from t3compile.export.build_network import make_stream_writer
from t3compile.export.build_progress import Phases, make_progress_monitor
from t3compile.export.tensorrt_api import Messages, make_logger

capsule = ctypes.pythonapi.PyCapsule_New
capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
data = ctypes.create_string_buffer(b"engine")
file = io.BytesIO()
written = trt.IStreamWriter.write(make_stream_writer(trt, file), capsule(ctypes.addressof(data), None, None), 6)

shown = []
class Shown:
    def phase(self, name, depth, done):
        shown.append((name, depth, done))
phases = Phases(Shown())
monitor = make_progress_monitor(trt, phases)
trt.IProgressMonitor.phase_start(monitor, "outer", None, 2)
trt.IProgressMonitor.phase_start(monitor, "inner", "outer", 4)
go_on = trt.IProgressMonitor.step_complete(monitor, "inner", 0)
phases.cancelled = True
stopped = trt.IProgressMonitor.step_complete(monitor, "inner", 1)
trt.IProgressMonitor.phase_finish(monitor, "inner")

messages = Messages()
logger = make_logger(trt, messages)
for severity in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"):
    trt.ILogger.log(logger, getattr(trt.ILogger.Severity, severity), severity)
answers["callbacks"] = [
    written, file.getvalue().decode(), go_on, stopped, shown, messages.errors, messages.warnings
]
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_our_callbacks_are_reached_through_the_bindings(version: str) -> None:
    written, data, go_on, stopped, shown, errors, warnings = _answers(version)["callbacks"]
    assert (written, data) == (6, "engine")
    assert (go_on, stopped) == (True, False)
    assert shown == [["outer", 0, 0.0], ["inner", 1, 0.0], ["inner", 1, 0.125], ["inner", 1, 0.25]]
    assert errors == ["INTERNAL_ERROR", "ERROR"]
    assert warnings == ["WARNING"]


@pytest.mark.parametrize("version", ["10.13.3.9", "11.4.0.106"])
def test_the_stand_in_has_no_name_that_the_bindings_lack(version: str) -> None:
    fake = make_tensorrt(version, Behaviour())
    uses = []
    for name, made in vars(fake).items():
        if name.startswith("_"):
            continue
        uses.append(("", name, "read", 0, ()))
        if isinstance(made, type) and name not in ("ILogger", "IProgressMonitor", "IStreamWriter"):
            members = [member for member in vars(made) if not member.startswith("_")]
            uses += [("", f"{name}.{member}", "read", 0, ()) for member in members]
    assert len(uses) > 60
    assert json.loads(run_with_bindings(version, BEGIN + CHECK + END, json.dumps(uses)))["problems"] == []


# TensorRT greets on stdout; one that came before the JSON would break the reading of the answers.
PLUGIN = """
from t3compile.export.tensorrt_api import stdout_to_stderr
with stdout_to_stderr():
    import tensorrt.plugin
"""
TYPES = """
from t3compile.export.tensorrt_api import TORCH_DTYPES
members = {name: getattr(trt.DataType, name) for name in TORCH_DTYPES}
answers["types"] = [[member.name, member.itemsize] for member in members.values()]
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_dtypes_have_the_names_and_sizes_of_the_bindings(version: str) -> None:
    sizes = [getattr(torch, dtype).itemsize for dtype in tensorrt_api.TORCH_DTYPES.values()]
    assert _answers(version)["types"] == [list(pair) for pair in zip(tensorrt_api.TORCH_DTYPES, sizes, strict=True)]


def test_every_file_that_holds_tensorrt_is_checked() -> None:
    """A new file that uses the module must be added to FILES."""
    users = {
        path
        for path in (ROOT / "export").glob("*.py")
        if "trt." in path.read_text(encoding="utf-8") and "plugin" not in path.name
    }
    assert users <= set(FILES)


def test_wheels_of_the_makefile_are_those_of_the_tests() -> None:
    assert "tests/tensorrt_versions.txt" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [version for version in VERSIONS if version_refusal(version)] == []
    assert min(map(parse_version, VERSIONS))[:2] == OLDEST
