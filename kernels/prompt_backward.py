"""Prompt attention, backward: only the gradients that are asked for, no atomics, nothing of size N x (P + M).

    delta = rowsum(do * o)                        dP = keep * (do V^T) / (1 - p)
    dS    = P * (dP - delta)                      dQ = scale * dS K
    dK    = scale * dS^T Q                        dV = (keep * P / (1 - p))^T do
    dbias = dS

P is recomputed from q, k and lse. Text gradients come from one program per tile of queries (dQ) or of keys (dK, dV).
The prompt's gradients are sums over every row that uses it: each program sums a fixed share of the queries into a slot
of float32 partials, and one more launch adds the slots in a fixed order. Derivation and grids: README.md.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton

from ptv2_fast.kernels import launch, launcher
from ptv2_fast.kernels.arguments import Inputs
from ptv2_fast.kernels.bank_rows import rows_by_entry
from ptv2_fast.kernels.gradient_layout import Order, ThreeGradients, allocate_gradients
from ptv2_fast.kernels.gradients import Gradients, Needs
from ptv2_fast.kernels.key_gradients import (
    PromptTensors,
    TextTensors,
    _prompt_attention_backward_prompt_kernel,
    _prompt_attention_backward_text_kernel,
)
from ptv2_fast.kernels.problem import Form, Problem, heads_strides, strides_of
from ptv2_fast.kernels.prompt_slots import allocate_prompt_gradients, allocate_prompt_slots, sum_slots
from ptv2_fast.kernels.query_gradients import (
    QueryTensors,
    _prompt_attention_backward_query_kernel,
    _prompt_attention_delta_kernel,
)
from ptv2_fast.kernels.row_backward import is_chosen, refusal, row_gradients

# Rows of queries in the largest tile that a table of launches names.
_MOST_QUERIES = 128


class _Saved(NamedTuple):
    """What every pass reads besides the problem: grad_output, lse in powers of two, delta; their strides."""

    do: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor
    do_strides: tuple[int, ...]
    lse_strides: tuple[int, ...]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What each pass's own tensors begin with."""
        return self.do, self.lse, self.delta


def prompt_attention_backward(
    grad_output: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompt_k: torch.Tensor,
    prompt_v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    *,
    needs: Needs,
    order: Order | None = None,
    config: launch.LaunchConfig | None = None,
    by_rows: bool | None = None,
    **arguments: Any,
) -> Gradients:
    """The gradients of `prompt_attention_forward` that `needs` asks for, from what the forward saved.

    Args:
        grad_output: gradient of o, o's shape, any strides.
        q, k, v, prompt_k, prompt_v: the forward's inputs.
        output, lse: the forward's results.
        needs: which gradients to compute; what is not asked for costs nothing.
        order: of dq, dk and dv in the buffer that they share; see `gradient_layout.allocate_gradients`.
        config: tile sizes for every pass; chosen per pass when absent.
        by_rows: whether one kernel owns whole rows (`row_gradients.py`) instead of one for each gradient; chosen by
            `row_backward.is_chosen` when None.
        arguments: the forward's keyword arguments, the same seed among them.
    Returns:
        `Gradients`. The prompt's gradients are summed over every row (and query head) that used the entry, in a fixed
        order: two runs give the same bits.
    Raises:
        ValueError: as the forward; by_rows is True for a call that the kernel of rows cannot serve.
    """
    problem = Problem.of(q, k, v, prompt_k, prompt_v, **arguments)
    if not any(needs):
        return Gradients()
    if by_rows is None:
        by_rows = is_chosen(problem.form, needs, launch.target_programs(q.device))
    reason = refusal(problem.form, needs, config) if by_rows else None
    if reason is not None:
        raise ValueError(f"by_rows must be False or None for a call that the kernel of rows cannot serve: {reason}")
    dq, dk, dv = allocate_gradients(problem.q, problem.k, problem.v, needs.query, needs.text or needs.bias, order)
    token_axis = problem.form.token_axis
    grad_output, output = launch.tile_safe(grad_output, token_axis), launch.tile_safe(output, token_axis)
    if by_rows and dq is not None and dk is not None and dv is not None:
        return _gradients_by_rows(problem, grad_output, output, lse, (dq, dk, dv), needs.prompt, config)
    saved = _query_passes(problem, grad_output, output, lse, dq, config)
    dbias = None if dk is None or dv is None else _text_gradients(problem, saved, dk, dv, needs.bias, config)
    prompt: ThreeGradients = (None, None, None)
    if needs.prompt or needs.prompt_bias:
        prompt = _prompt_gradients(problem, saved, needs.prompt_bias, config)
    return Gradients(dq, dk, dv, *prompt, dbias)


