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
from ptv2_fast.kernels.arguments import Blocks, Inputs, KeyList, Pairs, QueryTile, Results
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
    product,
    program_coordinates,
    prompt_entry,
    row_extent,
    store_tile,
    tile_scores,
    widen,
)


@triton.jit
def attend_range(
    acc,
    row_max,
    row_sum,
    tile,
    key_list,
    pairs,
    blocks,
    factors,
    switches: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHECK: tl.constexpr,
    IS_TEXT: tl.constexpr,
):
    """Let a tile's queries attend to the `Blocks` of one `KeyList`: to the partial blocks if CHECK, else the full.

    In full blocks every pair is visible.
    """
    num_blocks, head_blocks = count_blocks(blocks, BLOCK_N, CHECK)
    k_place = product(blocks.head_end, key_list.k_strides[2])
    v_place = product(blocks.head_end, key_list.v_strides[2])
    for block in range(num_blocks):
        start = block_start(block, head_blocks, blocks, BLOCK_N, CHECK)
        if CHECK:
            k_place = product(start, key_list.k_strides[2])
            v_place = product(start, key_list.v_strides[2])
        # [BLOCK_N, BLOCK_D]
        first = key_list.k + k_place
        k = load_tile(first, key_list.k_strides, blocks.end - start, BLOCK_N, switches.HEAD_DIM, BLOCK_D, CHECK)
        dots = tl.dot(tile.q, tl.trans(k), input_precision=switches.PRECISION)  # [BLOCK_M, BLOCK_N]
        keys = start + tl.arange(0, BLOCK_N)[None, :]
        scores, unit, _ = tile_scores(dots, tile, keys, pairs, blocks.end, factors, switches, CHECK, IS_TEXT)
        hides: tl.constexpr = CHECK or pairs.bias is not None
        acc, row_max, row_sum, probs = online_softmax_step(acc, row_max, row_sum, scores, unit, hides)
        if switches.HAS_DROPOUT:
            keep = dropout_keep(tile.seed, tile.stream, tile.queries, pairs.first_column + keys, factors.dropout_p)
            probs = tl.where(keep, probs, 0.0)
        first = key_list.v + v_place
        v = load_keys(first, key_list.v_strides, start, blocks.end, pairs, BLOCK_N, switches.HEAD_DIM, BLOCK_D, CHECK)
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision=switches.PRECISION)
        if not CHECK:
            k_place += product(BLOCK_N, key_list.k_strides[2])
            v_place += product(BLOCK_N, key_list.v_strides[2])
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _prompt_attention_forward_kernel(
    inputs,
    own,
    strides,
    own_strides,
    num_queries,
    num_keys,
    prompt_length,
    num_heads,
    num_tiles,
    window,
    factors,
    switches: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    number, head, row = program_coordinates(num_tiles, num_heads)
    if switches.IS_CAUSAL:
        # The last queries see the most keys: start them first, so that no long program is left alone at the end.
        number = num_tiles - 1 - number
    kv_head = head // switches.GROUP
    memory_row, first_token, num_queries, num_keys = row_extent(inputs.cu_seqlens, row, num_queries, num_keys)
    start_m = number * BLOCK_M
    if start_m >= num_queries:
        return

    first = inputs.q + offset_of(strides.q, memory_row, head, first_token + start_m)
    # [BLOCK_M, BLOCK_D]
    q = load_tile(first, strides.q, num_queries - start_m, BLOCK_M, switches.HEAD_DIM, BLOCK_D, True)
    rows = start_m + tl.arange(0, BLOCK_M)
    queries = rows[:, None]
    seed = 0
    if switches.HAS_DROPOUT:
        seed = tl.load(inputs.seed)
    tile = QueryTile(q, queries, num_queries, seed, row * num_heads + head)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

    if switches.HAS_PROMPT:
        entry, length = prompt_entry(inputs.prompt_index, inputs.prompt_lens, row, prompt_length)
        key_list = KeyList(
            inputs.prompt_k + offset_of(strides.prompt_k, entry, kv_head, 0),
            inputs.prompt_v + offset_of(strides.prompt_v, entry, kv_head, 0),
            strides.prompt_k,
            strides.prompt_v,
        )
        prompt_bias = None
        if inputs.prompt_bias is not None:
            prompt_bias = inputs.prompt_bias + offset_of(strides.prompt_bias, entry, head, 0) + queries * 0
        pairs = Pairs(
            bias=prompt_bias,
            bias_stride=strides.prompt_bias[2],
            mask=None,
            mask_stride=0,
            shift=0,
            window=0,
            first_column=0,
        )
        blocks = Blocks(0, 0, length // BLOCK_P * BLOCK_P, length)
        for CHECK in tl.static_range(2):
            acc, row_max, row_sum = attend_range(
                acc, row_max, row_sum, tile, key_list, pairs, blocks, factors, switches, BLOCK_D, BLOCK_P, CHECK, False
            )

    key_list = KeyList(
        inputs.k + offset_of(strides.k, memory_row, kv_head, first_token),
        inputs.v + offset_of(strides.v, memory_row, kv_head, first_token),
        strides.k,
        strides.v,
    )
    bias = None
    if inputs.bias is not None:
        bias = inputs.bias + offset_of(strides.bias, row, head, queries)  # [BLOCK_M, 1]
    mask = None
    if inputs.key_mask is not None:
        mask = inputs.key_mask + widen(row) * strides.key_mask[0]
    pairs = Pairs(
        bias=bias,
        bias_stride=strides.bias[3],
        mask=mask,
        mask_stride=strides.key_mask[1],
        shift=num_keys - num_queries,
        window=window,
        first_column=prompt_length,
    )
    blocks = key_blocks(pairs, start_m, num_queries, num_keys, switches, BLOCK_M, BLOCK_N)
    for CHECK in tl.static_range(2):
        acc, row_max, row_sum = attend_range(
            acc, row_max, row_sum, tile, key_list, pairs, blocks, factors, switches, BLOCK_D, BLOCK_N, CHECK, True
        )

    output, lse = finish_softmax(acc, row_max, row_sum)
    if switches.HAS_DROPOUT:
        output = output * (1.0 / (1.0 - factors.dropout_p))
    first = own.o + offset_of(own_strides.o, memory_row, head, first_token + start_m)
    store_tile(first, own_strides.o, num_queries - start_m, output, BLOCK_M, switches.HEAD_DIM, BLOCK_D)
    tl.store(own.lse + offset_of(own_strides.lse, memory_row, head, first_token + rows), lse, mask=rows < num_queries)


@functools.lru_cache(launcher.MOST_REMEMBERED)
def _forward_launch(
    form: Form, config: launch.LaunchConfig, o_strides: tuple[int, ...], lse_strides: tuple[int, ...]
) -> tuple[tuple[int, ...], launcher.Constants]:
    """The grid and the arguments that are no tensors."""
    num_tiles = triton.cdiv(form.num_queries, config.block_m)
    return (num_tiles * form.num_heads * form.num_rows,), launcher.Constants(
        {
            **form.constants("forward"),
            "own_strides": Results(o_strides, lse_strides),
            "num_tiles": num_tiles,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_P": form.prompt_block(config.block_n),
            **config.options,
        },
        groups=(Inputs, Results),
    )


def prompt_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompt_k: torch.Tensor,
    prompt_v: torch.Tensor,
    *,
    config: launch.LaunchConfig | None = None,
    **arguments: Any,
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
    launch.run(_prompt_attention_forward_kernel, grid, q.device, (problem.tensors("forward"), (output, lse)), constants)
    return output, lse
