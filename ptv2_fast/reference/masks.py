"""Positions and additive masks as the literal forms need them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def as_key_mask(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor:
    """Return the tokenizer's padding mask as booleans, all True where none was given.

    Args:
        attention_mask: (B, N), nonzero at real tokens, or None.
        input_ids: (B, N), gives the shape and the device.

    Returns:
        (B, N) bool.

    Raises:
        ValueError: ``input_ids`` is not 2-D, or ``attention_mask`` has another shape.
    """
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be (batch, tokens); got shape {tuple(input_ids.shape)}")
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}; "
            f"got {tuple(attention_mask.shape)}"
        )
    return attention_mask.bool()


def positions_from_mask(key_mask: Tensor) -> Tensor:
    """Count the real tokens of each row: positions[b, n] = max(0, sum(key_mask[b, :n + 1]) - 1).

    A row's tokens get 0, 1, 2, ... wherever its padding stands, which makes a left padded row,
    a right padded row and the row alone the same computation.

    Args:
        key_mask: (B, N) bool, True at real tokens.

    Returns:
        (B, N) int64.
    """
    return (key_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def additive_mask(
    key_mask: Tensor,
    prompt_length: int,
    *,
    causal: bool,
    dtype: torch.dtype,
    window: int | None = None,
) -> Tensor:
    """Build the mask over [prompts ; text] that is added to the attention scores.

    mask[b, 0, i, j] = 0 where row i may see key j, else the lowest finite number of ``dtype``.
    Prompts are never padding. With ``causal`` row i sees keys j <= i only, so every text row still
    sees every prompt. A window counts the text's own tokens, padding and prompts left out, and never
    hides a prompt, nor anything from one: prompts are in every window. The lowest number is finite,
    so a row that may see nothing gives no NaN.

    Args:
        key_mask: (B, N) bool, True at real tokens.
        prompt_length: P, the rows in front of the text; 0 gives a mask over the text only.
        causal: whether a row is kept from seeing the rows behind it.
        dtype: the floating-point type of the scores.
        window: how far a text row sees: keys less than ``window`` tokens back with ``causal``, at
            most ``window`` tokens away on either side without; None means any distance.

    Returns:
        (B, 1, P+N, P+N) of ``dtype``.
    """
    batch, num_tokens = key_mask.shape
    total = prompt_length + num_tokens
    visible = torch.cat([key_mask.new_ones(batch, prompt_length), key_mask], dim=1)
    visible = visible[:, None, None, :].expand(batch, 1, total, total)
    if causal:
        visible = visible & key_mask.new_ones(total, total).tril()
    if window is not None:
        rank = positions_from_mask(key_mask)  # [B, N]
        distance = rank[:, :, None] - rank[:, None, :]
        near = distance < window if causal else distance.abs() <= window
        everywhere = nn.functional.pad(near, (prompt_length, 0, prompt_length, 0), value=True)
        visible = visible & everywhere[:, None]
    blocked = torch.zeros(visible.shape, dtype=dtype, device=key_mask.device)
    return blocked.masked_fill(~visible, torch.finfo(dtype).min)