def _gradients_by_rows(
    problem: Problem,
    grad_output: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    text: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    wants_prompt: bool,
    config: launch.LaunchConfig | None,
) -> Gradients:
    """The text's gradients by one launch, and the prompt's from what it leaves."""
    sums = row_gradients(problem, grad_output, output, lse, text, wants_prompt, config)
    if sums.prompt_dk is not None:
        prompt = allocate_prompt_gradients(problem)
        sum_slots(sums.prompt_dk, sums.prompt_dv, *prompt)
        return Gradients(*text, *prompt)
    if not wants_prompt:
        return Gradients(*text)
    if sums.lse2 is None or sums.delta is None:
        return Gradients(*text, *allocate_prompt_gradients(problem))
    saved = _Saved(grad_output, sums.lse2, sums.delta, heads_strides(grad_output), problem.row_stride(lse))
    return Gradients(*text, *_prompt_gradients(problem, saved, False, None))


def _query_passes(
    problem: Problem,
    grad_output: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor | None,
    config: launch.LaunchConfig | None,
) -> _Saved:
    """Write dq, which has q's shape, where it is asked for; gives what is made on the way for the kernels of keys.

    Those read lse in powers of two and delta by one offset: both lie as lse does.
    """
    config = config or problem.config("backward_query")
    delta, lse2 = launch.allocate_pair_like(lse, max(config.block_m, _MOST_QUERIES))
    saved = _Saved(grad_output, lse2, delta, heads_strides(grad_output), problem.row_stride(lse))
    strides = (heads_strides(output), saved.do_strides, saved.lse_strides)
    if dq is None:
        grid, constants = _delta_launch(problem.form, config.block_m, *strides)
        launch.run(
            _prompt_attention_delta_kernel,
            grid,
            lse.device,
            (output, grad_output, lse, problem.cu_seqlens, delta, lse2),
            constants,
        )
        return saved
    grid, constants = _query_launch(problem.form, config, *strides, heads_strides(dq))
    launch.run(
        _prompt_attention_backward_query_kernel,
        grid,
        lse.device,
        (problem.tensors("backward_query"), (output, grad_output, lse, delta, lse2, dq)),
        constants,
    )
    return saved


@functools.lru_cache(launcher.MOST_REMEMBERED)
def _delta_launch(
    form: Form, block_m: int, o_strides: tuple[int, ...], do_strides: tuple[int, ...], lse_strides: tuple[int, ...]
) -> tuple[tuple[int, ...], launcher.Constants]:
    """The grid and the arguments that are no tensors."""
    num_tiles = triton.cdiv(form.num_queries, block_m)
    return (num_tiles * form.num_heads * form.num_rows,), launcher.Constants(
        {
            "o_strides": o_strides,
            "do_strides": do_strides,
            "lse_strides": lse_strides,
            "num_queries": form.num_queries,
            "num_heads": form.num_heads,
            "num_tiles": num_tiles,
            "HEAD_DIM": form.head_dim,
            "BLOCK_D": launch.padded_head_dim(form.head_dim),
            "BLOCK_M": block_m,
        }
    )


