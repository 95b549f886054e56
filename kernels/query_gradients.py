"""Prompt attention, backward, the kernels that own queries: delta with the converted lse, and dQ.

delta is rowsum(do * o). dQ mirrors the forward: a tile of queries walks over the prompt's keys and the text's.
Derivation and grids: README.md.
"""

import triton
import triton.language as tl

from ptv2_fast.kernels.problem import UNSPECIALIZED
from ptv2_fast.kernels.tiles import (
    LOG2E,
    block_start,
    count_blocks,
    dropout_keep,
    key_blocks,
    load_keys,
    load_statistics,
    load_tile,
    offset_of,
    program_coordinates,
    prompt_entry,
    row_extent,
    score_gradient,
    store_tile,
    tile_scores,
    widen,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _prompt_attention_delta_kernel(
    o_ptr, do_ptr, lse_ptr, cu_seqlens_ptr, delta_ptr, lse2_ptr, o_strides, do_strides, lse_strides,
    num_queries, num_heads, num_tiles,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):
    tile, head, row = program_coordinates(num_tiles, num_heads)
    memory_row, first_token, num_queries, _ = row_extent(cu_seqlens_ptr, row, num_queries, num_queries)
    start_m = tile * BLOCK_M
    if start_m >= num_queries:
        return
    first = first_token + start_m
    o = load_tile(o_ptr + offset_of(o_strides, memory_row, head, first), o_strides[2], o_strides[3],
                  num_queries - start_m, BLOCK_M, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    do = load_tile(do_ptr + offset_of(do_strides, memory_row, head, first), do_strides[2], do_strides[3],
                   num_queries - start_m, BLOCK_M, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    rows = tl.arange(0, BLOCK_M)
    present = start_m + rows < num_queries
    places = offset_of(lse_strides, memory_row, head, first + rows)
    tl.store(delta_ptr + places, tl.sum(o * do, 1), mask=present)
    # What every pass subtracts in its loop, once: in powers of two, and +inf where a row saw no key.
    lse = tl.load(lse_ptr + places, mask=present, other=0.0)
    tl.store(lse2_ptr + places, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), mask=present)


@triton.jit
def query_gradient_range(dq, q, do, lse, delta, queries, shift, k_ptr, v_ptr, k_strides, v_strides, bias_ptrs,
                         bias_stride, key_mask_ptr, key_mask_stride, begin, head_end, body_end, end, num_queries, scale,
                         softcap, window, seed, dropout_p, stream, first_column,
                         HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CHECK: tl.constexpr,
                         IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                         HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr):
    """Add the share of keys begin..end-1 of one key list to dq / scale; blocks as in `attend_range`."""
    num_blocks, head_blocks = count_blocks(begin, head_end, body_end, end, BLOCK_N, CHECK)
    for block in range(num_blocks):
        start = block_start(block, head_blocks, begin, head_end, body_end, BLOCK_N, CHECK)
        k = load_keys(k_ptr, k_strides[2], k_strides[3], start, end, key_mask_ptr, key_mask_stride,
                      BLOCK_N, HEAD_DIM, BLOCK_D, CHECK)  # [BLOCK_N, BLOCK_D]
        v = load_keys(v_ptr, v_strides[2], v_strides[3], start, end, key_mask_ptr, key_mask_stride,
                      BLOCK_N, HEAD_DIM, BLOCK_D, CHECK)  # [BLOCK_N, BLOCK_D]
        dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        keys = start + tl.arange(0, BLOCK_N)[None, :]
        scores, unit, slope = tile_scores(
            dots, queries, keys, shift, bias_ptrs, bias_stride, key_mask_ptr, key_mask_stride, num_queries, end,
            scale, softcap, window, CHECK, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP)
        probs = tl.exp2(scores * unit - lse[:, None])
        dprobs = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        keep = None
        if HAS_DROPOUT:
            keep = dropout_keep(seed, stream, queries, first_column + keys, dropout_p)
        dscores, _ = score_gradient(probs, dprobs, delta[:, None], keep, dropout_p, HAS_DROPOUT)
        dq = tl.dot((dscores * slope).to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _prompt_attention_backward_query_kernel(
    q_ptr, k_ptr, v_ptr, prompt_k_ptr, prompt_v_ptr, key_mask_ptr, bias_ptr, prompt_bias_ptr, prompt_index_ptr,
    prompt_lens_ptr, cu_seqlens_ptr, seed_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_strides, k_strides, v_strides, prompt_k_strides, prompt_v_strides, key_mask_strides, bias_strides,
    prompt_bias_strides, do_strides, lse_strides, dq_strides,
    num_queries, num_keys, prompt_length, num_heads, num_tiles, scale, softcap, window, dropout_p,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, HAS_PROMPT: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):
    tile, head, row = program_coordinates(num_tiles, num_heads)
    if IS_CAUSAL:
        tile = num_tiles - 1 - tile
    kv_head = head // GROUP
    memory_row, first_token, num_queries, num_keys = row_extent(cu_seqlens_ptr, row, num_queries, num_keys)
    start_m = tile * BLOCK_M
    if start_m >= num_queries:
        return

    first_row = first_token + start_m
    q = load_tile(q_ptr + offset_of(q_strides, memory_row, head, first_row), q_strides[2], q_strides[3],
                  num_queries - start_m, BLOCK_M, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    do = load_tile(do_ptr + offset_of(do_strides, memory_row, head, first_row), do_strides[2], do_strides[3],
                   num_queries - start_m, BLOCK_M, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    rows = start_m + tl.arange(0, BLOCK_M)
    queries = rows[:, None]
    statistics = offset_of(lse_strides, memory_row, head, first_token)
    lse, delta = load_statistics(lse_ptr, delta_ptr, statistics, lse_strides[2], rows, num_queries)
    stream = row * num_heads + head
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

    if HAS_PROMPT:
        entry, length = prompt_entry(prompt_index_ptr, prompt_lens_ptr, row, prompt_length)
        prompt_k = prompt_k_ptr + offset_of(prompt_k_strides, entry, kv_head, 0)
        prompt_v = prompt_v_ptr + offset_of(prompt_v_strides, entry, kv_head, 0)
        prompt_bias_ptrs = None
        if prompt_bias_ptr is not None:
            prompt_bias_ptrs = prompt_bias_ptr + offset_of(prompt_bias_strides, entry, head, 0) + queries * 0
        full = length // BLOCK_P * BLOCK_P
        for CHECK in tl.static_range(2):
            dq = query_gradient_range(
                dq, q, do, lse, delta, queries, 0, prompt_k, prompt_v, prompt_k_strides, prompt_v_strides,
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
        dq = query_gradient_range(
            dq, q, do, lse, delta, queries, num_keys - num_queries, k, v, k_strides, v_strides,
            bias_ptrs, bias_strides[3], mask, key_mask_strides[1], begin, head_end, body_end, end, num_queries,
            scale, softcap, window, seed, dropout_p, stream, prompt_length,
            HEAD_DIM, BLOCK_D, BLOCK_N, CHECK, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, PRECISION)

    store_tile(dq_ptr + offset_of(dq_strides, memory_row, head, first_row), dq_strides[2], dq_strides[3],
               num_queries - start_m, dq * scale, BLOCK_M, HEAD_DIM, BLOCK_D)
