"""Prompt attention, backward, the kernels that own keys: text dK and dV, and the prompt's, summed over the batch.

Both walk over queries with one shared step. The text kernel writes its result; the prompt kernel leaves one slot of
float32 partials per share of the queries, and `_sum_slots_kernel` adds the slots in a fixed order. The text kernel
meets each pair of a query and a key once, so a bias that trains gets its gradient there. See README.md.
"""

import triton
import triton.language as tl

from ptv2_fast.kernels.problem import UNSPECIALIZED
from ptv2_fast.kernels.tiles import (
    block_start,
    count_blocks,
    dropout_keep,
    load_statistics,
    load_tile,
    offset_of,
    program_coordinates,
    row_extent,
    score_gradient,
    seeing_queries,
    split_blocks,
    store_tile,
    tile_scores,
    widen,
)


@triton.jit
def key_gradient_step(dk, dv, k, v, q, do, lse, delta, queries, keys, shift, bias_ptrs, bias_stride, num_queries,
                      key_limit, scale, softcap, window, seed, dropout_p, stream, first_column,
                      CHECK: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
                      HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr):
    """Add one tile of queries' share to dk / scale and dv of a tile of keys; also gives that tile's d score.

    Tiles are (keys, queries), so that probabilities feed the next product without leaving their registers.
    """
    dots = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    scores, unit, slope = tile_scores(
        dots, queries, keys, shift, bias_ptrs, bias_stride, None, 0, num_queries, key_limit,
        scale, softcap, window, CHECK, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP)
    probs = tl.exp2(scores * unit - lse[None, :])
    dprobs = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    keep = None
    if HAS_DROPOUT:
        keep = dropout_keep(seed, stream, queries, first_column + keys, dropout_p)
    dscores, dropped = score_gradient(probs, dprobs, delta[None, :], keep, dropout_p, HAS_DROPOUT)
    dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
    dk = tl.dot((dscores * slope).to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv, dscores


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _prompt_attention_backward_text_kernel(
    q_ptr, k_ptr, v_ptr, prompt_k_ptr, prompt_v_ptr, key_mask_ptr, bias_ptr, prompt_bias_ptr, prompt_index_ptr,
    prompt_lens_ptr, cu_seqlens_ptr, seed_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, dbias_ptr,
    q_strides, k_strides, v_strides, prompt_k_strides, prompt_v_strides, key_mask_strides, bias_strides,
    prompt_bias_strides, do_strides, lse_strides, dk_strides, dv_strides, dbias_strides,
    num_queries, num_keys, prompt_length, num_heads, num_tiles, scale, softcap, window, dropout_p,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_PROMPT: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):
    tile, kv_head, row = program_coordinates(num_tiles, num_heads // GROUP)
    memory_row, first_token, num_queries, num_keys = row_extent(cu_seqlens_ptr, row, num_queries, num_keys)
    start_n = tile * BLOCK_N
    if start_n >= num_keys:
        return

    first_key = first_token + start_n
    k = load_tile(k_ptr + offset_of(k_strides, memory_row, kv_head, first_key), k_strides[2], k_strides[3],
                  num_keys - start_n, BLOCK_N, HEAD_DIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    v = load_tile(v_ptr + offset_of(v_strides, memory_row, kv_head, first_key), v_strides[2], v_strides[3],
                  num_keys - start_n, BLOCK_N, HEAD_DIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    keys = start_n + tl.arange(0, BLOCK_N)[:, None]
    shift = num_keys - num_queries
    last_key = tl.minimum(start_n + BLOCK_N, num_keys) - 1
    begin, full_begin, full_end, end = seeing_queries(
        start_n, last_key, shift, num_queries, window, IS_CAUSAL, HAS_WINDOW)
    attended = keys < num_keys
    if key_mask_ptr is not None:
        mask = key_mask_ptr + widen(row) * key_mask_strides[0] + widen(keys) * key_mask_strides[1]
        attended = tl.load(mask, mask=attended, other=0) != 0
        end = tl.where(tl.max(attended.to(tl.int32)) == 0, begin, end)
    head_end, body_end = split_blocks(begin, full_begin, tl.minimum(full_end, end), BLOCK_M)
    if not HAS_WINDOW:
        # Rows past the last query have lse = +inf and vanish: the remainder needs no look at visibility.
        body_end = tl.maximum(head_end, end)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)

    for CHECK in tl.static_range(2):
        if IS_CAUSAL or HAS_WINDOW or CHECK == 0:
            num_blocks, head_blocks = count_blocks(begin, head_end, body_end, end, BLOCK_M, CHECK)
            # One loop over the blocks of every head of the group: its copies are not drained from head to head.
            for item in range(GROUP * num_blocks):
                head, block = kv_head, item
                if GROUP > 1:
                    head = kv_head * GROUP + item // num_blocks
                    block = item % num_blocks
                start_m = block_start(block, head_blocks, begin, head_end, body_end, BLOCK_M, CHECK)
                first = first_token + start_m
                q = load_tile(q_ptr + offset_of(q_strides, memory_row, head, first), q_strides[2], q_strides[3],
                              end - start_m, BLOCK_M, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
                do = load_tile(do_ptr + offset_of(do_strides, memory_row, head, first), do_strides[2], do_strides[3],
                               end - start_m, BLOCK_M, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
                rows = start_m + tl.arange(0, BLOCK_M)
                statistics = offset_of(lse_strides, memory_row, head, first_token)
                lse, delta = load_statistics(lse_ptr, delta_ptr, statistics, lse_strides[2], rows, end)
                queries = rows[None, :]
                bias_ptrs = None
                if bias_ptr is not None:
                    bias_ptrs = bias_ptr + offset_of(bias_strides, row, head, queries)  # [1, BLOCK_M]
                dk, dv, dscores = key_gradient_step(
                    dk, dv, k, v, q, do, lse, delta, queries, keys, shift, bias_ptrs, bias_strides[3], end,
                    num_keys, scale, softcap, window, seed, dropout_p, row * num_heads + head, prompt_length,
                    CHECK, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, PRECISION)
                if dbias_ptr is not None:
                    pairs = offset_of(dbias_strides, row, head, queries) + widen(keys) * dbias_strides[3]
                    tl.store(dbias_ptr + pairs, tl.where(attended, dscores, 0.0).to(dbias_ptr.dtype.element_ty),
                             mask=(queries < end) & (keys < num_keys))

    # A masked key was computed like any other, with a probability that may overflow: its sums are replaced, not scaled.
    dk = tl.where(attended, dk * scale, 0.0)
    dv = tl.where(attended, dv, 0.0)
    store_tile(dk_ptr + offset_of(dk_strides, memory_row, kv_head, first_key), dk_strides[2], dk_strides[3],
               num_keys - start_n, dk, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_tile(dv_ptr + offset_of(dv_strides, memory_row, kv_head, first_key), dv_strides[2], dv_strides[3],
               num_keys - start_n, dv, BLOCK_N, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _prompt_attention_backward_prompt_kernel(
    q_ptr, k_ptr, v_ptr, prompt_k_ptr, prompt_v_ptr, key_mask_ptr, bias_ptr, prompt_bias_ptr, prompt_index_ptr,
    prompt_lens_ptr, cu_seqlens_ptr, seed_ptr, do_ptr, lse_ptr, delta_ptr, row_order_ptr, row_bounds_ptr,
    dk_slots_ptr, dv_slots_ptr, dbias_slots_ptr,
    q_strides, k_strides, v_strides, prompt_k_strides, prompt_v_strides, key_mask_strides, bias_strides,
    prompt_bias_strides, do_strides, lse_strides, slot_strides, dbias_strides,
    num_queries, num_keys, prompt_length, num_heads, num_tiles, scale, softcap, window, dropout_p,
    num_rows, num_entries, num_splits, slot_size, bias_slot_size,
    GROUP: tl.constexpr, HEADS_IN_LOOP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, HAS_PROMPT: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):
    # A program owns a tile of one entry's keys, HEADS_IN_LOOP query heads of one kv head, and every num_splits-th of
    # those heads' query tiles of the rows that use the entry.
    tile, head_set, rest = program_coordinates(num_tiles, num_heads // HEADS_IN_LOOP)
    entry = rest % num_entries
    split = rest // num_entries
    first_head = head_set * HEADS_IN_LOOP
    kv_head = first_head // GROUP
    start_p = tile * BLOCK_P
    length = prompt_length
    if prompt_lens_ptr is not None:
        length = tl.load(prompt_lens_ptr + entry).to(tl.int32)
    first_row = 0
    if row_bounds_ptr is not None:
        first_row = tl.load(row_bounds_ptr + entry)
        num_rows = tl.load(row_bounds_ptr + entry + 1) - first_row
    tiles_per_row = tl.cdiv(num_queries, BLOCK_M)
    num_items = tl.where(start_p < length, num_rows * tiles_per_row, 0)

    prompt_k = prompt_k_ptr + offset_of(prompt_k_strides, entry, kv_head, start_p)
    prompt_v = prompt_v_ptr + offset_of(prompt_v_strides, entry, kv_head, start_p)
    k = load_tile(prompt_k, prompt_k_strides[2], prompt_k_strides[3], length - start_p,
                  BLOCK_P, HEAD_DIM, BLOCK_D, True)  # [BLOCK_P, BLOCK_D]
    v = load_tile(prompt_v, prompt_v_strides[2], prompt_v_strides[3], length - start_p,
                  BLOCK_P, HEAD_DIM, BLOCK_D, True)  # [BLOCK_P, BLOCK_D]
    rows_p = start_p + tl.arange(0, BLOCK_P)
    keys = rows_p[:, None]
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    dk = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_P], dtype=tl.float32)

    # As in the text's kernel, one loop over all heads.
    for item in range(split, HEADS_IN_LOOP * num_items, num_splits):
        head, place = first_head, item
        if HEADS_IN_LOOP > 1:
            head = first_head + item // num_items
            place = item % num_items
        row = first_row + place // tiles_per_row
        if row_order_ptr is not None:
            row = tl.load(row_order_ptr + row)
        start_m = place % tiles_per_row * BLOCK_M
        memory_row, first_token, row_queries, _ = row_extent(cu_seqlens_ptr, row, num_queries, num_keys)
        first = first_token + start_m
        q = load_tile(q_ptr + offset_of(q_strides, memory_row, head, first), q_strides[2], q_strides[3],
                      row_queries - start_m, BLOCK_M, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
        do = load_tile(do_ptr + offset_of(do_strides, memory_row, head, first), do_strides[2], do_strides[3],
                       row_queries - start_m, BLOCK_M, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
        rows = start_m + tl.arange(0, BLOCK_M)
        statistics = offset_of(lse_strides, memory_row, head, first_token)
        lse, delta = load_statistics(lse_ptr, delta_ptr, statistics, lse_strides[2], rows, row_queries)
        queries = rows[None, :]
        bias_ptrs = None
        if prompt_bias_ptr is not None:
            bias_ptrs = prompt_bias_ptr + offset_of(prompt_bias_strides, entry, head, 0) + queries * 0
        dk, dv, dscores = key_gradient_step(
            dk, dv, k, v, q, do, lse, delta, queries, keys, 0, bias_ptrs, prompt_bias_strides[2], row_queries,
            length, scale, softcap, 0, seed, dropout_p, row * num_heads + head, 0,
            False, False, False, HAS_SOFTCAP, HAS_DROPOUT, PRECISION)
        if dbias_slots_ptr is not None:
            dbias += tl.sum(dscores, 1)

    # Keys beyond the entry's length were read as zeros and attended to like any other: their sums are replaced.
    real = keys < length
    slot = split * (GROUP // HEADS_IN_LOOP) + first_head % GROUP // HEADS_IN_LOOP
    base = widen(slot) * slot_size + offset_of(slot_strides, entry, kv_head, start_p)
    store_tile(dk_slots_ptr + base, slot_strides[2], slot_strides[3], prompt_length - start_p,
               tl.where(real, dk * scale, 0.0), BLOCK_P, HEAD_DIM, BLOCK_D)
    store_tile(dv_slots_ptr + base, slot_strides[2], slot_strides[3], prompt_length - start_p,
               tl.where(real, dv, 0.0), BLOCK_P, HEAD_DIM, BLOCK_D)
    if dbias_slots_ptr is not None:
        dbias = tl.where(rows_p < length, dbias, 0.0)
        base = widen(split) * bias_slot_size + offset_of(dbias_strides, entry, first_head, rows_p)
        tl.store(dbias_slots_ptr + base, dbias, mask=rows_p < prompt_length)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sum_slots_kernel(first_slots_ptr, second_slots_ptr, first_ptr, second_ptr, slot_size, num_slots,
                      BLOCK: tl.constexpr, SLOTS: tl.constexpr):
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
