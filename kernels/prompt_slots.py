"""Where sums over rows for the prompt are left part by part, and the launch that adds the parts in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ptv2_fast.kernels import launch, launcher
from ptv2_fast.kernels.problem import UNSPECIALIZED, Problem
from ptv2_fast.kernels.tiles import widen

_BLOCK = 256


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sum_slots_kernel(
    first_slots_ptr,
    second_slots_ptr,
    first_ptr,
    second_ptr,
    slot_size,
    num_slots,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """out = sum over slots in a fixed order, SLOTS of them read at once; grid axis 1 chooses which of two such sums."""
    elements = widen(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    in_first = elements < tl.where(tl.program_id(1) == 0, slot_size, 0)
    in_second = elements < tl.where(tl.program_id(1) == 1, slot_size, 0)
    for start in range(0, num_slots, SLOTS):
        slots = start + tl.arange(0, SLOTS)[:, None]
        offsets = widen(slots) * slot_size + elements[None, :]  # [SLOTS, BLOCK]
        there = slots < num_slots
        tile = tl.load(first_slots_ptr + offsets, mask=there & in_first[None, :], other=0.0)
        tile += tl.load(second_slots_ptr + offsets, mask=there & in_second[None, :], other=0.0)
        total += tl.sum(tile, 0)
    tl.store(first_ptr + elements, total.to(first_ptr.dtype.element_ty), mask=in_first)
    tl.store(second_ptr + elements, total.to(second_ptr.dtype.element_ty), mask=in_second)


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
