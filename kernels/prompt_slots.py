"""Where sums over rows for the prompt are left part by part, and the launch that adds the parts in a fixed order."""

from __future__ import annotations

import torch

from ptv2_fast.kernels import launch, launcher
from ptv2_fast.kernels.key_gradients import _sum_slots_kernel
from ptv2_fast.kernels.problem import Problem

_BLOCK = 256


def allocate_prompt_gradients(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh d prompt_k and d prompt_v (R, Hkv, P, d) in their dtype, laid out as `launch.prompt_strides` says."""
    prompt, strides = problem.prompt_k, problem.form.prompt_strides
    first, second = (launch.allocate_strided(prompt.shape, strides, prompt.dtype, prompt.device) for _ in range(2))
    return first, second


def allocate_prompt_slots(problem: Problem, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`num_slots` float32 parts of each, (num_slots, R, Hkv, P, d); slots lie in memory as their sum does."""
    prompt = problem.prompt_k
    shape, strides = (num_slots, *prompt.shape), (prompt.numel(), *problem.form.prompt_strides)
    first, second = (launch.allocate_strided(shape, strides, torch.float32, prompt.device) for _ in range(2))
    return first, second


def sum_slots(
    first_slots: torch.Tensor, second_slots: torch.Tensor | None, first: torch.Tensor, second: torch.Tensor | None
) -> None:
    """first = first_slots.sum(0) and, if given, second = second_slots.sum(0), in one launch and a fixed order."""
    pair = second is not None
    launch.run(
        _sum_slots_kernel,
        (-(-first.numel() // _BLOCK), 1 + pair),
        first.device,
        (first_slots, second_slots if pair else first_slots, first, second if pair else first),
        launcher.constants(slot_size=first.numel(), num_slots=first_slots.shape[0], BLOCK=_BLOCK, SLOTS=16),
    )
