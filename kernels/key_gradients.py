"""Prompt attention, backward, the kernels that own keys: text dK and dV, and the prompt's, summed over the batch.

Both walk over queries with one shared step. The text kernel writes its result; the prompt kernel leaves one slot of
float32 partials per share of the queries (`prompt_slots.py`). The text kernel meets each pair of a query and a key
once, so a bias that trains gets its gradient there. See README.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ptv2_fast.kernels.arguments import Blocks, GradientTile, Pairs
from ptv2_fast.kernels.problem import UNSPECIALIZED
from ptv2_fast.kernels.query_steps import item_steps, mixed_radix, statistics_place, steps_of, tile_statistics
from ptv2_fast.kernels.tiles import (
    block_start,
    count_blocks,
    dropout_keep,
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


class TextTensors(NamedTuple):
    """What the text's gradients are made of besides the inputs (lse in powers of two), and they; or their strides."""

    do: Any
    lse: Any
    delta: Any
    dk: Any
    dv: Any
    dbias: Any


class PromptTensors(NamedTuple):
    """What the prompt's gradients are made of besides the inputs, and slots of float32 for them; or their strides.

    row_order, row_bounds: rows sorted by the entry they use, and where each entry's begin; None for one entry.
    """

    do: Any
    lse: Any
    delta: Any
    row_order: Any
    row_bounds: Any
    dk: Any
    dv: Any
    dbias: Any


