"""Which implementation of window attention is chosen, what is recorded, and what happens where a launch fails."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import t3compile
import t3compile.ops.window_attention as operator
from t3compile.errors import KernelError, MissingExtraError
from t3compile.ops import WINDOW_ATTENTION, WindowAttentionArgs, dispatch, launch_kernel, load_kernel
from t3compile.ops.dispatch import PathChoice, choose_path
from t3compile.ops.regrouped_attention import window_attention
from t3compile.ops.time_tiles import fastest_tile
from t3compile.ops.window_launch import Tile
from tests.interpreted import run_interpreted
from tests.test_window_attention import args_of, random_qkv

triton = pytest.importorskip("triton")

ARGS = args_of((2, 4, 8), (1, 2, 2), prefix=2)
CAPABILITY = (9, 0)


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch would say on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def fake_cuda(_gpu: None) -> Iterator[Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """Makes q, k, v [B, N, S, D] on a GPU that is not there."""

    def make(
        *, batch: int = 1, heads: int = 2, depth: int = 64, value_depth: int | None = None, dtype: Any = torch.float16
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            torch.empty(batch, ARGS.tokens, heads, d, dtype=dtype, device="cuda").transpose(1, 2)
            for d in (depth, depth, depth if value_depth is None else value_depth)
        )
        return q, k, v

    with FakeTensorMode():
        yield make


def test_the_kernel_is_chosen_on_a_gpu_that_it_fits(fake_cuda: Callable[..., Any]) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        choice = choose_path(*fake_cuda(dtype=dtype), ARGS)
        assert choice.path == "kernel"
        assert choice.reason == f"compute capability 9.0, {str(dtype)[6:]}, depth 64"
    heads_first = torch.empty(1, 2, ARGS.tokens, 40, dtype=torch.float16, device="cuda")
    assert choose_path(heads_first, heads_first, heads_first, ARGS).path == "kernel"
    mask = torch.empty(1, 1, 1, ARGS.tokens, dtype=torch.bool, device="cuda")
    assert choose_path(*fake_cuda(), ARGS, mask).path == "kernel"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float64}, "float64 is none of the kernel's dtypes"),
        ({"depth": 8}, "the depth 8 of q and k lies outside 16 to 256"),
        ({"depth": 264}, "the depth 264 of q and k lies outside 16 to 256"),
        ({"value_depth": 8}, "the depth 8 of v lies outside 16 to 256"),
        ({"depth": 36, "heads": 1}, r"q is not aligned to 16 bytes \(strides"),
        ({"batch": 0}, "q is empty"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(
    options: dict[str, Any], reason: str, fake_cuda: Callable[..., Any]
) -> None:
    choice = choose_path(*fake_cuda(**options), ARGS)
    assert choice.path == "regrouped"
    assert re.search(reason, choice.reason), choice.reason


def test_layouts_that_the_kernel_does_not_take_are_named(fake_cuda: Callable[..., Any]) -> None:
    q, k, v = fake_cuda()
    strided = torch.empty_strided(q.shape, (1, 1, 512, 2), dtype=torch.float16, device="cuda")
    assert choose_path(q, strided, v, ARGS).reason == "the depth of k is not contiguous (stride 2)"
    sloping = torch.empty_strided(q.shape, (1, 4 + 64, 512, 1), dtype=torch.float16, device="cuda")
    assert "v is not aligned to 16 bytes" in choose_path(q, k, sloping, ARGS).reason
    full = args_of((2, 4, 8), (1, 1, 1), prefix=2)
    assert choose_path(q, k, v, full) == PathChoice("regrouped", "one window over everything is plain attention")
    cpu = torch.empty(1, 1, 1, ARGS.tokens, dtype=torch.bool)
    assert choose_path(q, k, v, ARGS, cpu).reason == "the tensors are on cpu, cuda:0"


def test_where_a_tensor_starts_counts() -> None:
    x = torch.zeros(1, 2, 8, 72, dtype=torch.float16)
    for start, is_aligned in ((0, True), (8, True), (1, False), (4, False)):
        part = x[..., start : start + 64]
        assert (dispatch._why_not_layout(part, part, part) is None) == is_aligned


def test_machines_that_the_kernel_does_not_run_on_are_named(
    fake_cuda: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = fake_cuda()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert choose_path(*qkv, ARGS).reason == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert choose_path(*qkv, ARGS).path == "kernel"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_path(*qkv, ARGS).reason.startswith("TRITON_INTERPRET is set")
    monkeypatch.setattr(dispatch, "_is_triton_installed", lambda: False)
    assert choose_path(*qkv, ARGS).reason == "triton is not installed: pip install 't3compile[kernels]'"


@pytest.mark.usefixtures("_gpu")
def test_more_programs_than_a_launch_has() -> None:
    args = args_of((1, 1, 2**20), (1, 1, 2**19))
    with FakeTensorMode():
        q = torch.empty(1, 1, 2**20, 16, dtype=torch.float16, device="cuda").expand(4096, -1, -1, -1)
        reason = choose_path(q, q, q, args).reason
    assert reason == f"{4096 * 2**19} programs are more than a CUDA launch has (2147483647)"


def test_calls_on_the_cpu_are_recorded() -> None:
    q, k, v = (x.float() for x in random_qkv(ARGS.tokens))
    other = replace(ARGS, prefix=0, query_prefix=2)
    with t3compile.record_paths() as outer:
        with t3compile.record_paths() as record:
            for _ in range(2):
                WINDOW_ATTENTION(q, k, v, *ARGS.as_op_args())
        WINDOW_ATTENTION(q, k[:, :, 2:], v[:, :, 2:], *other.as_op_args())
    WINDOW_ATTENTION(q, k, v, *ARGS.as_op_args())
    ((taken, count),) = record.counts.items()
    assert count == 2
    assert taken.choice == PathChoice("regrouped", "the tensors are on cpu")
    assert (taken.queries, taken.keys, taken.dtype) == ((1, 2, 66, 8), (1, 2, 66, 8), "float32")
    assert (taken.grid, taken.pattern) == (ARGS.grid, ARGS.pattern)
    assert str(record) == (
        "2 x regrouped (the tensors are on cpu): q [1, 2, 66, 8], k [1, 2, 66, 8] float32, grid 2x4x8, (1,2,2)"
    )
    assert (record.calls("regrouped"), record.calls("kernel")) == (2, 0)
    assert list(outer.counts.values()) == [2, 1]
    assert str(dispatch.PathRecord()) == "no call of window attention"


def _interpreted(q: Tensor, k: Tensor, v: Tensor, args: WindowAttentionArgs, mask: Tensor | None = None) -> Tensor:
    return run_interpreted(q, k, v, args, mask)


@pytest.fixture
def _kernel_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op as on a GPU, its kernel interpreted."""
    monkeypatch.setattr(operator, "choose_path", lambda *_: PathChoice("kernel", "interpreted"))
    monkeypatch.setattr(operator, "launch_kernel", _interpreted)