@functools.lru_cache(launcher.MOST_REMEMBERED)
def _query_launch(
    form: Form,
    config: launch.LaunchConfig,
    o_strides: tuple[int, ...],
    do_strides: tuple[int, ...],
    lse_strides: tuple[int, ...],
    dq_strides: tuple[int, ...],
) -> tuple[tuple[int, ...], launcher.Constants]:
    """The grid and the arguments that are no tensors."""
    num_tiles = triton.cdiv(form.num_queries, config.block_m)
    return (num_tiles * form.num_heads * form.num_rows,), launcher.Constants(
        {
            **form.constants("backward_query"),
            "own_strides": QueryTensors(o_strides, do_strides, lse_strides, lse_strides, lse_strides, dq_strides),
            "num_tiles": num_tiles,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_P": form.prompt_block(config.block_n),
            **config.options,
        },
        groups=(Inputs, QueryTensors),
    )


def _text_gradients(
    problem: Problem,
    saved: _Saved,
    dk: torch.Tensor,
    dv: torch.Tensor,
    wants_bias: bool,
    config: launch.LaunchConfig | None,
) -> torch.Tensor | None:
    """Write dk and dv, which have the shapes of k and v; give dbias, contiguous, or None."""
    bias = problem.bias if wants_bias else None
    dbias = None
    if bias is not None:
        # Pairs that no query sees are not visited.
        shape = (problem.num_rows, problem.num_heads, problem.num_queries, problem.num_keys)
        whole = bias.shape == shape
        dbias = torch.zeros(shape, dtype=bias.dtype if whole else torch.float32, device=problem.q.device)
    config = config or problem.config("backward_text")
    grid, constants = _text_launch(
        problem.form,
        config,
        saved.do_strides,
        saved.lse_strides,
        heads_strides(dk),
        heads_strides(dv),
        strides_of(dbias),
    )
    launch.run(
        _prompt_attention_backward_text_kernel,
        grid,
        dk.device,
        (problem.tensors("backward_text"), (*saved.tensors, dk, dv, dbias)),
        constants,
    )
    return None if bias is None or dbias is None else dbias.sum_to_size(bias.shape).to(bias.dtype)


@functools.lru_cache(launcher.MOST_REMEMBERED)
def _text_launch(
    form: Form,
    config: launch.LaunchConfig,
    do_strides: tuple[int, ...],
    lse_strides: tuple[int, ...],
    dk_strides: tuple[int, ...],
    dv_strides: tuple[int, ...],
    dbias_strides: tuple[int, ...],
) -> tuple[tuple[int, ...], launcher.Constants]:
    """The grid and the arguments that are no tensors."""
    num_tiles = triton.cdiv(form.num_keys, config.block_n)
    return (num_tiles * form.num_kv_heads * form.num_rows,), launcher.Constants(
        {
            **form.constants("backward_text"),
            "own_strides": TextTensors(do_strides, lse_strides, lse_strides, dk_strides, dv_strides, dbias_strides),
            "num_tiles": num_tiles,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            **config.options,
        },
        groups=(Inputs, TextTensors),
    )


