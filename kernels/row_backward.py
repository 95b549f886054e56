"""Prompt attention, backward, short rows by `row_gradients.py`: which calls it serves, when it is chosen, its launch.

reads q, k, v, do, o, lse once        writes dq, dk, dv, and a slot of the prompt's sums for each program
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ptv2_fast.kernels import launch, launcher
from ptv2_fast.kernels.arguments import Inputs
from ptv2_fast.kernels.gradients import Needs
from ptv2_fast.kernels.problem import NO_STRIDES, Form, Problem, heads_strides
from ptv2_fast.kernels.prompt_slots import allocate_prompt_slots
from ptv2_fast.kernels.row_gradients import RowTensors, _prompt_attention_backward_rows_kernel

# Queries of a row, all in one tile, and the pass whose table says how such tiles are launched.
_PASSES = {64: "backward_rows_64", 128: "backward_rows_128"}
_LONGEST_ROW = max(_PASSES)
# A prompt of more keys would take the registers that the text needs for its sums.
_LONGEST_SUMMED_PROMPT = 32
# Cards on which fewer instructions are issued and fewer bytes moved than by the kernels of the passes; README.md has
# the counts. 0 is the interpreter.
_WHERE_CHEAPER = (0, 90)


class RowSums(NamedTuple):
    """What a launch leaves besides the text's gradients: slots of the prompt's, or what the prompt's kernel reads."""

    prompt_dk: torch.Tensor | None = None
    prompt_dv: torch.Tensor | None = None
    delta: torch.Tensor | None = None
    lse2: torch.Tensor | None = None


def refusal(form: Form, needs: Needs, config: launch.LaunchConfig | None = None) -> str | None:
    """Why the kernel of rows cannot serve a call, with a configuration or the chosen one; None if it can."""
    if not (needs.query and needs.text) or needs.bias or needs.prompt_bias:
        return "it computes the gradients of q, k and v together, and those of no bias"
    if max(form.num_queries, form.num_keys) > _LONGEST_ROW:
        return f"its rows have at most {_LONGEST_ROW} queries and keys; got {form.num_queries} and {form.num_keys}"
    if form.arch == launch.GFX942 or form.arch != 0 and form.dtype == torch.float32:
        return "it is compiled for NVIDIA's cards in 16 bits"
    if launch.padded_head_dim(form.head_dim) > 128:
        return f"its head sizes go up to 128; got {form.head_dim}"
    most = (config or form.config(pass_for(form.num_queries))).block_n
    if form.num_heads != form.num_kv_heads and form.num_keys > most:
        return f"heads that share keys may have {most} of them; got {form.num_keys}"
    return None


def is_chosen(form: Form, needs: Needs, target: int) -> bool:
    """Whether the kernel of rows computes a call's gradients, rather than one kernel for each.

    It is where it can serve the call, on a card where it is cheaper, if there are two programs for each multiprocessor
    (`launch.target_programs` are four): a row and key/value head makes one program, where the others make several.
    """
    is_filled = 2 * form.num_rows * form.num_kv_heads >= target
    return form.arch in _WHERE_CHEAPER and is_filled and refusal(form, needs) is None


def pass_for(num_queries: int) -> str:
    """The launch table's name of the pass over rows of so many queries."""
    return _PASSES[_block_m(num_queries)]


def row_gradients(
    problem: Problem,
    grad_output: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    text: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    wants_prompt: bool,
    config: launch.LaunchConfig | None = None,
) -> RowSums:
    """Write dq, dk and dv of rows that `refusal` does not refuse; gives what the prompt's gradients are summed from.

    Args:
        grad_output, output: as in `prompt_attention_backward`, with strides that are safe in a tile.
        lse: natural logarithms, (B, H, N) or (H, T).
        text: dq, dk, dv, shaped as q, k and v, any strides.
        wants_prompt: whether the prompt's gradients are asked for.
        config: of the launch; its block_m is not looked at. Chosen when absent.
    Returns:
        Slots if one tile holds the one prompt of all rows, else delta and lse in powers of two, with lse's strides;
        nothing if it is not wanted.
    """
    form = problem.form
    config = config or form.config(pass_for(form.num_queries))
    dq, dk, dv = text
    wants_prompt = wants_prompt and problem.prompt_k.numel() > 0
    makes_slots = wants_prompt and problem.prompt_k.shape[0] == 1 and form.prompt_length <= _LONGEST_SUMMED_PROMPT
    num_splits = launch.split(launch.target_programs(problem.q.device), form.num_kv_heads, max(1, form.num_rows))
    made = RowSums()
    if makes_slots:
        made = RowSums(*allocate_prompt_slots(problem, num_splits))
    elif wants_prompt:
        delta, lse2 = launch.allocate_pair_like(lse, _LONGEST_ROW)
        made = RowSums(delta=delta, lse2=lse2)
    constants = _rows_launch(
        form,
        config,
        num_splits,
        heads_strides(output),
        heads_strides(grad_output),
        problem.row_stride(lse),
        heads_strides(dq),
        heads_strides(dk),
        heads_strides(dv),
    )
    launch.run(
        _prompt_attention_backward_rows_kernel,
        (num_splits * form.num_kv_heads,),
        dq.device,
        (problem.tensors("backward_rows"), (output, grad_output, lse, dq, dk, dv, *made)),
        constants,
    )
    return made


@functools.lru_cache(launcher.MOST_REMEMBERED)
def _rows_launch(
    form: Form,
    config: launch.LaunchConfig,
    num_splits: int,
    o_strides: tuple[int, ...],
    do_strides: tuple[int, ...],
    lse_strides: tuple[int, ...],
    dq_strides: tuple[int, ...],
    dk_strides: tuple[int, ...],
    dv_strides: tuple[int, ...],
) -> launcher.Constants:
    """The arguments that are no tensors."""
    return launcher.Constants(
        {
            **form.constants("backward_rows"),
            "own_strides": RowTensors(
                o_strides,
                do_strides,
                lse_strides,
                dq_strides,
                dk_strides,
                dv_strides,
                form.prompt_strides,
                NO_STRIDES,
                NO_STRIDES,
                NO_STRIDES,
            ),
            "num_rows": form.num_rows,
            "num_splits": num_splits,
            "slot_size": form.num_kv_heads * form.prompt_length * form.head_dim,
            "BLOCK_M": _block_m(form.num_queries),
            "BLOCK_N": config.block_n,
            "BLOCK_P": form.prompt_block(_LONGEST_SUMMED_PROMPT),
            **config.options,
        },
        groups=(Inputs, RowTensors),
    )


def _block_m(num_queries: int) -> int:
    """Queries of a tile: the fewest that hold a row."""
    return next(size for size in _PASSES if num_queries <= size)