@pytest.mark.usefixtures("_kernel_on_cpu")
def test_the_op_runs_the_kernel_and_its_backward_pass_regroups() -> None:
    args = args_of((1, 3, 4), (1, 3, 2), prefix=1)
    q, k, v = (x.float().requires_grad_() for x in random_qkv(args.tokens, heads=1, depth=16, value_depth=16))
    with t3compile.record_paths() as record:
        out = WINDOW_ATTENTION(q, k, v, *args.as_op_args())
    assert record.calls("kernel") == 1
    expected = window_attention(q, k, v, args)
    assert torch.equal(out, run_interpreted(q.detach(), k.detach(), v.detach(), args))
    assert out.stride() == expected.stride()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (out, expected))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.usefixtures("_kernel_on_cpu")
def test_the_op_stays_one_call_in_a_compiled_graph() -> None:
    args = args_of((1, 3, 4), (1, 3, 2))
    q, k, v = (x.float() for x in random_qkv(args.tokens, heads=1, depth=16, value_depth=16))
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda q: WINDOW_ATTENTION(q * 2, k, v, *args.as_op_args()) + 1, backend=backend, fullgraph=True
    )
    with t3compile.record_paths() as record:
        out = compiled(q)
    assert len(graphs) == 1
    assert record.calls("kernel") == 1
    assert torch.equal(out, run_interpreted(q * 2, k, v, args) + 1)


def test_a_failed_launch_is_said_and_served_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise KernelError("the kernel cannot be launched for this test")

    monkeypatch.setattr(operator, "choose_path", lambda *_: PathChoice("kernel", "a test"))
    monkeypatch.setattr(operator, "launch_kernel", refuse)
    q, k, v = random_qkv(ARGS.tokens)
    with (
        t3compile.record_paths() as record,
        pytest.warns(UserWarning, match="cannot be launched for this test; tokens are regrouped instead"),
    ):
        out = WINDOW_ATTENTION(q, k, v, *ARGS.as_op_args())
    assert torch.equal(out, window_attention(q, k, v, ARGS))
    assert [x.choice for x in record.counts] == [PathChoice("regrouped", "the kernel cannot be launched for this test")]