@triton.jit
def key_gradient_step(
    dk,
    dv,
    k,
    v,
    tile,
    keys,
    pairs,
    key_limit,
    factors,
    switches: tl.constexpr,
    CHECK: tl.constexpr,
    IS_TEXT: tl.constexpr,
):
    """Add one tile of queries' share to dk / scale and dv of a tile of keys; also gives that tile's d score.

    Tiles are (keys, queries), so that probabilities feed the next product without leaving their registers.
    """
    dots = tl.dot(k, tl.trans(tile.q), input_precision=switches.PRECISION)  # [BLOCK_N, BLOCK_M]
    scores, unit, slope = tile_scores(dots, tile, keys, pairs, key_limit, factors, switches, CHECK, IS_TEXT)
    probs = tl.exp2(scores * unit - tile.lse[None, :])
    dprobs = tl.dot(v, tl.trans(tile.do), input_precision=switches.PRECISION)
    keep = None
    if switches.HAS_DROPOUT:
        keep = dropout_keep(tile.seed, tile.stream, tile.queries, pairs.first_column + keys, factors.dropout_p)
    delta = tile.delta[None, :]
    dscores, dropped = score_gradient(probs, dprobs, delta, keep, factors.dropout_p, switches.HAS_DROPOUT)
    dv = tl.dot(dropped.to(tile.do.dtype), tile.do, dv, input_precision=switches.PRECISION)
    dk = tl.dot((dscores * slope).to(tile.q.dtype), tile.q, dk, input_precision=switches.PRECISION)
    return dk, dv, dscores


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _prompt_attention_backward_text_kernel(
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
):
    number, kv_head, row = program_coordinates(num_tiles, num_heads // switches.GROUP)
    memory_row, first_token, num_queries, num_keys = row_extent(inputs.cu_seqlens, row, num_queries, num_keys)
    start_n = number * BLOCK_N
    if start_n >= num_keys:
        return

    first_key = first_token + start_n
    # [BLOCK_N, BLOCK_D]
    address = inputs.k + offset_of(strides.k, memory_row, kv_head, first_key)
    k = load_tile(address, strides.k, num_keys - start_n, BLOCK_N, switches.HEAD_DIM, BLOCK_D, True)
    address = inputs.v + offset_of(strides.v, memory_row, kv_head, first_key)
    v = load_tile(address, strides.v, num_keys - start_n, BLOCK_N, switches.HEAD_DIM, BLOCK_D, True)
    keys = start_n + tl.arange(0, BLOCK_N)[:, None]
    shift = num_keys - num_queries
    last_key = tl.minimum(start_n + BLOCK_N, num_keys) - 1
    begin, full_begin, full_end, end = seeing_queries(
        start_n, last_key, shift, num_queries, window, switches.IS_CAUSAL, switches.HAS_WINDOW
    )
    attended = keys < num_keys
    if inputs.key_mask is not None:
        mask = inputs.key_mask + widen(row) * strides.key_mask[0] + widen(keys) * strides.key_mask[1]
        attended = tl.load(mask, mask=attended, other=0) != 0
        if tl.max(attended.to(tl.int32)) == 0:
            # Nobody sees a key of the tile. Loops of no round instead would run over bounds that are read, which takes
            # every round more instructions.
            nothing = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
            address = own.dk + offset_of(own_strides.dk, memory_row, kv_head, first_key)
            store_tile(address, own_strides.dk, num_keys - start_n, nothing, BLOCK_N, switches.HEAD_DIM, BLOCK_D)
            address = own.dv + offset_of(own_strides.dv, memory_row, kv_head, first_key)
            store_tile(address, own_strides.dv, num_keys - start_n, nothing, BLOCK_N, switches.HEAD_DIM, BLOCK_D)
            return
    head_end, body_end = split_blocks(begin, full_begin, tl.minimum(full_end, end), BLOCK_M)
    blocks = Blocks(begin, head_end, body_end, end)
    seed = 0
    if switches.HAS_DROPOUT:
        seed = tl.load(inputs.seed)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)

    in_tile = widen(tl.arange(0, BLOCK_M)) * own_strides.lse[2]
    lse_tile = own.lse + in_tile  # [BLOCK_M]
    delta_tile = own.delta + in_tile
    HIDES: tl.constexpr = switches.IS_CAUSAL or switches.HAS_WINDOW
    for CHECK in tl.static_range(2):
        num_blocks, head_blocks = count_blocks(blocks, BLOCK_M, CHECK)
        # One loop over the blocks of every head of the group: its copies are not drained from head to head. Which head
        # and block is counted, and where the full ones stand is stepped to: a division in the loop takes tens of
        # instructions, and products of 64 bits as many.
        head = kv_head * switches.GROUP
        block = 0
        first = first_token + block_start(block, head_blocks, blocks, BLOCK_M, CHECK)
        q_first = inputs.q + offset_of(strides.q, memory_row, head, first)
        do_first = own.do + offset_of(own_strides.do, memory_row, head, first)
        place = statistics_place(own_strides.lse, memory_row, head, first)
        q_step, q_jump = steps_of(strides.q, num_blocks, BLOCK_M)
        do_step, do_jump = steps_of(own_strides.do, num_blocks, BLOCK_M)
        step, jump = steps_of(own_strides.lse, num_blocks, BLOCK_M)
        for _ in range(switches.GROUP * num_blocks):
            start_m = block_start(block, head_blocks, blocks, BLOCK_M, CHECK)
            if CHECK:
                first = first_token + start_m
                q_first = inputs.q + offset_of(strides.q, memory_row, head, first)
                do_first = own.do + offset_of(own_strides.do, memory_row, head, first)
                place = statistics_place(own_strides.lse, memory_row, head, first)
            rows_left = end - start_m
            # [BLOCK_M, BLOCK_D]
            q = load_tile(q_first, strides.q, rows_left, BLOCK_M, switches.HEAD_DIM, BLOCK_D, CHECK)
            do = load_tile(do_first, own_strides.do, rows_left, BLOCK_M, switches.HEAD_DIM, BLOCK_D, CHECK)
            lse, delta = tile_statistics(lse_tile + place, delta_tile + place, rows_left, BLOCK_M, CHECK)
            rows = start_m + tl.arange(0, BLOCK_M)
            queries = rows[None, :]
            bias = None
            if inputs.bias is not None:
                bias = inputs.bias + offset_of(strides.bias, row, head, queries)  # [1, BLOCK_M]
            pairs = Pairs(
                bias=bias,
                bias_stride=strides.bias[3],
                mask=None,
                mask_stride=0,
                shift=shift,
                window=window,
                first_column=prompt_length,
            )
            tile = GradientTile(q, do, lse, delta, queries, end, seed, row * num_heads + head)
            dk, dv, dscores = key_gradient_step(
                dk, dv, k, v, tile, keys, pairs, num_keys, factors, switches, CHECK and HIDES, True
            )
            if own.dbias is not None:
                places = offset_of(own_strides.dbias, row, head, queries) + widen(keys) * own_strides.dbias[3]
                tl.store(
                    own.dbias + places,
                    tl.where(attended, dscores, 0.0).to(own.dbias.dtype.element_ty),
                    mask=(queries < end) & (keys < num_keys),
                )
            block += 1
            is_last = block == num_blocks
            if switches.GROUP > 1:
                block = tl.where(is_last, 0, block)
                head += is_last.to(tl.int32)
            if switches.GROUP > 1 and not CHECK:
                q_first += tl.where(is_last, q_jump, q_step)
                do_first += tl.where(is_last, do_jump, do_step)
                place += tl.where(is_last, jump.to(tl.int32), step.to(tl.int32))
            elif not CHECK:
                q_first += q_step
                do_first += do_step
                place += step.to(tl.int32)

    # A masked key was computed like any other, with a probability that may overflow: its sums are replaced, not scaled.
    dk = tl.where(attended, dk * factors.scale, 0.0)
    dv = tl.where(attended, dv, 0.0)
    address = own.dk + offset_of(own_strides.dk, memory_row, kv_head, first_key)
    store_tile(address, own_strides.dk, num_keys - start_n, dk, BLOCK_N, switches.HEAD_DIM, BLOCK_D)
    address = own.dv + offset_of(own_strides.dv, memory_row, kv_head, first_key)
    store_tile(address, own_strides.dv, num_keys - start_n, dv, BLOCK_N, switches.HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _prompt_attention_backward_prompt_kernel(
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
    num_rows,
    num_entries,
    num_splits,
    slot_size,
    bias_slot_size,
    factors,
    switches: tl.constexpr,
    HEADS_IN_LOOP: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # A program owns a tile of one entry's keys, HEADS_IN_LOOP query heads of one kv head, and every num_splits-th of
    # those heads' query tiles of the rows that use the entry.
    number, head_set, rest = program_coordinates(num_tiles, num_heads // HEADS_IN_LOOP)
    entry = rest % num_entries
    split = rest // num_entries
    first_head = head_set * HEADS_IN_LOOP
    kv_head = first_head // switches.GROUP
    start_p = number * BLOCK_P
    length = prompt_length
    if inputs.prompt_lens is not None:
        length = tl.load(inputs.prompt_lens + entry).to(tl.int32)
    first_row = 0
    if own.row_bounds is not None:
        first_row = tl.load(own.row_bounds + entry)
        num_rows = tl.load(own.row_bounds + entry + 1) - first_row
    # Without packed rows, whose lengths differ, all but a row's last tile are whole.
    whole_tiles = 0
    if inputs.cu_seqlens is None:
        whole_tiles = num_queries // BLOCK_M
    num_rows = tl.where(start_p < length, num_rows, 0)

    # [BLOCK_P, BLOCK_D]
    address = inputs.prompt_k + offset_of(strides.prompt_k, entry, kv_head, start_p)
    k = load_tile(address, strides.prompt_k, length - start_p, BLOCK_P, switches.HEAD_DIM, BLOCK_D, True)
    address = inputs.prompt_v + offset_of(strides.prompt_v, entry, kv_head, start_p)
    v = load_tile(address, strides.prompt_v, length - start_p, BLOCK_P, switches.HEAD_DIM, BLOCK_D, True)
    rows_p = start_p + tl.arange(0, BLOCK_P)
    keys = rows_p[:, None]
    seed = 0
    if switches.HAS_DROPOUT:
        seed = tl.load(inputs.seed)
    dk = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_P], dtype=tl.float32)

    in_tile = widen(tl.arange(0, BLOCK_M)) * own_strides.lse[2]
    lse_tile = own.lse + in_tile  # [BLOCK_M]
    delta_tile = own.delta + in_tile
    # As in the text's kernel, one loop over all heads, whose items are counted: by tile, then row, then head. Where
    # whole tiles stand is stepped to, but for rows in another order and for small tiles whose registers nothing bounds:
    # steps take some, with which a multiprocessor would hold a block less.
    STEPPED: tl.constexpr = STEPS and own.row_order is None
    for CHECK in tl.static_range(2):
        first_tile = 0
        tiles = whole_tiles
        if CHECK:
            first_tile = whole_tiles
            tiles = tl.cdiv(num_queries, BLOCK_M) - whole_tiles
        head, member, tile_number = mixed_radix(split, tiles, num_rows)
        head_step, row_step, tile_step = mixed_radix(num_splits, tiles, num_rows)
        row = first_row + member
        start_m = tile_number * BLOCK_M
        q_first = inputs.q + offset_of(strides.q, row, first_head + head, start_m)
        do_first = own.do + offset_of(own_strides.do, row, first_head + head, start_m)
        place = statistics_place(own_strides.lse, row, first_head + head, start_m)
        radix = (tile_step, row_step, head_step, tiles, num_rows)
        q_step, q_row, q_head = item_steps(strides.q, radix, BLOCK_M)
        do_step, do_row, do_head = item_steps(own_strides.do, radix, BLOCK_M)
        step, next_row, next_head = item_steps(own_strides.lse, radix, BLOCK_M)
        for _ in range(split, HEADS_IN_LOOP * num_rows * tiles, num_splits):
            row = first_row + member
            if own.row_order is not None:
                row = tl.load(own.row_order + row)
            start_m = (first_tile + tile_number) * BLOCK_M
            memory_row, first_token, row_queries, _ = row_extent(inputs.cu_seqlens, row, num_queries, num_keys)
            rows_left = row_queries - start_m
            query_head = first_head + head
            if CHECK or not STEPPED:
                first = first_token + start_m
                q_first = inputs.q + offset_of(strides.q, memory_row, query_head, first)
                do_first = own.do + offset_of(own_strides.do, memory_row, query_head, first)
                place = statistics_place(own_strides.lse, memory_row, query_head, first)
            # [BLOCK_M, BLOCK_D]
            q = load_tile(q_first, strides.q, rows_left, BLOCK_M, switches.HEAD_DIM, BLOCK_D, CHECK)
            do = load_tile(do_first, own_strides.do, rows_left, BLOCK_M, switches.HEAD_DIM, BLOCK_D, CHECK)
            lse, delta = tile_statistics(lse_tile + place, delta_tile + place, rows_left, BLOCK_M, CHECK)
            rows = start_m + tl.arange(0, BLOCK_M)
            queries = rows[None, :]
            bias = None
            if inputs.prompt_bias is not None:
                bias = inputs.prompt_bias + offset_of(strides.prompt_bias, entry, query_head, 0) + queries * 0
            pairs = Pairs(
                bias=bias,
                bias_stride=strides.prompt_bias[2],
                mask=None,
                mask_stride=0,
                shift=0,
                window=0,
                first_column=0,
            )
            tile = GradientTile(q, do, lse, delta, queries, row_queries, seed, row * num_heads + query_head)
            dk, dv, dscores = key_gradient_step(
                dk, dv, k, v, tile, keys, pairs, length, factors, switches, False, False
            )
            if own.dbias is not None:
                dbias += tl.sum(dscores, 1)
            tile_number += tile_step
            over = tile_number >= tiles
            tile_number -= tl.where(over, tiles, 0)
            member += row_step + over.to(tl.int32)
            if STEPPED and not CHECK:
                q_first += tl.where(over, q_row, q_step)
                do_first += tl.where(over, do_row, do_step)
                place += tl.where(over, next_row.to(tl.int32), step.to(tl.int32))
            if HEADS_IN_LOOP > 1:
                over = member >= num_rows
                member -= tl.where(over, num_rows, 0)
                head += head_step + over.to(tl.int32)
                if STEPPED and not CHECK:
                    q_first += tl.where(over, q_head, 0)
                    do_first += tl.where(over, do_head, 0)
                    place += tl.where(over, next_head.to(tl.int32), 0)

    # Keys beyond the entry's length were read as zeros and attended to like any other: their sums are replaced.
    real = keys < length
    # Both slots lie alike.
    slot = split * (switches.GROUP // HEADS_IN_LOOP) + first_head % switches.GROUP // HEADS_IN_LOOP
    base = widen(slot) * slot_size + offset_of(own_strides.dk, entry, kv_head, start_p)
    keys_left = prompt_length - start_p
    dk = tl.where(real, dk * factors.scale, 0.0)
    store_tile(own.dk + base, own_strides.dk, keys_left, dk, BLOCK_P, switches.HEAD_DIM, BLOCK_D)
    dv = tl.where(real, dv, 0.0)
    store_tile(own.dv + base, own_strides.dk, keys_left, dv, BLOCK_P, switches.HEAD_DIM, BLOCK_D)
    if own.dbias is not None:
        dbias = tl.where(rows_p < length, dbias, 0.0)
        base = widen(split) * bias_slot_size + offset_of(own_strides.dbias, entry, first_head, rows_p)
        tl.store(own.dbias + base, dbias, mask=rows_p < prompt_length)
