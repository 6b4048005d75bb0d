"""The one error family: every message names what came, what was expected and what to do."""

from __future__ import annotations


class T3CompileError(Exception):
    """Base of all errors that a user can cause and mend. The command line prints it and exits with 2."""


class ModelFileError(T3CompileError):
    """A model file is foreign, damaged, or of a kind that cannot be loaded."""


class TraceError(T3CompileError):
    """torch.export did not yield a graph for this module and these inputs."""


class InputsError(T3CompileError):
    """Example or run-time inputs do not fit the model: name, shape or dtype."""


class WeightsError(T3CompileError):
    """Weights are missing, unexpected, or of the wrong shape."""


class GridError(T3CompileError):
    """A token grid is malformed or does not fit the sequence."""


class PatternError(T3CompileError):
    """A window pattern, schedule or preset is malformed or does not fit a grid."""


class PlanError(T3CompileError):
    """A plan file is malformed, or was made for another graph."""


class RewriteError(T3CompileError):
    """A planned rewrite cannot be carried out on this graph."""


class ExportError(T3CompileError):
    """The program cannot be written in the requested format."""


class EngineError(T3CompileError):
    """An exported file cannot be loaded or run."""


class MissingKernelError(EngineError):
    """The runtime knows no implementation of an operation for these types; the file itself may be fine."""


class KernelError(T3CompileError):
    """The window attention kernel cannot be compiled or launched for a configuration."""


class OutputError(T3CompileError):
    """The result cannot be written where it was asked for."""


class UnfinishedOutputWarning(UserWarning):
    """What a killed run left beside an output was removed."""


class MissingExtraError(T3CompileError):
    """An optional dependency is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed: pip install 't3compile[{extra}]'"
        )
        self.package = package
        self.extra = extra


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for one-sentence messages."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
