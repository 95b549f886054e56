"""The attention dropout of the kernels written out as a mask, so that tests can replay it elsewhere."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ptv2_fast.kernels import launch, launcher
from ptv2_fast.kernels.tiles import dropout_keep, widen


@triton.jit
def _dropout_keep_mask_kernel(seed_ptr, keep_ptr, num_queries, num_columns, dropout_p, BLOCK: tl.constexpr):
    query = tl.program_id(0)
    stream = tl.program_id(1)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        keep = dropout_keep(tl.load(seed_ptr), stream, tl.full([1, 1], 0, tl.int32) + query, columns, dropout_p)
        offsets = (widen(stream) * num_queries + query) * num_columns + columns
        tl.store(keep_ptr + offsets, keep.to(tl.int8), mask=columns < num_columns)


def dropout_keep_mask(
    batch: int, heads: int, num_queries: int, num_columns: int, dropout_p: float, seed: torch.Tensor
) -> torch.Tensor:
    """The keep decisions of one call, (B, H, N, P + M) bool: prompt key p is column p, text key j is column P + j.

    Args:
        batch, heads, num_queries, num_columns: the sizes B, H, N and P + M; for packed rows N is the longest row.
        dropout_p: probability of dropping.
        seed: int64 tensor of one element, as given to `prompt_attention_forward`.
    """
    keep = launch.allocate((batch, heads, num_queries, num_columns), torch.int8, seed.device)
    launch.run(
        _dropout_keep_mask_kernel,
        (num_queries, batch * heads),
        seed.device,
        (seed, keep),
        launcher.constants(num_queries=num_queries, num_columns=num_columns, dropout_p=float(dropout_p), BLOCK=128),
    )
    return keep.bool()
