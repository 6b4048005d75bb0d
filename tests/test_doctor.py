"""doctor: what is here, what is missing for which command, and broken installs by their reason, never by a traceback.

Other machines are simulated by what makes them different: packages and a driver library on the path of a fresh process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from t3compile import doctor
from t3compile.cli import main
from t3compile.doctor import Finding, examine
from t3compile.tensorrt_versions import version_refusal

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("cc") or shutil.which("gcc")

# Hides a package and its metadata from every process that has this on its path.
_HIDE = """
import sys
hidden = {names!r}
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)
    def find_distributions(self, *args, **kwargs):
        for found in self.finder.find_distributions(*args, **kwargs):
            if found.metadata["Name"] not in hidden:
                yield found
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path = [Hiding(finder) if hasattr(finder, "find_distributions") else finder for finder in sys.meta_path]
"""


class Machine:
    """A folder of packages in front of the installed ones, and an environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}

    def package(self, name: str, source: str) -> None:
        (self.folder / name).mkdir()
        (self.folder / name / "__init__.py").write_text(textwrap.dedent(source))

    def distribution(self, name: str, version: str) -> None:
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def hide(self, *names: str) -> None:
        (self.folder / "sitecustomize.py").write_text(_HIDE.format(names=set(names)))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "t3compile", "doctor", *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )

    def examine(self) -> Mapping[str, Finding]:
        done = self.run("--json")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        found = [Finding(**row) for row in json.loads(done.stdout)]
        assert len({one.what for one in found}) == len(found)
        for one in found:
            assert "Traceback" not in one.detail
            assert "\n" not in one.detail
            # Whatever is missing says for what.
            assert one.status == "yes" or (one.detail and one.needed_for), one
        return {one.what: one for one in found}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    # Light stand-ins, so that no test imports the real ones again.
    made.package("torch", "__version__ = '2.13.0'\nclass version: cuda = None")
    made.package("triton", _TRITON)
    made.package("onnxruntime", _ONNXRUNTIME.format(version="1.31.1", providers=["CPUExecutionProvider"]))
    return made


_TRITON = """
__version__ = "3.9.0"
class knobs:
    class nvidia:
        class ptxas:
            path, version = "/opt/ptxas", "12.9"
"""
_ONNXRUNTIME = """
__version__ = {version!r}
def get_available_providers():
    return {providers!r}
"""


# --- this machine --------------------------------------------------------------------------------


def test_this_machine() -> None:
    before = os.times()
    found = {one.what: one for one in examine()}
    after = os.times()
    # Seconds of computing, which do not depend on who else uses the machine.
    spent = (after.children_user + after.children_system) - (before.children_user + before.children_system)
    assert spent < 5
    assert found["Python"].version == sys.version.split()[0]
    for what, distribution in (("torch", "torch"), ("Triton", "triton"), ("diffusers", "diffusers")):
        assert found[what].version.partition("+")[0] == metadata.version(distribution).partition("+")[0]
        assert found[what].status == "yes"
    assert Path(found["ptxas"].detail).is_file()
    import onnxruntime

    for name, what in (("CPU", "CPU"), ("CUDA", "CUDA"), ("Tensorrt", "TensorRT")):
        built = f"{name}ExecutionProvider" in onnxruntime.get_available_providers()
        assert (found[f"onnxruntime on {what}"].detail != "not in this build") is built


