"""Measure workloads: every variant in every runtime, each in a process of its own, the variants in turns."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from t3compile.benchmark.bench_report import BenchReport, Difference, Measurement, NotRun, ProcessRecord
from t3compile.benchmark.cases import Case, Workload, notes_on_paper
from t3compile.benchmark.child_process import ChildProcess, WorkerDied, child_process
from t3compile.benchmark.compare_outputs import allowed_difference, largest_difference
from t3compile.benchmark.machine import installed_versions, this_machine
from t3compile.benchmark.messages import LoadRequest, MatrixPeak, Memory, WarmAnswer
from t3compile.benchmark.names import SAME_FUNCTION, SUBJECTS, Device, RuntimeName, Subject, Variant
from t3compile.benchmark.turns import Lane, measure_in_turns
from t3compile.benchmark.write_target import check_runtime, write_inputs, write_target
from t3compile.errors import EngineError, T3CompileError
from t3compile.macs import graph_macs
from t3compile.program import Program
from t3compile.progress import SILENT, Advance, Progress


@dataclass(frozen=True)
class BenchSettings:
    """What to compare with, where, and how often; the rewritten program itself is always measured."""

    against: tuple[Variant, ...] = ("full", "paper")
    runtimes: tuple[RuntimeName, ...] = ("torch",)
    subjects: tuple[Subject, ...] = SUBJECTS
    device: Device = "cpu"
    repeats: int = 5
    warmup: int = 1

    @property
    def variants(self) -> tuple[Variant, ...]:
        return tuple(dict.fromkeys(("windows", *self.against)))


def bench(
    workloads: Iterable[Workload],
    settings: BenchSettings | None = None,
    *,
    command: str = "",
    progress: Progress = SILENT,
) -> BenchReport:
    """Measure every workload and compare its variants; files and processes are gone when this returns or raises.

    A runtime that cannot run here, and a process that dies, are listed in the report with the reason. EngineError where
    nothing at all could be measured.
    """
    run = _Run(settings or BenchSettings(), progress)
    run.check_runtimes()
    with TemporaryDirectory(prefix="t3compile-bench-") as folder:
        for workload in workloads:
            run.measure(workload, Path(folder))
    if not run.measurements:
        reasons = "; ".join(dict.fromkeys(map(str, run.not_run))) or "no workload was given"
        raise EngineError(f"nothing was measured: {reasons}")
    return run.report(command)


@dataclass
class _Run:
    """What one call of bench has found so far."""

    settings: BenchSettings
    progress: Progress
    runtimes: list[RuntimeName] = field(default_factory=list)
    peaks: dict[str, MatrixPeak] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    processes: list[ProcessRecord] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)

    def check_runtimes(self) -> None:
        for runtime in self.settings.runtimes:
            try:
                check_runtime(runtime, self.settings.device)
            except T3CompileError as error:
                self.not_run.append(NotRun(runtime, str(error)))
            else:
                self.runtimes.append(runtime)

    def measure(self, workload: Workload, folder: Path) -> None:
        for subject in self.settings.subjects:
            cases = workload.cases(subject)
            if not cases:
                self.notes[f"{workload.label} has no model around its attention: only attention was measured"] = None
                continue
            if "paper" in self.settings.variants:
                self.notes.update(dict.fromkeys(notes_on_paper(cases)))
            if self.runtimes:
                self._measure_peak(cases[0].dtype, folder)
            references: dict[str, Path] = {}
            for runtime in self.runtimes:
                own = Path(mkdtemp(prefix=f"{subject}-{runtime}-", dir=folder))
                _Group(self, cases, runtime, own, folder, references).measure()
                shutil.rmtree(own, ignore_errors=True)
            for path in references.values():
                path.unlink()

    def _measure_peak(self, dtype: str, folder: Path) -> None:
        if dtype in self.peaks:
            return
        self.progress(f"peak of matrix products in {dtype}")
        try:
            with child_process(folder, "peak") as child:
                self.peaks[dtype] = MatrixPeak(**child.ask("matrix_peak", dtype=dtype, device=self.settings.device))
        except T3CompileError as error:
            self.not_run.append(NotRun("matrix-product peak", f"in {dtype}: {error}"))

    def report(self, command: str) -> BenchReport:
        return BenchReport(
            command,
            datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            this_machine(self.settings.device),
            installed_versions(),
            self.settings.device,
            self.settings.repeats,
            self.settings.warmup,
            tuple(self.peaks.values()),
            tuple(self.measurements),
            tuple(self.processes),
            tuple(self.differences),
            tuple(self.not_run),
            tuple(self.notes),
        )


@dataclass
class _Group:
    """The variants of some cases in one runtime: alive together, asked in turns."""

    run: _Run
    cases: Sequence[Case]
    runtime: RuntimeName
    folder: Path
    shared: Path
    references: dict[str, Path]
    macs: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def _at(self) -> str:
        first = self.cases[0]
        return f"{first.label}, {first.subject}, {self.runtime}"

    def measure(self) -> None:
        settings = self.run.settings
        with ExitStack() as children:
            # All start at once: a process imports while files are written for another.
            started = [children.enter_context(child_process(self.folder, name)) for name in settings.variants]
            pairs = zip(settings.variants, started, strict=True)
            lanes = [lane for variant, child in pairs if (lane := self._load(variant, child)) is not None]
            work = {lane.variant: self._macs_of_targets(lane) for lane in lanes}
            a_round = sum(sum(macs.values()) for macs in work.values())
            with self.run.progress.measure((self._warm_calls + settings.repeats) * a_round, "MACs") as advance:
                records = {lane.variant: self._warm(lane, work[lane.variant], advance) for lane in lanes}
                measure_in_turns(
                    lanes,
                    [case.name for case in self.cases],
                    settings.repeats,
                    lambda number: self.run.progress(f"{self._at}: round {number} of {settings.repeats}"),
                    lambda lane, target: advance(work[lane.variant][target]),
                )
            for lane in lanes:
                self._keep(lane, records[lane.variant])

    @property
    def _warm_calls(self) -> int:
        return max(1, self.run.settings.warmup)

    def _macs_of_targets(self, lane: Lane) -> dict[str, int]:
        return {lane.targets[case.name]: self.macs[case.name, lane.variant] for case in self.cases}

    def _load(self, variant: Variant, child: ChildProcess) -> Lane | None:
        """Every case of a variant loaded in its process, or None where the files cannot be made."""
        written: dict[str, str] = {}
        targets: dict[str, str] = {}
        requests = []
        try:
            for case in self.cases:
                program = case.program(variant)
                self.macs[case.name, variant] = graph_macs(program.graph)
                fingerprint = program.fingerprint()
                if fingerprint not in written:
                    written[fingerprint] = f"{variant}-{len(written)}"
                    self.run.progress(f"{self._at}: writing {variant}, {case.name}")
                    requests.append(self._write(program, written[fingerprint]))
                targets[case.name] = written[fingerprint]
        except T3CompileError as error:
            self._leave_out(variant, error)
            return None
        lane = Lane(variant, child, targets)

        def load() -> None:
            for request in requests:
                child.ask("load", **asdict(request))

        lane.try_to(load)
        return lane

    def _write(self, program: Program, name: str) -> LoadRequest:
        inputs = None
        if self.cases[0].subject == "model":
            inputs = self.folder / "inputs.pt"
            if not inputs.exists():
                write_inputs(program, inputs)
        return write_target(program, name, self.folder, self.runtime, self.run.settings.device, inputs)

    def _warm(self, lane: Lane, work: Mapping[str, int], advance: Advance) -> list[WarmAnswer]:
        """Warm every target up, compare its outputs, and let memory settle."""
        answers: dict[str, WarmAnswer] = {}

        def warm() -> None:
            for case in self.cases:
                name = lane.targets[case.name]
                output = self.folder / f"{name}.out"
                if name not in answers:
                    self.run.progress(f"{self._at}: warming up {lane.variant}, {case.name}")
                    said = lane.child.ask("warm", name=name, calls=self._warm_calls, output=str(output))
                    advance(self._warm_calls * work[name])
                    answers[name] = WarmAnswer(**{**said, "paths": tuple(said["paths"]), "notes": tuple(said["notes"])})
                self._compare(lane.variant, case, output)
            lane.child.ask("settle")

        lane.try_to(warm)
        for name in set(lane.targets.values()):
            (self.folder / f"{name}.out").unlink(missing_ok=True)
        return list(answers.values())

    def _compare(self, variant: str, case: Case, output: Path) -> None:
        reference = self.references.get(case.name)
        if reference is None:
            if variant == "windows":
                kept = self.shared / f"reference-{len(self.references)}.out"
                shutil.copyfile(output, kept)
                self.references[case.name] = kept
            elif variant in SAME_FUNCTION:
                where = f"{case.label}, {case.subject} {case.name}: {variant} in {self.runtime}"
                self.run.notes[f"{where} was not compared: the rewritten program has not run"] = None
            return
        error, magnitude = largest_difference(output, reference)
        allowed = allowed_difference(case.dtype, magnitude) if variant in SAME_FUNCTION else None
        self.run.differences.append(
            Difference(case.label, case.subject, case.name, variant, self.runtime, error, magnitude, allowed)
        )

    def _keep(self, lane: Lane, answers: list[WarmAnswer]) -> None:
        """Put what a lane measured into the report."""
        memory = lane.try_to(lambda: Memory(**lane.child.ask("memory")))
        if lane.error is not None:
            self._leave_out(lane.variant, lane.error)
            return
        assert memory is not None
        for case in self.cases:
            self.run.measurements.append(
                Measurement(
                    case.label,
                    case.subject,
                    case.name,
                    lane.variant,
                    self.runtime,
                    case.dtype,
                    case.layers,
                    self.macs[case.name, lane.variant],
                    tuple(lane.times_s[case.name]),
                )
            )
        paths = tuple(dict.fromkeys(path for answer in answers for path in answer.paths))
        notes = tuple(dict.fromkeys(note for answer in answers for note in answer.notes))
        engine = answers[0].runtime
        first = self.cases[0]
        self.run.processes.append(
            ProcessRecord(first.label, first.subject, lane.variant, self.runtime, engine, memory, paths, notes)
        )

    def _leave_out(self, variant: str, error: T3CompileError) -> None:
        exit_code = error.exit_code if isinstance(error, WorkerDied) else None
        first = self.cases[0]
        self.run.not_run.append(NotRun(self.runtime, str(error), first.label, first.subject, variant, exit_code))
