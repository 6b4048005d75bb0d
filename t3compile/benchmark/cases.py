"""What is timed: the attention of every different layer by itself, and whole models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from t3compile.benchmark.names import Subject, Variant
from t3compile.benchmark.variants import AttentionLayer, attention_layers, variant_program
from t3compile.program import Program


@dataclass(frozen=True)
class Workload:
    """What is measured at one size: a rewritten model beside the original, or layers of attention without a model.

    ``layers`` says how many layers of the model each stands for. ``original`` None: the rewritten program with full
    attention in the place of windows.
    """

    label: str
    rewritten: Program | None = None
    original: Program | None = None
    layers: dict[AttentionLayer, int] = field(default_factory=dict)

    @classmethod
    def of_model(cls, label: str, rewritten: Program, original: Program | None = None) -> Workload:
        """PlanError where the program has no window attention."""
        return cls(label, rewritten, original, attention_layers(rewritten))

    def cases(self, subject: Subject) -> list[Case]:
        """The cases of a subject; none of "model" without one."""
        if subject == "attention":
            return [
                Case(self.label, subject, _layer_name(layer), layer, number, layer.program())
                for layer, number in self.layers.items()
            ]
        if self.rewritten is None:
            return []
        layer = next(iter(self.layers))
        return [Case(self.label, subject, "model", layer, 1, self.rewritten, self.original)]


@dataclass(frozen=True)
class Case:
    """One thing to time in all its variants; ``layer`` is the attention in it, of a model the first."""

    label: str
    subject: Subject
    name: str
    layer: AttentionLayer
    layers: int
    rewritten: Program
    original: Program | None = None

    def program(self, variant: Variant) -> Program:
        return variant_program(self.rewritten, variant, self.original)

    @property
    def dtype(self) -> str:
        return self.layer.dtype


def _layer_name(layer: AttentionLayer) -> str:
    args = layer.args
    extra = f" +{args.extra_tokens}" if args.extra_tokens else ""
    masked = " masked" if len(layer.forms) > 3 else ""
    return f"{args.pattern} on {args.grid}{extra}{masked}"


def notes_on_paper(cases: Sequence[Case]) -> tuple[str, ...]:
    """Where the paper's formulation does not reach, and its baseline is each branch of the op by itself."""
    beyond = [
        case.name
        for case in cases
        if case.layer.args.extra_tokens
        or len(case.layer.forms) > 3
        or not case.layer.args.pattern.splits.divide(case.layer.args.grid)
    ]
    if not beyond:
        return ()
    return (
        f"the paper has no windows of several sizes, no tokens outside the grid and no masks: 'paper' runs each branch "
        f"of the op by itself at {', '.join(dict.fromkeys(beyond))}",
    )
