"""Where the gradients of queries, keys and values lie in memory."""

from __future__ import annotations

import torch

from ptv2_fast.kernels import launch

_Three = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def allocate_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, of_query: bool, of_text: bool) -> _Three:
    """Fresh memory for dq, dk and dv, laid out as the output is; None for dq, or for the others, if not asked for.

    Args:
        q, k, v: (B, H, N, d) and (B, Hkv, M, d), or packed (T, H, d) and (T, Hkv, d).
    """
    dq = launch.allocate_heads(q) if of_query else None
    if not of_text:
        return dq, None, None
    return dq, launch.allocate_heads(k), launch.allocate_heads(v)
