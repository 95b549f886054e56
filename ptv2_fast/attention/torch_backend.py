"""Prompt attention through PyTorch's SDPA: any device, and the CPU's fast path.

Keys and values of the prompt are concatenated in front of the text's here, inside attention, and
nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_fast.attention.checks import readable

# Integers as wide as each floating dtype, by its bytes.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    # Indexing reads uint8 as a mask, and takes no 16-bit integers.
    prompt_index = prompt_index.long() if prompt_index is not None else None
    options: dict[str, Any] = {
        "prompt_lens": prompt_lens,
        "prompt_bias": prompt_bias,
        "causal": causal,
        "scale": scale,
        "dropout_p": dropout_p,
        "window": window,
        "softcap": softcap,
        "return_lse": return_lse,
    }
    if cu_seqlens is None:
        out, lse = _dense(q, k, v, prompt_k, prompt_v, prompt_index, key_mask, bias, **options)
    else:
        out, lse = _packed(q, k, v, prompt_k, prompt_v, prompt_index, cu_seqlens, **options)
    return (out, lse) if return_lse else out


# Lengths are numbers here: compiled, this would be compiled again for each one that comes.
@torch.compiler.disable
def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    prompt_index: Tensor | None,
    cu_seqlens: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Rows one by one, without any padding: SDPA knows no packed form on every device."""
    parts = []
    bounds = cu_seqlens.tolist()
    for row, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        one_q, one_k, one_v = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))  # (1, H, n, D)
        index = prompt_index[row : row + 1] if prompt_index is not None else None
        parts.append(_dense(one_q, one_k, one_v, prompt_k, prompt_v, index, None, None, **options))
    wants_lse = options["return_lse"]
    if not parts:
        return q * 0, q.new_zeros(q.shape[1], 0, dtype=torch.float32) if wants_lse else None
    out = torch.cat([out[0].transpose(0, 1) for out, _ in parts])
    return out, torch.cat([lse[0] for _, lse in parts], dim=-1) if wants_lse else None


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    index: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    *,
    prompt_lens: Tensor | None,
    prompt_bias: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    window: int | None,
    softcap: float | None,
    return_lse: bool,
) -> tuple[Tensor, Any]:
    """One padded batch: (B, H, N, D) and (B, H, N), which may be None unless it is asked for."""
    batch, num_queries, num_keys = q.shape[0], q.shape[2], k.shape[2]
    prompt_length = prompt_k.shape[2]
    real = _hiding(_real_prompts(prompt_lens, index, prompt_length))
    attended = _hiding(key_mask.bool() if key_mask is not None else None)
    row_k, row_v = (
        _joined(_rows(bank, index, batch), text, real, attended) for bank, text in ((prompt_k, k), (prompt_v, v))
    )
    prompt_part = _prompt_part(real, prompt_bias, index, q)
    text_part = _text_part(attended, bias, causal, window, num_queries, num_keys, q)
    mask = _join(prompt_part, text_part, prompt_length, num_keys, q.dtype)
    blind = None
    if mask is not None and (prompt_length == 0 or real is not None):
        mask, blind = _open_blind_rows(mask)
    if row_k.shape[2] == 0 or q.numel() == 0:
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
    elif softcap is None and not return_lse:
        out = F.scaled_dot_product_attention(
            q,
            row_k,
            row_v,
            attn_mask=mask,
            dropout_p=dropout_p,
            scale=scale,
            enable_gqa=bool(q.shape[1] != k.shape[1]),  # sizes are tensors under torch.jit.trace
        )
        lse = None
    else:
        out, lse = _explicit(q, row_k, row_v, mask, scale, dropout_p, softcap)
    if blind is not None:
        out = out.masked_fill(blind, 0.0)
        lse = lse.masked_fill(blind[..., 0], float("-inf")) if lse is not None else None
    return out, lse


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


def _rows(bank: Tensor, index: Tensor | None, batch: int) -> Tensor:
    """(B, Hkv, P, D): each row's prompt, as a view of stride 0 where all rows share one."""
    return bank.expand(batch, -1, -1, -1) if index is None else bank[index]


def _real_prompts(prompt_lens: Tensor | None, index: Tensor | None, prompt_length: int) -> Tensor | None:
    """(B or 1, P) bool: which of its prompt's tokens each row has; None where it has all of them."""
    if prompt_lens is None:
        return None
    lens = prompt_lens.long() if index is None else prompt_lens.long()[index]
    return torch.arange(prompt_length, device=lens.device) < lens[:, None]


def _hiding(kept: Tensor | None) -> Tensor | None:
    """`kept`, or None where it leaves nothing out, as far as looking is free."""
    return None if kept is None or readable(kept) and bool(kept.all()) else kept


def _joined(prompt: Tensor, text: Tensor, real: Tensor | None, attended: Tensor | None) -> Tensor:
    """(B, Hkv, P + M, D): each row's prompt, then its text; zeros where `real` or `attended`, (B or 1, ...), is false.

    A weight of 0 would not undo a NaN that stands there.
    """
    length = prompt.shape[2]
    if length == 0:
        if attended is None:
            return text
        kept = text.clone()
        _keep(kept, attended)
        return kept
    joined = torch.cat([prompt, text], dim=2)
    if real is not None:
        _keep(joined[:, :, :length], real)
    if attended is not None:
        _keep(joined[:, :, length:], attended)
    return joined


def _keep(part: Tensor, kept: Tensor) -> None:
    """Zero the tokens of `part`, (B, Hkv, L, D), that `kept`, (B or 1, L) bool, leaves out.

    Unknown to autograd: weights are 0 there, and so are gradients.
    """
    part, kept = part.detach(), kept[:, None, :, None]
    if readable(part):
        # By bits: masked_fill_ takes ten times as long on a CPU.
        bits = _BITS[part.element_size()]
        part.view(bits).bitwise_and_(-kept.to(bits))
    else:
        part.masked_fill_(~kept, 0.0)


def _prompt_part(real: Tensor | None, prompt_bias: Tensor | None, index: Tensor | None, q: Tensor) -> Tensor | None:
    """(B or 1, H or 1, 1, P), bool or additive; None where every query sees the prompt as it is."""
    part = real[:, None, None, :] if real is not None else None
    if prompt_bias is not None:
        row_bias = (prompt_bias if index is None else prompt_bias[index])[:, :, None, :].to(q.dtype)
        part = row_bias if part is None else row_bias.masked_fill(~part, float("-inf"))
    return part


def _text_part(
    attended: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    window: int | None,
    num_queries: int,
    num_keys: int,
    q: Tensor,
) -> Tensor | None:
    """(B or 1, H or 1, N or 1, M), bool or additive; None where every query sees every text key."""
    part = attended[:, None, None, :] if attended is not None else None
    # One query at the end of its row sees everything that is there.
    if (causal and num_queries > 1) or window is not None:
        position = torch.arange(num_queries, device=q.device)[:, None] + num_keys - num_queries
        distance = position - torch.arange(num_keys, device=q.device)[None, :]  # (N, M)
        visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            visible &= distance < window if causal else distance.abs() <= window
        part = visible if part is None else part & visible
    if bias is not None:
        bias = bias.to(q.dtype)
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
        additive = mask.dtype != torch.bool
        scores = scores + mask if additive else scores.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    probs = torch.exp(scores - lse.masked_fill(torch.isneginf(lse), 0.0)[..., None])
    probs = F.dropout(probs, dropout_p).to(q.dtype)
    return probs @ row_v, lse.detach()
