"""Where a program that owns keys finds its next tile of queries: places, and steps from one to the next.

Places in q and do take 64 bits, and a product of those in a loop tens of instructions; steps are sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptv2_fast.kernels.tiles import widen


@triton.jit
def statistics_place(strides, outer, head, row):
    """Element offset of (outer, head, row) in lse and delta, in 32 bits: theirs is one number where q, o and do have d.

    2^31 of them would be of a q, an o and a do of 64 GiB each and more.
    """
    return (outer * strides[0] + head * strides[1] + row * strides[2]).to(tl.int32)


@triton.jit
def tile_statistics(lse, delta, rows_left, BLOCK: tl.constexpr, CHECK: tl.constexpr):
    """(lse in powers of two, delta) of a tile of queries, pointers of which are given.

    Of those from `rows_left` on (if CHECK) lse is +inf: their probabilities become 0. Behind the last one is memory for
    a whole tile: loads without a mask are copied ahead by an instruction each; a predicate costs seven more for each.
    """
    own_lse = tl.load(lse)
    own_delta = tl.load(delta)
    if CHECK:
        there = tl.arange(0, BLOCK) < rows_left
        own_lse = tl.where(there, own_lse, float("inf"))
        own_delta = tl.where(there, own_delta, 0.0)
    return own_lse, own_delta


@triton.jit
def steps_of(strides, num_blocks, BLOCK: tl.constexpr):
    """How far a block of queries stands from the next: of its head; and, behind a head's last one, of the next head."""
    inside = widen(strides[2]) * BLOCK
    return inside, widen(strides[1]) - (num_blocks - 1) * inside


@triton.jit
def mixed_radix(number, tiles, rows):
    """`number` as (head, row, tile), of which a head has `rows` rows and a row `tiles` tiles; (0, 0, 0) without any."""
    tiles = tl.maximum(tiles, 1)
    rows = tl.maximum(rows, 1)
    return number // tiles // rows, number // tiles % rows, number % tiles


@triton.jit
def item_steps(strides, radix, BLOCK: tl.constexpr):
    """How far an item stands from the program's next: in its row; in a row further; and what a head further adds.

    radix: the step as (tiles, rows, heads), tiles of a row, rows of a head.
    """
    tile_step, row_step, head_step, tiles, num_rows = radix
    tile = widen(strides[2]) * BLOCK
    row = widen(strides[0])
    step = tile * tile_step + row * row_step + widen(strides[1]) * head_step
    return step, step + row - tile * tiles, widen(strides[1]) - row * num_rows
