"""One vector per row out of its tokens' vectors, wherever the row's padding stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def pool(hidden: Tensor, attention_mask: Tensor | None, how: str, read: Tensor | None = None) -> Tensor:
    """One vector (B, D) per row of hidden (B, N, D): its "first" or "last" real token, or the "mean" of them.

    Args:
        attention_mask: (B, N), nonzero at real tokens; None means all are. A row without one gives its first token,
            or zeros for "mean".
        read: (B,) what `pooled_tokens` gives, where the caller knows it.
    """
    rows, tokens = hidden.shape[:2]
    if how == "mean":
        if attention_mask is None:
            return hidden.mean(1)
        weights = attention_mask.bool().to(hidden.dtype)[..., None]
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    if read is None:
        read = pooled_tokens(rows, tokens, attention_mask, how, hidden.device)
    return hidden.flatten(0, 1).index_select(0, read)


def pooled_tokens(rows: int, tokens: int, attention_mask: Tensor | None, how: str, device: torch.device) -> Tensor:
    """(B,) the token of the flattened (B, N) that each row's pooling reads: its "first" or its "last" real one.

    A row without a real token has its first.
    """
    begins = torch.arange(0, rows * tokens, tokens, device=device)
    if attention_mask is None:
        return begins if how == "first" else begins + (tokens - 1)
    if how == "first":
        # Of several largest ones the first.
        return begins + (attention_mask != 0).to(torch.uint8).argmax(-1)
    slots = torch.arange(tokens, device=device)
    return begins + slots.masked_fill(attention_mask == 0, 0).amax(-1)


def tokens_read(inputs: Mapping[str, Any], pooling: str) -> Tensor | None:
    """Which tokens of the flattened (B, N) a head reads that pools this way; None where it reads them all, and where
    the inputs are none that a model takes: it says so itself."""
    text = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if pooling == "mean" or not isinstance(text, Tensor) or text.dim() < 2 or not all(text.shape[:2]):
        return None
    rows, tokens = text.shape[:2]
    mask = inputs.get("attention_mask")
    if mask is not None and not (
        isinstance(mask, Tensor) and mask.shape == (rows, tokens) and mask.device == text.device
    ):
        return None
    return pooled_tokens(rows, tokens, mask, pooling, text.device)
