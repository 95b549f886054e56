"""Prompt attention, forward: one softmax over [a prompt shared by the batch | the row's own text].

    out = dropout(softmax([q prompt_k^T ; q k^T] * scale -> softcap -> + biases -> mask)) [prompt_v ; v]

One program owns BLOCK_M queries of one head of one row. It walks over the prompt's keys, then over the text's, with one
running softmax; neither the concatenation nor the mask exists in memory. Derivation, dropout and grid: README.md.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from ptv2_fast.kernels import launch, launcher
from ptv2_fast.kernels.problem import UNSPECIALIZED, Form, Problem, heads_strides
from ptv2_fast.kernels.tiles import (
    block_start,
    count_blocks,
    dropout_keep,
    finish_softmax,
    key_blocks,
    load_keys,
    load_tile,
    offset_of,
    online_softmax_step,
    program_coordinates,
    prompt_entry,
    row_extent,
    store_tile,
    tile_scores,
    widen,
)


@triton.jit
def attend_range(acc, row_max, row_sum, q, queries, shift, k_ptr, v_ptr, k_strides, v_strides, bias_ptrs, bias_stride,
                 key_mask_ptr, key_mask_stride, begin, head_end, body_end, end, num_queries, scale, softcap, window,
                 seed, dropout_p, stream, first_column,
                 HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CHECK: tl.constexpr,
                 IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                 HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr):
    """Let a tile's queries attend to keys begin..end-1 of one key list: to the partial blocks if CHECK, else the full.

    Blocks from head_end to body_end are full: every pair in them is visible.
    """
    num_blocks, head_blocks = count_blocks(begin, head_end, body_end, end, BLOCK_N, CHECK)
    for block in range(num_blocks):
        start = block_start(block, head_blocks, begin, head_end, body_end, BLOCK_N, CHECK)
        k = load_tile(k_ptr + widen(start) * k_strides[2], k_strides[2], k_strides[3], end - start,
                      BLOCK_N, HEAD_DIM, BLOCK_D, CHECK)  # [BLOCK_N, BLOCK_D]
        dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        keys = start + tl.arange(0, BLOCK_N)[None, :]
        scores, unit, _ = tile_scores(
            dots, queries, keys, shift, bias_ptrs, bias_stride, key_mask_ptr, key_mask_stride, num_queries, end,
            scale, softcap, window, CHECK, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP)
        acc, row_max, row_sum, probs = online_softmax_step(acc, row_max, row_sum, scores, unit)
        if HAS_DROPOUT:
            keep = dropout_keep(seed, stream, queries, first_column + keys, dropout_p)
            probs = tl.where(keep, probs, 0.0)
        v = load_keys(v_ptr, v_strides[2], v_strides[3], start, end, key_mask_ptr, key_mask_stride,
                      BLOCK_N, HEAD_DIM, BLOCK_D, CHECK)  # [BLOCK_N, BLOCK_D]
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _prompt_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, prompt_k_ptr, prompt_v_ptr, key_mask_ptr, bias_ptr, prompt_bias_ptr, prompt_index_ptr,
    prompt_lens_ptr, cu_seqlens_ptr, seed_ptr, o_ptr, lse_ptr,
    q_strides, k_strides, v_strides, prompt_k_strides, prompt_v_strides, key_mask_strides, bias_strides,
    prompt_bias_strides, o_strides, lse_strides,
    num_queries, num_keys, prompt_length, num_heads, num_tiles, scale, softcap, window, dropout_p,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, HAS_PROMPT: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):
    tile, head, row = program_coordinates(num_tiles, num_heads)
    if IS_CAUSAL:
        # The last queries see the most keys: start them first, so that no long program is left alone at the end.
        tile = num_tiles - 1 - tile
    kv_head = head // GROUP
    memory_row, first_token, num_queries, num_keys = row_extent(cu_seqlens_ptr, row, num_queries, num_keys)
    start_m = tile * BLOCK_M
    if start_m >= num_queries:
        return

    q = load_tile(q_ptr + offset_of(q_strides, memory_row, head, first_token + start_m), q_strides[2], q_strides[3],
                  num_queries - start_m, BLOCK_M, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    rows = start_m + tl.arange(0, BLOCK_M)
    queries = rows[:, None]
    stream = row * num_heads + head
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

    if HAS_PROMPT:
        entry, length = prompt_entry(prompt_index_ptr, prompt_lens_ptr, row, prompt_length)
        prompt_k = prompt_k_ptr + offset_of(prompt_k_strides, entry, kv_head, 0)
        prompt_v = prompt_v_ptr + offset_of(prompt_v_strides, entry, kv_head, 0)
        prompt_bias_ptrs = None
        if prompt_bias_ptr is not None:
            prompt_bias_ptrs = prompt_bias_ptr + offset_of(prompt_bias_strides, entry, head, 0) + queries * 0
        full = length // BLOCK_P * BLOCK_P
        for CHECK in tl.static_range(2):
            acc, row_max, row_sum = attend_range(
                acc, row_max, row_sum, q, queries, 0, prompt_k, prompt_v, prompt_k_strides, prompt_v_strides,
                prompt_bias_ptrs, prompt_bias_strides[2], None, 0, 0, 0, full, length, num_queries,
                scale, softcap, 0, seed, dropout_p, stream, 0,
                HEAD_DIM, BLOCK_D, BLOCK_P, CHECK, False, False, HAS_SOFTCAP, HAS_DROPOUT, PRECISION)

    k = k_ptr + offset_of(k_strides, memory_row, kv_head, first_token)
    v = v_ptr + offset_of(v_strides, memory_row, kv_head, first_token)
    bias_ptrs = None
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + offset_of(bias_strides, row, head, queries)  # [BLOCK_M, 1]
    mask = None
    if key_mask_ptr is not None:
        mask = key_mask_ptr + widen(row) * key_mask_strides[0]
    begin, head_end, body_end, end = key_blocks(
        mask, key_mask_strides[1], start_m, num_queries, num_keys, window, BLOCK_M, BLOCK_N, IS_CAUSAL, HAS_WINDOW)
    for CHECK in tl.static_range(2):
        acc, row_max, row_sum = attend_range(
            acc, row_max, row_sum, q, queries, num_keys - num_queries, k, v, k_strides, v_strides,
            bias_ptrs, bias_strides[3], mask, key_mask_strides[1], begin, head_end, body_end, end, num_queries,
            scale, softcap, window, seed, dropout_p, stream, prompt_length,
            HEAD_DIM, BLOCK_D, BLOCK_N, CHECK, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, PRECISION)

    output, lse = finish_softmax(acc, row_max, row_sum)
    if HAS_DROPOUT:
        output = output * (1.0 / (1.0 - dropout_p))
    store_tile(o_ptr + offset_of(o_strides, memory_row, head, first_token + start_m), o_strides[2], o_strides[3],
               num_queries - start_m, output, BLOCK_M, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + offset_of(lse_strides, memory_row, head, first_token + rows), lse, mask=rows < num_queries)


@functools.lru_cache(launcher.MOST_REMEMBERED)
def _forward_launch(form: Form, config: launch.LaunchConfig, o_strides: tuple[int, ...],
                    lse_strides: tuple[int, ...]) -> tuple[tuple[int, ...], launcher.Constants]:
    """The grid and the arguments that are no tensors."""
    num_tiles = triton.cdiv(form.num_queries, config.block_m)
    return (num_tiles * form.num_heads * form.num_rows,), launcher.Constants({
        **form.constants("forward"), "o_strides": o_strides, "lse_strides": lse_strides, "num_tiles": num_tiles,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_P": form.prompt_block(config.block_n),
        **config.options})


def prompt_attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prompt_k: torch.Tensor, prompt_v: torch.Tensor, *,
    config: launch.LaunchConfig | None = None, **arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a prompt shared by the batch, followed by each row's own keys; gives (o, lse).

    o = dropout(softmax(scores)) [prompt_v ; v] and lse = log sum exp(scores),
    scores = softcap(scale * q [prompt_k ; k]^T) + biases

    Args:
        q: queries (B, H, N, d), float16, bfloat16 or float32, any strides; packed: (T, H, d).
        k, v: text keys and values (B, Hkv, M, d), any strides; packed: (T, Hkv, d).
        prompt_k, prompt_v: a bank of prompts (R, Hkv, P, d); P may be 0.
        config: tile sizes; chosen for the device, head size and dtype when absent.
        arguments: any of
            key_mask: (B, M) bool or integer, nonzero = attend.
            cu_seqlens: (S + 1,) int32, first token of each packed row and the total.
            max_seqlen: the longest packed row; T when absent, at the price of programs that find nothing to do.
            prompt_index: (B,) or (S,) int32 or int64, the bank entry of each row; may be absent when R is 1.
            prompt_lens: (R,) int32, how many keys of each entry are real.
            prompt_bias: (R, H, P) float, added to the prompt's scores.
            bias: (1 or B, 1 or H, N, M) float, added to the text's scores; may hold -inf.
            causal: query i sees text keys j <= i + M - N. The prompt is visible to every query.
            window: text keys further away than this are invisible (causal: p - j < window; else |p - j| <= window).
            softcap: scaled scores become softcap * tanh(score / softcap), before the biases.
            scale: factor on the dot products, positive; 1 / sqrt(d) when absent.
            dropout_p, seed: attention dropout in [0, 1) and its seed, int64 of one element on q's device.
    Returns:
        o like q, laid out (B, N, H, d) in memory, and lse (B, H, N) float32, natural logarithm ((H, T) packed), whose
        rows may lie further apart than they are long. A query that sees no key has o = 0 and lse = -inf.
    Raises:
        ValueError: scale is not positive, or prompt_index or seed is missing where it is needed.
    """
    problem = Problem.of(q, k, v, prompt_k, prompt_v, **arguments)
    form = problem.form
    output = launch.allocate_heads(problem.q)
    lse_shape = (form.num_heads, form.tokens) if form.packed else (form.num_rows, form.num_heads, form.tokens)
    lse = launch.allocate_statistics(lse_shape, q.device)
    config = config or form.config("forward")
    grid, constants = _forward_launch(form, config, heads_strides(output), problem.row_stride(lse))
    launch.run(
        _prompt_attention_forward_kernel, grid, q.device, (*problem.tensors("forward"), output, lse), constants)
    return output, lse
