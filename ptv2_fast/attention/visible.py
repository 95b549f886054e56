"""What the queries of a batch see of [prompt | text], as SDPA takes it: the same for all layers that are alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptv2_fast.attention.checks import readable

# Integers as wide as each floating dtype, by its bytes.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Visible:
    """What the queries of a padded batch see.

    Attributes:
        index: (B,) int64: each row's entry of the prompt bank; None where all rows share one prompt.
        prompt, text: (B or 1, 1, P or M, 1), the tokens of each that are there: integers as wide as the queries' dtype,
            all ones or all zeros, where values can be looked at, else bool; None where all tokens are.
        mask: (B or 1, H or 1, N or 1, P + M), added to scores; None where every query sees every key.
        blind: (B or 1, H or 1, N or 1, 1) bool: queries that see no key and run as if they saw all of them; their
            output is to be zero. None where there is none, as far as looking is free.
    """

    index: Tensor | None
    prompt: Tensor | None
    text: Tensor | None
    mask: Tensor | None
    blind: Tensor | None

    def zero_hidden(self, joined: Tensor, prompt_length: int) -> None:
        """Zero the tokens of keys or values (B, Hkv, P + M, D) that are not there: a weight of 0 would not undo a NaN.

        Unknown to autograd: weights are 0 there, and so are gradients.
        """
        joined = joined.detach()
        if self.prompt is not None:
            _zero_others(joined[:, :, :prompt_length], self.prompt)
        if self.text is not None:
            _zero_others(joined[:, :, prompt_length:] if prompt_length else joined, self.text)


def _zero_others(part: Tensor, kept: Tensor) -> None:
    if kept.dtype == torch.bool:
        part.masked_fill_(~kept, 0.0)
    else:
        # masked_fill_ takes ten times as long on a CPU.
        part.view(kept.dtype).bitwise_and_(kept)


def visible(
    like: Tensor,
    num_queries: int,
    num_keys: int,
    prompt_length: int,
    index: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    *,
    prompt_lens: Tensor | None,
    prompt_bias: Tensor | None,
    causal: bool,
    window: int | None,
) -> Visible:
    """What N queries a row see of P prompt tokens and M text keys; the other arguments are `prompt_attention`'s, with a
    bank of prompts.

    Args:
        like: of the queries' dtype and device.
    """
    index = None if index is None else index.long()  # indexing reads uint8 as a mask, and takes no 16-bit integers
    real = _hiding(_real_prompts(prompt_lens, index, prompt_length))
    attended = _hiding(None if key_mask is None else key_mask.bool())
    prompt_part = _prompt_part(real, prompt_bias, index, like.dtype)
    text_part = _text_part(attended, bias, causal, window, num_queries, num_keys, like)
    mask = _join(prompt_part, text_part, prompt_length, num_keys, like.dtype)
    blind = None
    if mask is not None and (prompt_length == 0 or real is not None):
        mask, blind = _open_blind_rows(mask)
    if mask is not None and mask.dtype == torch.bool:
        # SDPA would write these numbers anew in every layer.
        mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, float("-inf"))
    return Visible(index, _kept(real, like.dtype), _kept(attended, like.dtype), mask, blind)


def _hiding(tokens: Tensor | None) -> Tensor | None:
    """`tokens`, or None where it leaves nothing out, as far as looking is free."""
    return None if tokens is None or readable(tokens) and bool(tokens.all()) else tokens


def _kept(tokens: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(B or 1, L) bool as (B or 1, 1, L, 1) for tensors of a dtype."""
    if tokens is None:
        return None
    tokens = tokens[:, None, :, None]
    return -tokens.to(_BITS[dtype.itemsize]) if readable(tokens) else tokens


def _open_blind_rows(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Let queries that see no key see all of them; and which those are, (B or 1, H or 1, N or 1, 1), or None.

    With an empty prompt a query may see nothing. PyTorch's kernels do not agree on what that gives, and the gradient of
    an empty softmax is NaN: such rows run as if unmasked and their output is then set to zero.
    """
    sees = mask if mask.dtype == torch.bool else mask > float("-inf")
    blind = ~sees.any(-1, keepdim=True)
    # Where looking is free, the rule is that there is no such row.
    if readable(mask) and not bool(blind.any()):
        return mask, None
    return (mask | blind if mask.dtype == torch.bool else mask.masked_fill(blind, 0.0)), blind


def _real_prompts(prompt_lens: Tensor | None, index: Tensor | None, prompt_length: int) -> Tensor | None:
    """(B or 1, P) bool: which of its prompt's tokens each row has; None where it has all of them."""
    if prompt_lens is None:
        return None
    lens = prompt_lens.long() if index is None else prompt_lens.long()[index]
    return torch.arange(prompt_length, device=lens.device) < lens[:, None]


def _prompt_part(
    real: Tensor | None, prompt_bias: Tensor | None, index: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """(B or 1, H or 1, 1, P), bool or additive; None where every query sees the prompt as it is."""
    part = real[:, None, None, :] if real is not None else None
    if prompt_bias is not None:
        row_bias = (prompt_bias if index is None else prompt_bias[index])[:, :, None, :].to(dtype)
        part = row_bias if part is None else row_bias.masked_fill(~part, float("-inf"))
    return part


def _text_part(
    attended: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    window: int | None,
    num_queries: int,
    num_keys: int,
    like: Tensor,
) -> Tensor | None:
    """(B or 1, H or 1, N or 1, M), bool or additive; None where every query sees every text key."""
    part = attended[:, None, None, :] if attended is not None else None
    # One query at the end of its row sees everything that is there.
    if (causal and num_queries > 1) or window is not None:
        position = torch.arange(num_queries, device=like.device)[:, None] + num_keys - num_queries
        distance = position - torch.arange(num_keys, device=like.device)[None, :]  # (N, M)
        near = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            near &= distance < window if causal else distance.abs() <= window
        part = near if part is None else part & near
    if bias is not None:
        bias = bias.to(like.dtype)
        part = bias if part is None else bias.masked_fill(~part, float("-inf"))
    return part


def _join(
    prompt_part: Tensor | None, text_part: Tensor | None, prompt_length: int, num_keys: int, dtype: torch.dtype
) -> Tensor | None:
    """One mask over [prompt | text] from the two parts, bool unless one of them is additive."""
    if prompt_part is None and text_part is None:
        return None
    if prompt_length == 0 and text_part is not None:
        return text_part if text_part.dim() == 4 else text_part[None, None]
    sides = [(prompt_part, prompt_length), (text_part, num_keys)]
    additive = any(part is not None and part.dtype != torch.bool for part, _ in sides)
    like = next(part for part, _ in sides if part is not None)
    filled = []
    for part, length in sides:
        if part is None:
            shape = (1, 1, 1, length)
            make = torch.zeros if additive else torch.ones
            part = make(shape, dtype=dtype if additive else torch.bool, device=like.device)
        elif part.dim() == 2:
            part = part[None, None]
        if additive and part.dtype == torch.bool:
            part = torch.zeros_like(part, dtype=dtype).masked_fill(~part, float("-inf"))
        filled.append(part)
    leading = torch.broadcast_shapes(*(part.shape[:-1] for part in filled))
    return torch.cat([part.expand(*leading, part.shape[-1]) for part in filled], dim=-1)
