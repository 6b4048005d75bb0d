"""What is shipped: the packages of pyproject are the tree, the wheel holds them alone, versions are pinned."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import t3compile

ROOT = Path(__file__).parents[1]
LINKED = {"passes": "t3compile/passes", "export": "t3compile/export"}
# DESIGN.md, section 4, and build_engine.
PUBLIC = (
    "trace",
    "load_program",
    "detect",
    "make_plan",
    "rewrite",
    "verify",
    "export_onnx",
    "build_engine",
    "load_engine",
)
MODEL_NAMES = re.compile(
    r"(?<![a-z])(wan(?!t(s|ed|ing)?\b)|hunyuan|cogvideo|flux|ltx|mochi|opensora|allegro|latte|sana|cosmos)",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _sources() -> list[Path]:
    return sorted(path for room in ("t3compile", "passes", "export") for path in _python_files(ROOT / room))


def _python_files(folder: Path) -> list[Path]:
    """Without what the links show a second time."""
    return [path for path in folder.rglob("*.py") if not any(parent.is_symlink() for parent in path.parents)]


def _module(path: Path) -> str:
    """The dotted name under which a source file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "t3compile" else ("t3compile", *parts)).removesuffix(".__init__")


def test_listed_packages_are_the_folders(project: dict[str, Any]) -> None:
    folders = {_module(path / "__init__.py") for path in {file.parent for file in _sources()}}
    assert set(project["tool"]["setuptools"]["packages"]) == folders
    for folder in {file.parent for file in _sources()}:
        assert (folder / "__init__.py").is_file()


def test_package_dirs_and_links_say_the_same(project: dict[str, Any]) -> None:
    mapped = project["tool"]["setuptools"]["package-dir"]
    assert mapped == {"t3compile": "t3compile"} | {f"t3compile.{name}": name for name in LINKED}
    for name, link in LINKED.items():
        assert (ROOT / link).is_symlink()
        assert (ROOT / link).readlink() == Path("..") / name
        assert not (ROOT / name).is_symlink()


def test_links_are_committed_as_links() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--stage", *LINKED.values()], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modes = {text.split()[3]: text.split()[0] for text in listed.stdout.splitlines()}
    assert modes == dict.fromkeys(LINKED.values(), "120000")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder is left in the tree or taken from it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("t3compile", "passes", "export"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    command = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "dist", "."]
    built = subprocess.run(
        [sys.executable, "-m", "pip", *command], cwd=tree, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (path,) = (tree / "dist").iterdir()
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert wheel.name == f"t3compile-{t3compile.__version__}-py3-none-any.whl"
    about = f"t3compile-{t3compile.__version__}.dist-info/"
    assert {name for name in names if name.endswith(".py")} == {
        _module(path).replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
        for path in _sources()
    }
    rest = {name for name in names if not name.endswith(".py") and not name.startswith(about)}
    assert rest == {"t3compile/py.typed"}
    assert f"{about}licenses/LICENSE" in names


def test_the_wheel_imports_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        metadata = archive.read(f"t3compile-{t3compile.__version__}.dist-info/METADATA").decode()
        entries = archive.read(f"t3compile-{t3compile.__version__}.dist-info/entry_points.txt").decode()
    assert f"\nVersion: {t3compile.__version__}\n" in metadata
    assert "t3compile = t3compile.__main__:main" in entries
    code = "import t3compile.passes.layout as p, t3compile.export.window_function as e; print(p.__file__, e.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.count(str(tmp_path)) == 2, done.stderr


def test_the_version_is_the_packages(project: dict[str, Any]) -> None:
    assert project["project"]["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", t3compile.__version__)
    assert f"## {t3compile.__version__}" in (ROOT / "CHANGELOG.md").read_text().replace("[", "").replace("]", "")


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return match.group().lower().replace("_", "-")


def test_constraints_pin_every_direct_dependency_exactly(project: dict[str, Any]) -> None:
    lines = [text for text in (ROOT / "constraints.txt").read_text().splitlines() if text and text[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", text) for text in lines), lines
    pinned = dict(text.lower().replace("_", "-").split("==") for text in lines)
    assert len(pinned) == len(lines)
    assert pinned["torch"] == "2.13.0"
    extras = project["project"]["optional-dependencies"]
    direct = [*project["project"]["dependencies"], *extras["cpu"], *extras["diffusers"], *extras["dev"]]
    assert [name for name in map(_name, direct) if name not in pinned] == []


def test_constraints_satisfy_pyproject(project: dict[str, Any]) -> None:
    from packaging.requirements import Requirement

    lines = [text for text in (ROOT / "constraints.txt").read_text().splitlines() if text and text[0] != "#"]
    pinned = dict(text.lower().replace("_", "-").split("==") for text in lines)
    extras = project["project"]["optional-dependencies"]
    for text in [*project["project"]["dependencies"], *extras["cpu"], *extras["diffusers"], *extras["dev"]]:
        assert Requirement(text).specifier.contains(pinned[_name(text)]), text


def test_runtimes_that_install_the_same_module_are_never_together(project: dict[str, Any]) -> None:
    extras = {
        name: {_name(text) for text in texts} for name, texts in project["project"]["optional-dependencies"].items()
    }
    assert extras["cpu"] == {"onnxruntime"}
    assert extras["gpu"] == {"onnxruntime-gpu"}
    required = {_name(text) for text in project["project"]["dependencies"]}
    assert not required & {"onnxruntime", "onnxruntime-gpu", "tensorrt", "diffusers"}


def test_passes_know_no_model_by_name() -> None:
    """Detection works on graphs: comments may not hint at models either."""
    assert MODEL_NAMES.search("if isinstance(model, WanTransformer3DModel):")
    found = [
        f"{path.name}:{number}: {text.strip()}"
        for path in _python_files(ROOT / "passes")
        for number, text in enumerate(path.read_text().splitlines(), 1)
        if MODEL_NAMES.search(text)
    ]
    assert found == []


def test_the_linked_rooms_are_imported_under_their_full_name() -> None:
    wrong = re.compile(r"^\s*(import|from)\s+(passes|export)\b", re.MULTILINE)
    files = [*_sources(), *_python_files(ROOT / "tests")]
    assert wrong.search("from passes.layout import x")
    assert [str(path) for path in files if wrong.search(path.read_text())] == []


def test_the_public_names_are_there() -> None:
    assert set(PUBLIC) <= set(t3compile.__all__)
    for name in t3compile.__all__:
        value = getattr(t3compile, name)
        assert value.__name__ == name
        assert value.__doc__, name
        assert value.__module__.startswith("t3compile.")
    assert sorted(t3compile.__all__) == t3compile.__all__
    assert set(t3compile.__all__) <= set(dir(t3compile))
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        t3compile.no_such_name  # noqa: B018


@pytest.mark.parametrize("path", _sources(), ids=_module)
def test_every_module_imports_and_says_what_it_is(path: Path) -> None:
    module = importlib.import_module(_module(path))
    assert module.__doc__
    assert Path(str(module.__file__)).resolve() == path