def _prompt_gradients(
    problem: Problem, saved: _Saved, wants_bias: bool, config: launch.LaunchConfig | None
) -> ThreeGradients:
    """(d prompt_k, d prompt_v, d prompt_bias or None); the first two laid out as `launch.prompt_strides` says."""
    device = problem.q.device
    shape = tuple(problem.prompt_k.shape)  # (R, Hkv, P, d)
    bias_shape = (shape[0], problem.num_heads, shape[2])
    dk, dv = allocate_prompt_gradients(problem)
    bias = problem.prompt_bias if wants_bias else None
    dbias = None if bias is None else launch.allocate(bias_shape, bias.dtype, device)
    if dk.numel() == 0:
        return dk, dv, dbias
    row_order, row_bounds = _rows_by_entry(problem)
    if problem.packed and row_order is None and problem.seed is None:
        # One prompt for all and no dropout counter: where a row ends does not matter, so no tile is cut there.
        problem = problem.joined()

    config = config or problem.config("backward_prompt")
    plan = _prompt_launch(
        problem.form,
        config,
        launch.target_programs(device),
        saved.do_strides,
        saved.lse_strides,
        None if dbias is None else dbias.stride(),
        shape[0],
    )
    dk_slots, dv_slots = allocate_prompt_slots(problem, plan.num_slots)
    dbias_slots = None if dbias is None else launch.allocate((plan.num_splits, *bias_shape), torch.float32, device)
    launch.run(
        _prompt_attention_backward_prompt_kernel,
        plan.grid,
        device,
        (
            problem.tensors("backward_prompt"),
            (*saved.tensors, row_order, row_bounds, dk_slots, dv_slots, dbias_slots),
        ),
        plan.constants,
    )
    sum_slots(dk_slots, dv_slots, dk, dv)
    if dbias_slots is not None and dbias is not None:
        sum_slots(dbias_slots, None, dbias, None)
    return dk, dv, dbias


class _PromptLaunch(NamedTuple):
    """How the prompt's gradients are computed: grid, arguments that are no tensors, parts that are summed later."""

    grid: tuple[int, ...]
    constants: launcher.Constants
    num_splits: int
    num_slots: int


@functools.lru_cache(launcher.MOST_REMEMBERED)
def _prompt_launch(
    form: Form,
    config: launch.LaunchConfig,
    target: int,
    do_strides: tuple[int, ...],
    lse_strides: tuple[int, ...],
    dbias_strides: tuple[int, ...] | None,
    num_entries: int,
) -> _PromptLaunch:
    """For `target` programs; without dbias_strides the prompt's bias has no gradient."""
    block_p = form.prompt_block(config.block_n)
    if block_p < config.block_n:
        config = config.shortened
    group = form.num_heads // form.num_kv_heads
    # A bias gradient belongs to one query head; the others are sums over the heads of a group.
    heads_in_loop = group if dbias_strides is None else 1
    num_tiles = triton.cdiv(form.prompt_length, block_p)
    num_programs = num_tiles * (form.num_heads // heads_in_loop) * num_entries
    most = max(1, form.num_rows * triton.cdiv(form.num_queries, config.block_m))
    num_splits = launch.split(target, num_programs, most)
    positions = num_entries * form.prompt_length
    return _PromptLaunch(
        (num_programs * num_splits,),
        launcher.Constants(
            {
                **form.constants("backward_prompt"),
                "num_tiles": num_tiles,
                "own_strides": PromptTensors(
                    do_strides,
                    lse_strides,
                    lse_strides,
                    (1,),
                    (1,),
                    form.prompt_strides,
                    form.prompt_strides,
                    dbias_strides or (0, 0, 0),
                ),
                "num_rows": form.num_rows,
                "num_entries": num_entries,
                "num_splits": num_splits,
                "slot_size": positions * form.num_kv_heads * form.head_dim,
                "bias_slot_size": 0 if dbias_strides is None else positions * form.num_heads,
                "HEADS_IN_LOOP": heads_in_loop,
                "STEPS": block_p >= 64 or config.maxnreg is not None,
                "BLOCK_M": config.block_m,
                "BLOCK_P": block_p,
                **config.options,
            },
            groups=(Inputs, PromptTensors),
        ),
        num_splits,
        num_splits * (group // heads_in_loop),
    )


def _rows_by_entry(problem: Problem) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Rows sorted by the bank entry they use, and where each entry's rows begin and end; (None, None) for one entry."""
    num_entries = problem.prompt_k.shape[0]
    if problem.prompt_index is None or num_entries == 1:
        return None, None
    return rows_by_entry(problem.prompt_index, num_entries)
