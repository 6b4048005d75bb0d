"""The passes that bring every spelling of attention to the one call that detection knows, in their order."""

from __future__ import annotations

from dataclasses import replace

from t3compile.passes.canonicalize_attention_backends import CanonicalizeAttentionBackends
from t3compile.passes.canonicalize_attention_shape import CanonicalizeAttentionShape
from t3compile.passes.canonicalize_flex_attention import CanonicalizeFlexAttention
from t3compile.passes.canonicalize_softmax_attention import CanonicalizeSoftmaxAttention
from t3compile.passes.graph_pass import GraphPass, apply_passes
from t3compile.program import Program

CANONICALIZATION: tuple[GraphPass, ...] = (
    CanonicalizeSoftmaxAttention(),  # first: what it writes has the one shape already
    CanonicalizeAttentionBackends(),  # before the next, which knows only the one operation
    CanonicalizeFlexAttention(),  # likewise
    CanonicalizeAttentionShape(),  # last: kernels take three axes and grouped heads too
)


def canonicalize(program: Program) -> Program:
    """The program with every recognised spelling of attention as one call over [B, N, S, D]; so are its retraces.

    A rewritten program stays as it is: its attention is no longer what the model spelled.
    """
    if program.plan is not None:
        return program
    program = apply_passes(program, CANONICALIZATION)
    retrace = program.retrace
    if retrace is None:
        return program
    return replace(program, retrace=lambda args, kwargs: canonicalize(retrace(args, kwargs)))