@pytest.fixture
def launching(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Tile], None]], list[Tile]]:
    """Launches one description through a stand-in for the kernel; returns the tiles that it was asked to run."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(launch_kernel, "_tiles", {})
    monkeypatch.setattr(launch_kernel, "_refusals", {})
    monkeypatch.delenv(launch_kernel.AUTOTUNE_VARIABLE, raising=False)
    q = torch.zeros(1, 1, ARGS.tokens, 128, dtype=torch.float16)
    large = args_of((21, 136, 240), (7, 8, 6))
    launch = replace(launch_kernel.describe_launches(q, q, q, ARGS)[0], args=large)

    def launching(behave: Callable[[Tile], None]) -> list[Tile]:
        asked: list[Tile] = []

        def run(tile: Tile, into: Tensor | None = None) -> None:
            asked.append(tile)
            behave(tile)

        try:
            launch_kernel._launch_first_fitting(launch, torch.device("cuda"), run, q)
        finally:
            launching.asked = asked  # type: ignore[attr-defined]
        return asked

    return launching


def _out_of_resources(tile: Tile) -> None:
    raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")


def test_the_first_tile_that_fits_is_taken_and_remembered(launching: Any) -> None:
    def too_large(tile: Tile) -> None:
        if tile.block_m * tile.block_n > 2048:
            _out_of_resources(tile)

    asked = launching(too_large)
    assert len(asked) > 1
    assert all(tile.block_m * tile.block_n > 2048 for tile in asked[:-1])
    assert launching(too_large) == asked[-1:]


def test_a_launch_that_no_tile_fits_is_refused_for_good(launching: Any) -> None:
    message = (
        r"cannot be launched for grid 21x136x240, splits \(7,8,6\) \(OutOfResources: out of resource: shared memory"
    )
    for asked in (True, False):
        with pytest.raises(KernelError, match=message):
            launching(_out_of_resources)
        assert bool(launching.asked) == asked


def test_a_missing_compiler_is_refused_and_a_fault_of_the_gpu_is_not_hidden(launching: Any) -> None:
    def fault(tile: Tile) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def no_compiler(tile: Tile) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    with pytest.raises(torch.AcceleratorError):
        launching(fault)
    with pytest.raises(KernelError, match="RuntimeError: Failed to find C compiler"):
        launching(no_compiler)
    assert len(launching.asked) == 1


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
    ids=str,
)
@pytest.mark.parametrize("autotune", ["0", "1"])
def test_what_the_driver_answers_to_triton_is_no_refusal(
    launching: Any, fault: Exception, autotune: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tile: Tile) -> None:
        raise fault

    monkeypatch.setenv(launch_kernel.AUTOTUNE_VARIABLE, autotune)
    monkeypatch.setattr(launch_kernel, "fastest_tile", _first_that_runs)
    with pytest.raises(type(fault)) as raised:
        launching(fail)
    assert raised.value is fault
    assert launch_kernel._refusals == {}


def _first_that_runs(tiles: list[Tile], run: Callable[[Tile], None]) -> Tile | None:
    return fastest_tile(tiles, run, timer=lambda once: once() or 1.0)  # type: ignore[func-returns-value]


def test_a_refusal_while_timing_is_one_of_the_kernel(launching: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(tile: Tile) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setenv(launch_kernel.AUTOTUNE_VARIABLE, "1")
    monkeypatch.setattr(launch_kernel, "fastest_tile", _first_that_runs)
    for asked in (1, 0):
        with pytest.raises(KernelError, match="RuntimeError: Failed to find C compiler"):
            launching(no_compiler)
        assert len(launching.asked) == asked


def test_the_fastest_tile_is_taken_on_request(launching: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch_kernel.AUTOTUNE_VARIABLE, "1")
    monkeypatch.setattr(launch_kernel, "fastest_tile", lambda tiles, run: list(tiles)[-1])
    default = launching(lambda tile: None)
    assert default == launching(lambda tile: None)
    monkeypatch.delenv(launch_kernel.AUTOTUNE_VARIABLE)
    launch_kernel._tiles.clear()
    assert launching(lambda tile: None) != default


def test_the_fastest_tile_is_that_of_least_time() -> None:
    times = {Tile(128, 64, 8, 3): 3.0, Tile(64, 64, 4, 3): 1.5, Tile(64, 32, 4, 2): 2.0}
    ran: list[Tile] = []

    def run(tile: Tile) -> None:
        if tile.block_m == 128:
            _out_of_resources(tile)
        ran.append(tile)

    def timer(once: Callable[[], None]) -> float:
        once()
        return times[ran[-1]]

    assert fastest_tile(times, run, timer=timer) == Tile(64, 64, 4, 3)
    assert fastest_tile([Tile(128, 64, 8, 3)], run, timer=timer) is None


def test_without_triton_the_kernel_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'triton'.*pip install 't3compile\[kernels\]'"):
        load_kernel.compilable_kernel()
