"""The least work a case can be done with, and the time a card needs for that."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.attention.cases import Case
from benchmarks.ceilings import Ceiling

_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class Work:
    """Useful floating-point operations and bytes: real tokens only, each tensor moved once."""

    flops: float
    bytes: float

    def speed_of_light(self, ceiling: Ceiling) -> float:
        """Milliseconds below which no implementation comes: the larger of the two ceilings' times."""
        arithmetic = self.flops / (ceiling.tflops * 1e12)
        traffic = self.bytes / (ceiling.terabytes_per_second * 1e12)
        return 1e3 * max(arithmetic, traffic)

    def tflops(self, milliseconds: float) -> float:
        """Achieved TFLOP/s over the useful operations."""
        return self.flops / milliseconds / 1e9


def visible_pairs(case: Case) -> int:
    """Query-key pairs of one head that count: real queries times the prompt and the text they see."""
    text = sum(n * (n + 1) // 2 if case.causal else n * n for n in case.lengths)
    return text + case.tokens * case.P


def work(case: Case, *, prompt_only: bool = False) -> Work:
    """Operations and bytes of a case.

    forward  = 2 matrix products over the visible pairs (scores, output)
    backward = 5 (scores again, dP, dV, dK, dQ); with `prompt_only` 4 over the prompt's pairs alone.
    A product of one pair costs 2 d operations.

    Args:
        case: the cell; its direction decides what counts.
        prompt_only: the backward pass asks for the gradients of the prompt alone.
    """
    per_product = 2.0 * case.d * case.H
    pairs = visible_pairs(case)
    size = _BYTES[case.dtype]
    queries = case.tokens * case.H * case.d * size
    text = 2 * case.tokens * case.Hkv * case.d * size
    prompt = 2 * case.Hkv * case.P * case.d * size
    lse = case.tokens * case.H * 4
    forward = Work(2 * per_product * pairs, 2 * queries + text + prompt + lse)
    if prompt_only:
        # Reads q, o, do, lse and the prompt, writes the prompt's gradients; the text is not touched.
        products = 4 * per_product * case.tokens * case.P
        backward = Work(products, 3 * queries + 2 * prompt + lse)
    else:
        backward = Work(5 * per_product * pairs, 4 * queries + 2 * text + 2 * prompt + lse)
    if case.direction == "forward":
        return forward
    if case.direction == "backward":
        return backward
    return Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
