"""What a provider is: one way of computing prompt attention, bound to the tensors of a case."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.attention.cases import Case
from benchmarks.attention.inputs import Inputs


class Refusal(Exception):
    """A provider finds out, with the tensors in its hands, that it cannot serve the case."""


@dataclass(frozen=True)
class Call:
    """A provider bound to the tensors of one case.

    Attributes:
        forward: runs attention and returns the output in the provider's own shape.
        leaves: what backward differentiates by, in the order of `torch.autograd.grad`.
        grad_out: gradient of the output, in the provider's own shape.
        common: (output, gradients) -> results in the shapes of `Inputs`, for the judge.
    """

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    grad_out: Tensor
    common: Callable[[Tensor, tuple[Tensor, ...]], dict[str, Tensor]]


@dataclass(frozen=True)
class Provider:
    """One way of computing prompt attention.

    Attributes:
        name: key in the result file.
        call: the exact call, as a user would write it.
        refuses: (case, device) -> why it cannot serve the case, or None.
        build: binds the provider to tensors; what it does here is outside the timing.
        ours: a wrong result of ours ends the run; a wrong peer is recorded and never timed.
        triton: runs our kernels, which the interpreter serves without a meaningful time.
        bank: judged against one prompt per task instead of one for all.
        prompt_only: its backward pass asks for the prompt's gradients alone.
        peers: the peer sets of cases it takes part in.
        around: makes the context in which it is built and run; None where it needs none.
    """

    name: str
    call: str
    refuses: Callable[[Case, torch.device], str | None]
    build: Callable[[Case, Inputs], Call]
    ours: bool = False
    triton: bool = False
    bank: bool = False
    prompt_only: bool = False
    peers: tuple[str, ...] = ("all",)
    around: Callable[[], AbstractContextManager] | None = None


def poison(inputs: Inputs) -> None:
    """Leave NaN in the memory that the next allocations get: what is never written shows."""
    shapes = [inputs.q] * 4 + [inputs.k] * 4 + [inputs.prompt_k, inputs.bank_k] * 2
    blocks = [torch.full_like(x, float("nan"), memory_format=torch.contiguous_format) for x in shapes]
    del blocks


def gradients(call: Call, out: torch.Tensor, *, retain: bool = False) -> tuple[torch.Tensor, ...]:
    """The gradients of a call's leaves; zeros where an empty prompt took no part."""
    grads = torch.autograd.grad(out, call.leaves, call.grad_out, retain_graph=retain, allow_unused=True)
    return tuple(torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, call.leaves, strict=False))


def join_prompt(prompt: Tensor, x: Tensor, repeat: int) -> Tensor:
    """(B, repeat * Hkv, P + N, d): a copy of the prompt in front of every row, heads repeated."""
    rows = torch.cat([prompt.expand(x.shape[0], -1, -1, -1), x], dim=2)
    return rows.repeat_interleave(repeat, dim=1) if repeat > 1 else rows
