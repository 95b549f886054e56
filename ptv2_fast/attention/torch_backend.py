"""Prompt attention through PyTorch's SDPA: any device, and the CPU's fast path.

Keys and values of the prompt are concatenated in front of the text's here, inside attention, and
nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_fast.attention.row_groups import RowGroup, RowGroups
from ptv2_fast.attention.visible import Visible, visible


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    *,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    prompt_index: Tensor | None,
    prompt_lens: Tensor | None,
    prompt_bias: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    window: int | None,
    softcap: float | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Serve the contract of `ptv2_fast.attention.prompt_attention`, its arguments checked and the prompt a bank."""
    numbers = (scale, dropout_p, softcap, return_lse)
    sight: dict[str, Any] = {"prompt_lens": prompt_lens, "prompt_bias": prompt_bias, "causal": causal, "window": window}
    if cu_seqlens is None:
        seen = visible(q, q.shape[2], k.shape[2], prompt_k.shape[2], prompt_index, key_mask, bias, **sight)
        out, lse = attend(q, k, v, prompt_k, prompt_v, seen, *numbers)
    else:
        out, lse = _attend_packed(q, k, v, prompt_k, prompt_v, prompt_index, cu_seqlens, sight, *numbers)
    return (out, lse) if return_lse else out


# Lengths are numbers here: compiled, this would be compiled again for each one that comes.
@torch.compiler.disable
def _attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    prompt_index: Tensor | None,
    cu_seqlens: Tensor,
    sight: dict[str, Any],
    *numbers: Any,
) -> tuple[Tensor, Tensor | None]:
    seen = PackedVisible.of(q, prompt_k.shape[2], prompt_index, cu_seqlens, **sight)
    return attend_packed(q, k, v, prompt_k, prompt_v, seen, *numbers)


@dataclass(frozen=True)
class PackedVisible:
    """What the queries of packed rows see.

    Attributes:
        groups: the rows in few padded batches.
        seen: what the queries of each see.
    """

    groups: RowGroups
    seen: list[Visible]

    @classmethod
    def of(
        cls, like: Tensor, prompt_length: int, prompt_index: Tensor | None, cu_seqlens: Tensor, **sight: Any
    ) -> PackedVisible:
        """What queries like (T, H, D) see of a bank of prompts and of their own rows."""
        width = like.shape[1] * like.shape[2]
        groups = RowGroups.of(cu_seqlens.tolist(), width, prompt_length, like.device)
        return cls(groups, [_seen_by(group, like, prompt_length, prompt_index, **sight) for group in groups.groups])


def _seen_by(group: RowGroup, like: Tensor, prompt_length: int, prompt_index: Tensor | None, **sight: Any) -> Visible:
    index = None if prompt_index is None else prompt_index.long()[list(group.rows)]
    # Where attention is causal, what stands behind a row's tokens is seen by none of them.
    attended = None if sight["causal"] else group.attended(like.device)
    seen = visible(like, group.longest, group.longest, prompt_length, index, attended, None, **sight)
    # Padding holds the row's own last token: there is nothing to hide from the row.
    return replace(seen, text=None)


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    packed: PackedVisible,
    scale: float,
    dropout_p: float,
    softcap: float | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Rows in groups of about one length, (T, H, D) and (H, T) or None: SDPA knows no packed form on every device."""
    if not packed.seen:
        return q * 0, q.new_zeros(q.shape[1], 0, dtype=torch.float32) if return_lse else None
    spread = packed.groups.spread
    parts = [
        attend(own_q, own_k, own_v, prompt_k, prompt_v, seen, scale, dropout_p, softcap, return_lse)
        for own_q, own_k, own_v, seen in zip(spread(q), spread(k), spread(v), packed.seen, strict=True)
    ]
    out = packed.groups.collect([out.transpose(1, 2) for out, _ in parts])
    if not return_lse:
        return out, None
    return out, packed.groups.collect([lse.transpose(1, 2) for _, lse in parts]).transpose(0, 1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    seen: Visible,
    scale: float,
    dropout_p: float,
    softcap: float | None,
    return_lse: bool,
) -> tuple[Tensor, Any]:
    """One padded batch: (B, H, N, D) and (B, H, N), which may be None unless it is asked for.

    Args:
        prompt_k, prompt_v: a bank, or without its first axis where all rows share one prompt.
    """
    row_k, row_v = _joined(prompt_k, k, seen), _joined(prompt_v, v, seen)
    if row_k.shape[2] == 0 or q.numel() == 0:
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
    elif softcap is None and not return_lse:
        out = F.scaled_dot_product_attention(
            q,
            row_k,
            row_v,
            attn_mask=seen.mask,
            dropout_p=dropout_p,
            scale=scale,
            enable_gqa=bool(q.shape[1] != k.shape[1]),  # sizes are tensors under torch.jit.trace
        )
        lse = None
    else:
        out, lse = _explicit(q, row_k, row_v, seen.mask, scale, dropout_p, softcap)
    if seen.blind is not None:
        out = out.masked_fill(seen.blind, 0.0)
        lse = lse.masked_fill(seen.blind[..., 0], float("-inf")) if lse is not None else None
    return out, lse


def _joined(bank: Tensor, text: Tensor, seen: Visible) -> Tensor:
    """(B, Hkv, P + M, D): each row's prompt, then its text; zeros where a token is not there."""
    length = bank.shape[-2]
    hides = seen.prompt is not None or seen.text is not None
    if length == 0:
        joined = text.clone() if hides else text
    else:
        # A view of stride 0 where all rows share one.
        prompt = bank.expand(text.shape[0], -1, -1, -1) if seen.index is None else bank[seen.index]
        joined = torch.cat([prompt, text], dim=2)
    if hides:
        seen.zero_hidden(joined, length)
    return joined


def _explicit(
    q: Tensor, row_k: Tensor, row_v: Tensor, mask: Tensor | None, scale: float, dropout_p: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The score matrix written out, softmax in float32: what SDPA does not offer (softcap, log-sum-exp)."""
    group = q.shape[1] // row_k.shape[1]
    row_k = row_k.repeat_interleave(group, dim=1)
    row_v = row_v.repeat_interleave(group, dim=1)
    precision = torch.promote_types(q.dtype, torch.float32)
    scores = scale * (q @ row_k.transpose(-1, -2)).to(precision)  # (B, H, N, P+M)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, dim=-1)
    probs = torch.exp(scores - lse.masked_fill(torch.isneginf(lse), 0.0)[..., None])
    probs = F.dropout(probs, dropout_p).to(q.dtype)
    return probs @ row_v, lse.detach()
