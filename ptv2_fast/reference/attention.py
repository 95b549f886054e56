"""Prompt attention as the textbook writes it: the judge of every backend, in any floating dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    prompt_index: Tensor | None = None,
    prompt_lens: Tensor | None = None,
    prompt_bias: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    dropout_keep: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Copy the prompt to every row, concatenate, mask, softmax, multiply: nothing is fused or
    skipped.

    scores = [cap(scale * q prompt_k^T) + prompt_bias | cap(scale * q k^T) + bias + mask]
    out    = dropout(softmax(scores)) [prompt_v ; v]

    Args:
        q: (B, H, N, D), or (T, H, D) with `cu_seqlens`. Every tensor of one floating dtype.
        k, v: (B, Hkv, M, D), or (T, Hkv, D).
        prompt_k, prompt_v: a bank (R, Hkv, P, D).
        key_mask: (B, M), nonzero where a text key may be attended to.
        cu_seqlens: (S + 1,) row boundaries of the packed form.
        max_seqlen: accepted for the common signature; the literal form does not need it.
        prompt_index: (B,) or (S,): the bank entry of each row; None means entry 0.
        prompt_lens: (R,) number of valid tokens of each entry; None means P.
        prompt_bias: (R, H, P) added to the prompt's scores.
        bias: broadcastable to (B, H, N, M), added to the text's scores; may hold -inf.
        causal: query i stands at i + M - N and sees text keys up to there.
        window: with `causal`, position - key < window; otherwise |position - key| <= window.
        softcap: scores become softcap * tanh(scores / softcap) before any bias.
        dropout_p: probability of dropping an attention weight.
        dropout_keep: (B, H, N, P + M) bool, the keep mask to use instead of drawing one.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        (B, H, N, D) or (T, H, D); with `return_lse` also (B, H, N) or (H, T). A query that sees no
        key gives zeros and -inf.
    """
    options: dict[str, Any] = {
        "prompt_lens": prompt_lens,
        "causal": causal,
        "scale": scale,
        "dropout_p": dropout_p,
        "window": window,
        "softcap": softcap,
    }
    if cu_seqlens is None:
        index = prompt_index.long() if prompt_index is not None else q.new_zeros(q.shape[0]).long()
        out, lse = _dense(q, k, v, prompt_k, prompt_v, index, key_mask, prompt_bias, bias, dropout_keep, **options)
    else:
        bounds = cu_seqlens.tolist()
        outs, lses = [], []
        for row, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            part = slice(start, end)
            index = prompt_index[row : row + 1] if prompt_index is not None else cu_seqlens[:1] * 0
            one_q, one_k, one_v = (x[part].transpose(0, 1)[None] for x in (q, k, v))
            out, lse = _dense(
                one_q,
                one_k,
                one_v,
                prompt_k,
                prompt_v,
                index.long(),
                None,
                prompt_bias,
                None,
                dropout_keep,
                **options,
            )
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0])
        out = torch.cat(outs) if outs else q * 0
        lse = torch.cat(lses, dim=-1) if lses else q.new_zeros(q.shape[1], 0)
    return (out, lse) if return_lse else out


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    index: Tensor,
    key_mask: Tensor | None,
    prompt_bias: Tensor | None,
    bias: Tensor | None,
    dropout_keep: Tensor | None,
    *,
    prompt_lens: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """One padded batch; index (B,) names each row's bank entry."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    prompt_length = prompt_k.shape[2]
    group = q.shape[1] // k.shape[1]
    row_k = torch.cat([prompt_k[index], k], dim=2).repeat_interleave(group, dim=1)  # (B, H, P+M, D)
    row_v = torch.cat([prompt_v[index], v], dim=2).repeat_interleave(group, dim=1)
    # What no query sees may be NaN, which a weight of 0 would not undo.
    hidden = _hidden(index, prompt_lens, key_mask, prompt_length, num_keys)[:, None, :, None]
    row_k, row_v = row_k.masked_fill(hidden, 0.0), row_v.masked_fill(hidden, 0.0)
    scores = scale * (q @ row_k.transpose(-1, -2))  # (B, H, N, P+M)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    prompt_scores, text_scores = scores[..., :prompt_length], scores[..., prompt_length:]
    if prompt_bias is not None:
        prompt_scores = prompt_scores + prompt_bias[index][:, :, None, :].to(scores.dtype)
    if bias is not None:
        text_scores = text_scores + bias.to(scores.dtype)
    visible = _visible(num_queries, num_keys, causal, window, q.device)  # (N, M)
    text_scores = text_scores.masked_fill(~visible, float("-inf"))
    scores = torch.cat([prompt_scores, text_scores], dim=-1)
    scores = scores.masked_fill(hidden.transpose(-1, -2), float("-inf"))
    # Where no key is visible, softmax would be 0/0: such a query attends to nothing and gives
    # zeros.
    nothing = torch.isneginf(scores).all(dim=-1, keepdim=True)
    probs = torch.softmax(scores.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)
    lse = torch.logsumexp(scores.detach(), dim=-1)
    if dropout_keep is not None:
        probs = probs * dropout_keep / (1.0 - dropout_p)
    elif dropout_p > 0.0:
        probs = torch.dropout(probs, dropout_p, True)
    return probs @ row_v, lse


def _hidden(
    index: Tensor, prompt_lens: Tensor | None, key_mask: Tensor | None, prompt_length: int, num_keys: int
) -> Tensor:
    """(B, P + M) bool: the keys of each row that no query may see, prompts past their length and masked text."""
    lens = prompt_lens.long()[index] if prompt_lens is not None else torch.full_like(index, prompt_length)
    absent = torch.arange(prompt_length, device=index.device) >= lens[:, None]
    masked = ~key_mask.bool() if key_mask is not None else absent.new_zeros(len(index), num_keys)
    return torch.cat([absent, masked], dim=1)


def _visible(num_queries: int, num_keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """(N, M) bool: which text keys each query may see, by position alone."""
    position = torch.arange(num_queries, device=device)[:, None] + num_keys - num_queries
    key = torch.arange(num_keys, device=device)[None, :]
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    if causal:
        visible &= key <= position
        if window is not None:
            visible &= position - key < window
    elif window is not None:
        visible &= (position - key).abs() <= window
    return visible
