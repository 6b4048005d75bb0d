"""Which spelling of attention onnxruntime runs fastest on a CPU, by size: a measured rule, as data.

opset-23 Attention and MatMul-Softmax run alike and write all scores to memory; com.microsoft.MultiHeadAttention never
does, but has overhead per window. So the rule is from how many tokens on it is as fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

AttentionForm = Literal["attention", "matmul", "onnxruntime"]

# MultiHeadAttention may take this much of the fastest form's time: holding no scores is worth that.
LEEWAY = 1.05
# Not measured but chosen: scores beyond this are not held, at the price of some 15 % of the call's time.
MOST_SCORE_BYTES = 2**30


@dataclass(frozen=True)
class FormBound:
    """Up to ``head_dim`` elements a head, MultiHeadAttention from ``tokens`` queries and keys on."""

    head_dim: int
    tokens: int


# Source: `python -m tests.bench_onnxruntime attention --rounds 15` on 2026-11-21, float32, onnxruntime 1.31.1,
# 2 cores of an AMD EPYC with AVX-512; the figures are in BENCHMARKS.md.
RULE: tuple[FormBound, ...] = (FormBound(64, 256), FormBound(128, 768))


def choose_form(
    batch: int, queries: int, keys: int, head_dim: int, rule: tuple[FormBound, ...] = RULE
) -> AttentionForm:
    """The form of one float32 call with ``batch`` windows, heads included.

    Heads larger than measured are taken like the largest.
    """
    bound = next((bound for bound in rule if head_dim <= bound.head_dim), rule[-1])
    is_long = min(queries, keys) >= bound.tokens
    return "onnxruntime" if is_long or 4 * batch * queries * keys > MOST_SCORE_BYTES else "attention"


def derive_rule(seconds: Mapping[tuple[int, int], Mapping[AttentionForm, float]]) -> tuple[FormBound, ...]:
    """The rule that times per (head dim, tokens) ask for; where even the longest window is slower, one beyond it."""
    rule = []
    for head_dim in sorted({dim for dim, _ in seconds}):
        sizes = sorted((tokens for dim, tokens in seconds if dim == head_dim), reverse=True)
        first = sizes[0] + 1
        for tokens in sizes:
            times = seconds[head_dim, tokens]
            if times["onnxruntime"] > LEEWAY * min(times.values()):
                break
            first = tokens
        rule.append(FormBound(head_dim, first))
    return tuple(rule)