def test_nothing_is_loaded_or_started_in_the_asking_process() -> None:
    code = """
import sys
from t3compile.doctor import examine
examine()
heavy = {"torch", "onnxruntime", "triton", "diffusers", "tensorrt", "numpy"} & set(sys.modules)
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
print(sorted(heavy), [name for name in ("libcuda.so", "libnvidia-ml") if name in maps])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[] []\n"


def test_the_table_and_its_remedies(machine: Machine) -> None:
    machine.hide("tensorrt")
    done = machine.run()
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["what", "here", "version", "detail", "without", "it"] in lines
    assert [line for line in lines if line[:3] == ["TensorRT", "no", "-"]] != []
    assert "TensorRT: pip install 't3compile[tensorrt]'" in done.stderr.splitlines()


# --- missing -------------------------------------------------------------------------------------


def test_everything_missing_is_named_with_its_command(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.hide("torch", "triton", "onnxruntime", "onnxruntime-gpu", "tensorrt", "diffusers")
    (tmp_path / "bin").mkdir()
    machine.environment |= {"PATH": str(tmp_path / "bin")}
    machine.environment.pop("CXX", None)
    found = machine.examine()
    expected = {
        "torch": ("every command that reads a model", "pip install torch"),
        "Triton": ("kernels build, build-engine with the plugin", "pip install triton (Linux)"),
        "onnxruntime": ("run MODEL.onnx, and the comparison of export", "pip install 't3compile[cpu]'"),
        "TensorRT": ("build-engine, run ENGINE", "pip install 't3compile[tensorrt]'"),
        "diffusers": ("MODEL as a diffusers folder", "pip install 't3compile[diffusers]'"),
    }
    for what, (needed_for, remedy) in expected.items():
        assert found[what] == Finding(what, "no", "", "not installed", needed_for, remedy)
    assert found["C++ compiler"].status == "no"
    assert found["C++ compiler"].needed_for == "export --target aoti"
    assert {one.status for one in found.values() if one.what != "Python"} == {"no"}


# --- broken --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "raise ImportError('libnvinfer.so.10: cannot open shared object file: No such file or directory')",
            "ImportError: libnvinfer.so.10: cannot open shared object file: No such file or directory",
        ),
        ("import tensorrt_libs", "No module named 'tensorrt_libs'"),
        ("from tensorrt.tensorrt import *", "No module named 'tensorrt.tensorrt'"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("import ctypes; ctypes.CDLL('libnvinfer.so.99')", "OSError: libnvinfer.so.99"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "importing it crashes with SIGSEGV"),
        ("import sys; sys.exit('no licence')", "importing it ends Python with exit code 1: no licence"),
        ("import os; os._exit(0)", "importing it ends Python with exit code 0: no message"),
        ("import sys; print('[1]'); sys.exit()", "importing it gave no answer"),
        ("(", "SyntaxError"),
    ],
)
def test_a_broken_install_is_told_by_its_reason(source: str, reason: str, machine: Machine) -> None:
    machine.package("tensorrt", source)
    found = machine.examine()["TensorRT"]
    assert found.status == "broken"
    assert found.detail.startswith(f"installed, but cannot be imported: {reason}")
    assert found.remedy == "pip install 't3compile[tensorrt]'"


def test_a_package_that_prints_is_understood(machine: Machine) -> None:
    machine.package(
        "tensorrt", "print('welcome', end='')\nimport warnings\nwarnings.warn('old')\n__version__ = '11.0.0'"
    )
    assert machine.examine()["TensorRT"] == Finding("TensorRT", "yes", "11.0.0")


def test_an_import_that_hangs_is_broken(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.package("tensorrt", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "_TIMEOUT_S", 0.5)
    monkeypatch.setenv("PYTHONPATH", machine.environment["PYTHONPATH"])
    assert doctor._probe("tensorrt") == {"error": "importing it did not end within 0 s"}


def test_a_broken_compiler_is_told(machine: Machine) -> None:
    tool = machine.folder / "g++-broken"
    tool.write_text("#!/bin/sh\nexit 3\n")
    tool.chmod(0o755)
    machine.environment |= {"CXX": str(tool)}
    found = machine.examine()["C++ compiler"]
    assert (found.status, found.detail) == ("broken", f"'{tool}' fails with exit code 3")
    machine.environment |= {"CXX": "no-such-compiler"}
    assert machine.examine()["C++ compiler"].detail == "'no-such-compiler' is not on the PATH"


def test_diffusers_without_what_it_depends_on_is_broken(machine: Machine) -> None:
    machine.hide("accelerate", "safetensors")
    found = machine.examine()["diffusers"]
    assert found.status == "broken"
    assert found.detail == "it needs safetensors, accelerate"
    machine.hide("none")
    machine.distribution("diffusers", "0.31.0")
    found = machine.examine()["diffusers"]
    assert (found.status, found.version, found.detail) == ("no", "0.31.0", "0.38 or newer is needed")


# --- versions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["10.13.0.35", "10.13.3.9", "10.15.1", "10.16.1.11", "11.0.0", "11.4.0.1"])
def test_supported_tensorrt(version: str) -> None:
    assert version_refusal(version) is None


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("8.6.1", "too old"),
        ("10.9.0.34", "too old"),
        ("10.12.0", "too old"),
        ("10.14.1.48", "is refused"),
        ("10.14", "is refused"),
        ("", "cannot be read"),
        ("unknown", "cannot be read"),
    ],
)
def test_refused_tensorrt(version: str, reason: str) -> None:
    refusal = version_refusal(version)
    assert refusal is not None
    assert reason in refusal
    assert version in refusal


def test_a_refused_tensorrt_is_no(machine: Machine) -> None:
    machine.package("tensorrt", "__version__ = '10.14.1.48'")
    found = machine.examine()["TensorRT"]
    assert (found.status, found.version) == ("no", "10.14.1.48")
    assert "10.14.1.48 is refused" in found.detail
    assert found.remedy == "pip install 'tensorrt>=10.15'"


def test_two_onnxruntimes_are_warned_of(machine: Machine) -> None:
    machine.distribution("onnxruntime", "1.31.1")
    assert "onnxruntime twice" not in machine.examine()
    machine.distribution("onnxruntime-gpu", "1.31.1")
    found = machine.examine()["onnxruntime twice"]
    assert found.status == "warning"
    assert "pip uninstall onnxruntime onnxruntime-gpu" in found.remedy


def test_an_old_onnxruntime_is_no(machine: Machine) -> None:
    shutil.rmtree(machine.folder / "onnxruntime")
    machine.package("onnxruntime", _ONNXRUNTIME.format(version="1.9.0", providers=[]))
    found = machine.examine()
    assert (found["onnxruntime"].status, found["onnxruntime"].version) == ("no", "1.9.0")
    assert found["onnxruntime on CPU"].status == "no"


def test_a_triton_without_ptxas(machine: Machine) -> None:
    shutil.rmtree(machine.folder / "triton")
    machine.package("triton", "__version__ = '3.9.0'\ndef __getattr__(name): raise RuntimeError('Cannot find ptxas')")
    found = machine.examine()
    assert found["Triton"].status == "yes"
    assert (found["ptxas"].status, found["ptxas"].detail) == ("no", "RuntimeError: Cannot find ptxas")


# --- a GPU ---------------------------------------------------------------------------------------

# The calls of NVML that doctor makes, for two GPUs.
_NVML = r"""
#include <stdio.h>
#include <string.h>
struct memory { unsigned long long total, free, used; };
static int shut = 1;
int nvmlInit_v2(void) { shut = 0; return INIT; }
int nvmlShutdown(void) { shut = 1; return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned length) { snprintf(text, length, "580.65.06"); return shut; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13010; return shut; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = COUNT; return shut; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)(size_t)(index + 1); return shut; }
int nvmlDeviceGetName(void *device, char *text, unsigned length) {
    snprintf(text, length, "Test GPU %d", (int)(size_t)device);
    return shut;
}
int nvmlDeviceGetMemoryInfo(void *device, struct memory *memory) {
    memory->total = 80ULL << 30;
    return (size_t)device == UNSUPPORTED ? 3 : (size_t)device == LOST ? 15 : shut || !device;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    *major = MAJOR;
    *minor = (int)(size_t)device - 1;
    return (size_t)device == UNSUPPORTED ? 3 : shut;
}
"""


def _driver(
    machine: Machine, *, init: int = 0, count: int = 2, major: int = 9, unsupported: int = 0, lost: int = 0
) -> None:
    if COMPILER is None:
        pytest.skip("no C compiler for a library in the driver's place")
    source = machine.folder / "nvml.c"
    source.write_text(_NVML)
    values = {"INIT": init, "COUNT": count, "MAJOR": major, "UNSUPPORTED": unsupported, "LOST": lost}
    defined = [f"-D{name}={value}" for name, value in values.items()]
    library = machine.folder / "libnvidia-ml.so.1"
    subprocess.run([COMPILER, "-shared", "-fPIC", *defined, source, "-o", library], check=True)
    machine.environment |= {"LD_LIBRARY_PATH": str(machine.folder)}


def _cuda_packages(machine: Machine, cuda: str) -> None:
    for name in ("torch", "onnxruntime"):
        shutil.rmtree(machine.folder / name)
    machine.package("torch", f"__version__ = '2.13.0'\nclass version: cuda = {cuda!r}")
    providers = [f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "CPU")]
    machine.package("onnxruntime", _ONNXRUNTIME.format(version="1.31.1", providers=providers))


def test_a_machine_with_gpus(machine: Machine) -> None:
    _driver(machine)
    _cuda_packages(machine, "13.0")
    machine.package("tensorrt", "__version__ = '10.16.1.11'")
    found = machine.examine()
    assert found["NVIDIA driver"] == Finding("NVIDIA driver", "yes", "580.65.06", "CUDA up to 13.1")
    assert found["GPU 0"] == Finding("GPU 0", "yes", "", "Test GPU 1, compute capability 9.0, 80 GiB")
    assert found["GPU 1"].detail == "Test GPU 2, compute capability 9.1, 80 GiB"
    assert found["torch on CUDA"] == Finding("torch on CUDA", "yes", "13.0")
    for what in ("Triton kernels on CUDA", "onnxruntime on CUDA", "onnxruntime on TensorRT", "TensorRT"):
        assert found[what].status == "yes", found[what]


def test_a_gpu_that_is_too_old_for_the_kernel(machine: Machine) -> None:
    _driver(machine, major=7)
    _cuda_packages(machine, "13.0")
    found = machine.examine()
    assert found["GPU 0"].status == "yes"
    assert found["Triton kernels on CUDA"].status == "no"
    assert found["Triton kernels on CUDA"].detail == "no GPU of compute capability 8.0 or newer"


def test_torch_built_for_a_newer_cuda_than_the_driver(machine: Machine) -> None:
    _driver(machine)
    _cuda_packages(machine, "14.0")
    found = machine.examine()["torch on CUDA"]
    assert (found.status, found.version) == ("no", "14.0")
    assert found.detail == "built for CUDA 14.0, but the driver knows CUDA up to 13.1"
    assert "update the driver" in found.remedy


def test_gpu_builds_without_a_gpu(machine: Machine) -> None:
    _driver(machine, count=0)
    _cuda_packages(machine, "13.0")
    found = machine.examine()
    assert (found["GPU"].status, found["GPU"].detail) == ("no", "the driver sees none")
    assert found["torch on CUDA"].detail == "built for CUDA 13.0, but there is no GPU"
    assert found["onnxruntime on CUDA"].detail == "in this build, but there is no GPU"


def test_a_driver_that_does_not_answer(machine: Machine) -> None:
    _driver(machine, init=18)
    found = machine.examine()["GPU"]
    assert found.status == "broken"
    assert "nvmlInit_v2 of libnvidia-ml.so.1 returned 18" in found.detail


def test_what_a_gpu_does_not_tell_is_unknown_and_its_neighbour_whole(machine: Machine) -> None:
    _driver(machine, unsupported=1)
    _cuda_packages(machine, "13.0")
    found = machine.examine()
    assert found["GPU 0"] == Finding("GPU 0", "yes", "", "Test GPU 1, compute capability unknown, memory unknown")
    assert found["GPU 1"].detail == "Test GPU 2, compute capability 9.1, 80 GiB"
    assert found["Triton kernels on CUDA"].status == "yes"


def test_another_failure_of_a_gpu_is_broken(machine: Machine) -> None:
    _driver(machine, lost=2)
    assert "nvmlDeviceGetMemoryInfo of libnvidia-ml.so.1 returned 15" in machine.examine()["GPU"].detail


# --- the command line ----------------------------------------------------------------------------


def test_the_command_shows_what_examine_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = (Finding("A", "yes", "1"), Finding("B", "broken", "", "why", "what", "how"))
    monkeypatch.setattr(doctor, "examine", lambda: found)
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == [one.to_json() for one in found]
    table = CliRunner().invoke(main, ["doctor"])
    assert table.exit_code == 0
    assert [line.split() for line in table.stdout.splitlines()[-2:]] == [
        ["A", "yes", "1", "-", "-"],
        ["B", "broken", "-", "why", "what"],
    ]
    assert table.stderr == "B: how\n"
