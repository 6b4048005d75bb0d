"""The gates that the PTX of a kernel has to pass before it is written or goes into an engine.

Those over the text are pure functions and need nothing; those over assembled code need ptxas (assemble_ptx.py). A gate
that does not apply to a kernel says why. Which limits were read and which were reported by others:
TensorRT's loader takes at most 48 KiB of dynamic shared memory and refuses targets with a letter (reported); no kernel
of this project has run in TensorRT yet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from t3compile.errors import KernelError
from t3compile.export.assemble_ptx import Assembly
from t3compile.export.compile_kernel import CompiledKernel, entry_parameters, launch_text
from t3compile.ops.window_launch import block_depth
from t3compile.sites import ITEM_BYTES

SHARED_BYTES_LIMIT = 49_152
MAX_PTX_VERSION = (8, 0)
TARGET = "sm_80"

Verdict = Literal["passed", "failed", "not applicable"]


@dataclass(frozen=True)
class GateResult:
    """What a gate expected of a kernel and what it found; where it does not apply, ``found`` says why."""

    gate: str
    verdict: Verdict
    expected: str
    found: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Gate:
    """A question to the text of a kernel.

    ``depends_on_tile``: another tile may pass where this one fails, so a failure is no fault of the compiler.
    """

    name: str
    check: Callable[[CompiledKernel], tuple[bool | None, str, str]]
    depends_on_tile: bool = False

    def __call__(self, kernel: CompiledKernel) -> GateResult:
        passed, expected, found = self.check(kernel)
        verdict: Verdict = "not applicable" if passed is None else "passed" if passed else "failed"
        return GateResult(self.name, verdict, expected, found)


def _entry(kernel: CompiledKernel) -> tuple[bool, str, str]:
    names = re.findall(r"\.entry\s+([\w$]+)", kernel.ptx)
    return names == [kernel.entry], f"the entry {kernel.entry} alone", ", ".join(names) or "no entry"


def _parameters(kernel: CompiledKernel) -> tuple[bool, str, str]:
    expected = f"{kernel.pointers} pointers: {kernel.launch.inputs} inputs and the output"
    try:
        parameters = entry_parameters(kernel.ptx)
    except KernelError as error:
        return False, expected, str(error)
    pointers = [text for text in parameters if re.match(r"\.param\s+\.[ub]64\b", text)]
    found = f"{len(parameters)} parameters, {len(pointers)} of them pointers"
    return len(parameters) == len(pointers) == kernel.pointers, expected, found


def _removed(kernel: CompiledKernel) -> tuple[bool, str, str]:
    declared = {text.split()[-1] for text in _declarations(kernel)}
    used = set(re.findall(r"(?<![\w$])[\w$]+_param_\d+", kernel.ptx))
    left = sorted(used - declared)
    return not left, "no use of a parameter that the entry does not declare", ", ".join(left) or "none"


def _declarations(kernel: CompiledKernel) -> tuple[str, ...]:
    try:
        return entry_parameters(kernel.ptx)
    except KernelError:
        return ()


def _threads(kernel: CompiledKernel) -> tuple[bool, str, str]:
    found = [re.sub(r"\s", "", text) for text in re.findall(r"\.reqntid\s+([\d, ]+)", kernel.ptx)]
    counts = {",".join([str(kernel.block_x)] + ["1"] * more) for more in range(3)}
    expected = f".reqntid {kernel.block_x}, 32 times {kernel.tile.warps} warps"
    return len(found) == 1 and found[0] in counts, expected, "; ".join(found) or "no .reqntid"


def _version(kernel: CompiledKernel) -> tuple[bool, str, str]:
    found = re.findall(r"^\.version\s+(\d+)\.(\d+)", kernel.ptx, re.MULTILINE)
    newest = ".".join(map(str, MAX_PTX_VERSION))
    is_old = len(found) == 1 and (int(found[0][0]), int(found[0][1])) <= MAX_PTX_VERSION
    return is_old, f".version at most {newest}", ", ".join(".".join(one) for one in found) or "no .version"


def _target(kernel: CompiledKernel) -> tuple[bool, str, str]:
    found = [text.strip() for text in re.findall(r"^\.target\s+(.+)$", kernel.ptx, re.MULTILINE)]
    return (
        found == [TARGET],
        f".target {TARGET} alone, which every later architecture takes",
        "; ".join(found) or "none",
    )


def _shared(kernel: CompiledKernel) -> tuple[bool, str, str]:
    static = sum(
        int(count) * int(bits) // 8
        for bits, count in re.findall(
            r"^(?!\.extern)[^\n/]*\.shared\s+(?:\.align\s+\d+\s+)?\.b(\d+)\s+[\w$]+\[(\d+)\]", kernel.ptx, re.MULTILINE
        )
    )
    total = kernel.shared_bytes + static
    return total <= SHARED_BYTES_LIMIT, f"at most {SHARED_BYTES_LIMIT:,} bytes", f"{total:,} bytes"


def _source_paths(kernel: CompiledKernel) -> tuple[bool, str, str]:
    found = re.findall(r"^\s*(\.(?:file|loc)\b.*|\.section\s+\.debug.*)$", kernel.ptx, re.MULTILINE)
    return not found, "no .file, .loc or .debug section", f"'{found[0].strip()}'" if found else "none"


def _tensor_cores(kernel: CompiledKernel) -> tuple[bool | None, str, str]:
    letters = {"float16": "f16", "bfloat16": "bf16"}.get(kernel.launch.dtype)
    if letters is None:
        return None, "mma.sync", "float32 products are exact to float32, which tensor cores are not"
    found = re.findall(rf"mma\.sync\.aligned\.[\w.]*\.f32\.{letters}\.{letters}\.f32", kernel.ptx)
    return bool(found), f"mma.sync of {letters} with float32 sums", f"{len(found)} of them"


def _wide_loads(kernel: CompiledKernel) -> tuple[bool | None, str, str]:
    launch = kernel.launch
    rows = [depth * ITEM_BYTES[launch.dtype] for depth in (launch.head_dim, launch.value_dim)]
    if any(row % 16 for row in rows):
        return None, "loads of 16 bytes", f"rows of {rows[0]} and {rows[1]} bytes do not all begin at multiples of 16"
    width = min(16, _bytes_per_thread(kernel))
    copies = [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.[^;\n]*?\],\s*(0x[0-9a-fA-F]+|\d+)", kernel.ptx)]
    loads = [
        int(count or 1) * int(bits) // 8
        for count, bits in re.findall(r"ld\.global(?:\.[a-zA-Z][\w:]*)*?(?:\.v(\d))?\.[bfsu](\d+)\b", kernel.ptx)
    ]
    wide_copies, wide_loads = (sum(size >= width for size in sizes) for sizes in (copies, loads))
    narrow = len(copies) + len(loads) - wide_copies - wide_loads
    # The loop over keys is pipelined by asynchronous copies; one that runs once is unrolled and has none.
    keys = launch.args.pattern.largest_window_tokens(launch.args.grid)
    is_pipelined = bool(copies) or (kernel.tile.stages > 1 and keys > kernel.tile.block_n)
    if launch.mask is None:
        expected, passed = f"no load below {width} bytes", narrow == 0
    else:
        # An element of the mask is loaded alone.
        expected, passed = f"loads of {width} bytes beside the mask's", True
    if is_pipelined:
        expected += ", among them cp.async"
    passed = passed and bool(wide_copies if is_pipelined else wide_loads)
    found = f"{wide_copies} cp.async and {wide_loads} ld.global of {width} bytes, {narrow} narrower"
    return passed, expected, found


def _bytes_per_thread(kernel: CompiledKernel) -> int:
    """What each thread has to load of the smallest of the tiles of q, k and v: small tiles are loaded narrowly."""
    launch, tile = kernel.launch, kernel.tile
    depth = min(block_depth(launch.head_dim), block_depth(launch.value_dim))
    return min(tile.block_m, tile.block_n) * depth * ITEM_BYTES[launch.dtype] // (32 * tile.warps)


TEXT_GATES: tuple[Gate, ...] = (
    Gate("entry", _entry),  # the name that the plugin gives to TensorRT
    Gate("parameters", _parameters),  # TensorRT passes inputs, then outputs, nothing else
    Gate("removed parameters", _removed),
    Gate("threads", _threads),  # a launch with another block size would fail
    Gate("PTX version", _version),  # older drivers refuse newer text
    Gate("target", _target),
    Gate("shared memory", _shared, depends_on_tile=True),
    Gate("source paths", _source_paths),  # an engine shall not tell where it was built
    Gate("tensor cores", _tensor_cores),
    Gate("16-byte loads", _wide_loads, depends_on_tile=True),
)
ASSEMBLES, SPILLS = "assembles", "spills"
# Gates whose failure another tile may mend.
TILE_GATES = frozenset({gate.name for gate in TEXT_GATES if gate.depends_on_tile} | {SPILLS})


def check_text(kernel: CompiledKernel) -> tuple[GateResult, ...]:
    """Every gate over the text, in order."""
    return tuple(gate(kernel) for gate in TEXT_GATES)


def check_assemblies(assemblies: Iterable[Assembly]) -> tuple[GateResult, ...]:
    """The gates over what ptxas made, two for each architecture: it assembles, and no register is spilled."""
    results = []
    for assembly in assemblies:
        name = f"sm_{assembly.architecture}"
        if assembly.error:
            results.append(GateResult(ASSEMBLES, "failed", f"ptxas takes it for {name}", assembly.error))
            continue
        results.append(GateResult(ASSEMBLES, "passed", f"ptxas takes it for {name}", "it does"))
        spilled = (assembly.spill_store_bytes, assembly.spill_load_bytes)
        found = "{} bytes stored, {} loaded".format(*spilled)
        results.append(GateResult(SPILLS, "failed" if any(spilled) else "passed", f"none on {name}", found))
    return tuple(results)


def require_gates(kernel: CompiledKernel, results: Iterable[GateResult]) -> None:
    """Raise KernelError for the first gate that failed, naming pattern, tile, gate, expected and found."""
    for result in results:
        if result.verdict == "failed":
            raise KernelError(f"{launch_text(kernel.launch, kernel.tile)}: {failure_text(result)}")


def failure_text(result: GateResult) -> str:
    return f"gate '{result.gate}' expected {result.expected}, found {result.found}"
