"""One vector per row out of its tokens' vectors, wherever the row's padding stands."""

from __future__ import annotations

import torch
from torch import Tensor


def pool(hidden: Tensor, attention_mask: Tensor | None, how: str) -> Tensor:
    """One vector (B, D) per row of hidden (B, N, D): its "first" or "last" real token, or the "mean" of them.

    Args:
        attention_mask: (B, N), nonzero at real tokens; None means all are. A row without one gives its first token,
            or zeros for "mean".
    """
    if attention_mask is None:
        return {"first": hidden[:, 0], "last": hidden[:, -1], "mean": hidden.mean(1)}[how]
    real = attention_mask.bool()
    if how == "mean":
        weights = real.to(hidden.dtype)[..., None]
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    slots = torch.arange(real.shape[1], device=real.device)
    if how == "first":
        index = slots.masked_fill(~real, real.shape[1]).amin(-1) % real.shape[1]
    else:
        index = slots.masked_fill(~real, -1).amax(-1).clamp(min=0)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), index]
