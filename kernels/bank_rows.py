"""Which rows of a batch use which prompt of a bank, in one launch: a stable counting sort."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ptv2_fast.kernels import launch, launcher

_BLOCK = 64


@triton.jit(do_not_specialize=("num_rows", "num_entries"))
def _rows_by_entry_kernel(index_ptr, order_ptr, bounds_ptr, num_rows, num_entries, BLOCK: tl.constexpr):
    # A program counts, for each of its rows, those that come before it, and for each of its entries the rows of others
    # before it: the one number is used as a row's and as an entry's.
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.load(index_ptr + mine, mask=mine < num_rows, other=0).to(tl.int32)
    place = tl.zeros([BLOCK], dtype=tl.int32)
    bound = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, num_rows, BLOCK):
        others = start + tl.arange(0, BLOCK)
        there = (others < num_rows)[None, :]
        theirs = tl.load(index_ptr + others, mask=others < num_rows, other=0).to(tl.int32)[None, :]
        before = (theirs < entry[:, None]) | ((theirs == entry[:, None]) & (others[None, :] < mine[:, None]))
        place += tl.sum((there & before).to(tl.int32), 1)
        bound += tl.sum((there & (theirs < mine[:, None])).to(tl.int32), 1)
    tl.store(order_ptr + place, mine, mask=mine < num_rows)
    tl.store(bounds_ptr + mine, bound, mask=mine <= num_entries)


def rows_by_entry(index: torch.Tensor, num_entries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows sorted by the entry they use, those of one entry in their order, and where each entry's begin and end.

    Args:
        index: (B,) integers, the entry of each row, 0 <= index < num_entries.
        num_entries: R.
    Returns:
        (order (B,), bounds (R + 1,)), both int32: entry r is used by rows order[bounds[r] : bounds[r + 1]].
    """
    num_rows = index.shape[0]
    order = launch.allocate((num_rows,), torch.int32, index.device)
    bounds = launch.allocate((num_entries + 1,), torch.int32, index.device)
    launch.run(
        _rows_by_entry_kernel,
        (triton.cdiv(max(num_rows, num_entries + 1), _BLOCK),),
        index.device,
        (index, order, bounds),
        launcher.constants(num_rows=num_rows, num_entries=num_entries, BLOCK=_BLOCK),
    )
    return order, bounds
