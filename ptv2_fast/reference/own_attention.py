"""Text-book attention for MPNet and DeBERTa, whose scores have a term for the distance of two tokens.

A prompt stands farther in front of the text than any distance that counts: each query sees it in the bucket of the
farthest token before it. A text token in turn stands that far behind a prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ptv2_fast.reference.prefix import PrefixByCall

# Any number that no text has so many tokens as.
_FAR = 10**6


def run_layer(backbone: nn.Module, index: int, rows: Tensor, mask: Tensor, prompt_length: int) -> Tensor:
    """Run layer ``index`` on (B, P+N, D) rows, of which the first P are prompts.

    Args:
        mask: (B, 1 or H, P+N, P+N), added to the scores.
    """
    slots = torch.arange(rows.shape[1], device=rows.device) - prompt_length
    distance = slots[:, None] - slots[None, :]  # query - key
    prompt = slots < 0
    distance = distance.masked_fill(~prompt[:, None] & prompt[None, :], _FAR)
    distance = distance.masked_fill(prompt[:, None] & ~prompt[None, :], -_FAR)
    encoder = backbone.encoder
    if backbone.config.model_type == "mpnet":
        return encoder.layer[index](rows, mask, _bias(encoder, distance)[None])[0]
    if encoder.relative_attention and encoder.position_buckets > 0:
        from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

        distance = make_log_bucket_position(distance, encoder.position_buckets, encoder.max_relative_positions)
    embeddings = encoder.get_rel_embedding()
    return encoder.layer[index](rows, mask, relative_pos=distance.long()[None], rel_embeddings=embeddings)[0]


def after_layer(backbone: nn.Module, index: int, embedded: Tensor, hidden: Tensor) -> Tensor:
    """Apply what stands between layer ``index`` and the next one: DeBERTa may have a convolution after the first."""
    convolution = getattr(backbone.encoder, "conv", None)
    if index or convolution is None:
        return hidden
    return convolution(embedded, hidden, torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device))


@contextmanager
def plain_attention_in(backbone: nn.Module, prefix: PrefixByCall | None) -> Iterator[None]:
    """Let the backbone's attention modules run as they are written here, and put their own code back after.

    Args:
        prefix: hands out (keys, values, bias or None) of one layer after the other, or None where a layer has no
            prefix; None for no prefix at all.
    """
    encoder, replaced = backbone.encoder, []
    for layer in encoder.layer:
        if backbone.config.model_type == "mpnet":
            module = layer.attention.attn
            run: Callable = functools.partial(_biased, module, encoder, prefix)
        else:
            module = layer.attention.self
            run = functools.partial(_disentangled, module, prefix)
        replaced.append((module, module.__dict__.get("forward")))
        module.forward = run
    try:
        yield
    finally:
        for module, before in replaced:
            del module.forward
            if before is not None:
                module.forward = before


def _biased(
    module: nn.Module,
    encoder: nn.Module,
    prefix: PrefixByCall | None,
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Any = None,
    output_attentions: bool = False,
    **_: Any,
) -> tuple[Tensor]:
    """MPNet: softmax(q k^T / sqrt(d) + bias of the distance + mask) v."""
    query, key, value = (_split(module, project(hidden)) for project in (module.q, module.k, module.v))
    added = position_bias if attention_mask is None else position_bias + attention_mask
    entry = None if prefix is None else prefix.next()
    if entry is not None:
        key, value, added = _prepend(entry, key, value, added)
        far = _bias(encoder, torch.tensor([[_FAR]], device=hidden.device))  # [H, 1, 1]
        length = entry[0].shape[1]
        added = torch.cat([added[..., :length] + far, added[..., length:]], dim=-1)
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    return (module.o(_read(module, scores + added, value)),)


def _disentangled(
    module: nn.Module,
    prefix: PrefixByCall | None,
    hidden: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Any = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, None]:
    """DeBERTa: softmax((q k^T + q K[r]^T + k Q[r]^T) / sqrt(d * terms) + mask) v; r is the row of their distance."""
    query, key, value = (
        _split(module, project(hidden)) for project in (module.query_proj, module.key_proj, module.value_proj)
    )
    added = attention_mask
    if not added.is_floating_point():
        blocked = torch.zeros(added.shape, dtype=hidden.dtype, device=hidden.device)
        added = blocked.masked_fill(added == 0, torch.finfo(hidden.dtype).min)
    length = 0
    entry = None if prefix is None else prefix.next()
    if entry is not None:
        key, value, added = _prepend(entry, key, value, added)
        length = entry[0].shape[1]
    scores = query @ key.transpose(2, 3)
    terms = module.pos_att_type
    if module.relative_attention:
        span = module.pos_ebd_size
        relative = nn.functional.pad(relative_pos[0], (length, 0), value=_FAR)  # [N, P+N]
        rows = (relative + span).clamp(0, 2 * span - 1).expand(scores.shape)
        embeddings = module.pos_dropout(rel_embeddings)[None]
        if "c2p" in terms:
            project = module.key_proj if module.share_att_key else module.pos_key_proj
            by_query = query @ _split(module, project(embeddings)).transpose(2, 3)  # [B, H, N, distances]
            scores = scores + by_query.gather(3, rows)
        if "p2c" in terms:
            project = module.query_proj if module.share_att_key else module.pos_query_proj
            by_key = _split(module, project(embeddings)) @ key.transpose(2, 3)  # [B, H, distances, P+N]
            scores = scores + by_key.gather(2, rows)
    count = 1 + ("c2p" in terms) + ("p2c" in terms)
    scores = scores * (query.shape[-1] * count) ** -0.5
    return _read(module, scores + added, value), None


def _bias(encoder: nn.Module, distance: Tensor) -> Tensor:
    """MPNet's learned bias (H, ...) of distances query - key."""
    return encoder.relative_attention_bias(encoder.relative_position_bucket(-distance)).movedim(-1, 0)


def _split(module: nn.Module, states: Tensor) -> Tensor:
    return states.unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)


def _prepend(
    entry: tuple[Tensor, Tensor, Tensor | None], key: Tensor, value: Tensor, added: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Put a prefix in front of every row's own keys and values, and its bias in front of the mask."""
    prefix_key, prefix_value, bias = entry
    rows, num_heads, tokens = key.shape[:3]
    if bias is None:
        bias = key.new_zeros(num_heads, prefix_key.shape[1])
    bias = bias[None, :, None, :].expand(rows, -1, tokens, -1)
    key, value = (
        torch.cat([part.expand(rows, -1, -1, -1), own], dim=2)
        for part, own in ((prefix_key, key), (prefix_value, value))
    )
    return key, value, torch.cat([bias, added.expand(rows, num_heads, tokens, -1)], dim=3)


def _read(module: nn.Module, scores: Tensor, value: Tensor) -> Tensor:
    probabilities = nn.functional.dropout(scores.softmax(dim=-1), module.dropout.p, module.training)
    return (probabilities @ value).transpose(1, 2).flatten(2)
