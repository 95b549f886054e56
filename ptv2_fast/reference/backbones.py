"""What the literal forms must know about a Hugging Face backbone, and their own plain attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

ENCODERS = ("bert", "roberta")
ROTARY_DECODERS = ("llama", "qwen3")
FAMILIES = (*ENCODERS, "gpt2", *ROTARY_DECODERS)

# The name under which the attention below is known to transformers while a literal form runs.
_ATTENTION_NAME = "ptv2_fast_literal"


def check_backbone(backbone: nn.Module) -> str:
    """Return the backbone's family, or say why the literal forms do not cover it.

    Raises:
        ValueError: another family, a model with a head on top, a BERT set up as a decoder,
            sliding-window layers, or gradient checkpointing in training mode.
    """
    config = getattr(backbone, "config", None)
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        raise ValueError(f"backbone must be one of {', '.join(FAMILIES)}; got {family!r}")
    if not any(hasattr(backbone, name) for name in ("encoder", "h", "layers")):
        raise ValueError(
            f"backbone must be the model without a head (model.base_model); "
            f"got {type(backbone).__name__}"
        )
    if getattr(config, "is_decoder", False) and family in ENCODERS:
        raise ValueError(f"backbone must be an encoder; got a {family} with is_decoder=True")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError("backbone must have full attention only; got sliding-window layers")
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in backbone.modules())
    if backbone.training and checkpointed:
        # The recomputation would run after the attention implementation has been put back.
        raise ValueError("backbone must not use gradient checkpointing in the literal form")
    return family


def is_causal(backbone: nn.Module) -> bool:
    """Say whether a token is kept from seeing the tokens behind it."""
    return backbone.config.model_type not in ENCODERS


def uses_rotary(backbone: nn.Module) -> bool:
    """Say whether positions enter through rotated queries and keys, not through a table."""
    return backbone.config.model_type in ROTARY_DECODERS


def first_position(backbone: nn.Module) -> int:
    """Return the position id of a row's first token: RoBERTa counts from its padding_idx + 1."""
    if backbone.config.model_type == "roberta":
        return backbone.embeddings.padding_idx + 1
    return 0


def layers_of(backbone: nn.Module) -> nn.ModuleList:
    """Return the transformer layers, in the order in which they run."""
    family = backbone.config.model_type
    if family in ENCODERS:
        return backbone.encoder.layer
    return backbone.h if family == "gpt2" else backbone.layers


def embed(
    backbone: nn.Module, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None
) -> Tensor:
    """Run the embedding step as the backbone's own forward does it: (B, N) ids -> (B, N, D)."""
    family = backbone.config.model_type
    if family in ENCODERS:
        return backbone.embeddings(
            input_ids=input_ids, position_ids=position_ids, token_type_ids=token_type_ids
        )
    if family == "gpt2":
        return backbone.drop(backbone.wte(input_ids) + backbone.wpe(position_ids))
    return backbone.embed_tokens(input_ids)


def run_layer(
    backbone: nn.Module, layer: nn.Module, hidden: Tensor, mask: Tensor, positions: Tensor
) -> Tensor:
    """Run one layer on (B, M, D) hidden states with a (B, 1 or H, M, M) additive mask.

    ``positions`` (B, M) is what rotary layers turn queries and keys by; the others do not read it.
    """
    if uses_rotary(backbone):
        tables = backbone.rotary_emb(hidden, positions)
        output = layer(
            hidden, attention_mask=mask, position_ids=positions, position_embeddings=tables
        )
    else:
        output = layer(hidden, attention_mask=mask)
    return output[0] if isinstance(output, tuple) else output


def final_norm(backbone: nn.Module, hidden: Tensor) -> Tensor:
    """Apply what stands between the last layer and the heads; nothing on post-norm encoders."""
    family = backbone.config.model_type
    if family in ENCODERS:
        return hidden
    return backbone.ln_f(hidden) if family == "gpt2" else backbone.norm(hidden)


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    literal_prefix: dict[int, tuple[Tensor, Tensor, Tensor | None]] | None = None,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Text-book attention in the dtype of its input, in transformers' attention interface.

    out = dropout(softmax(scaling * q k^T + mask)) v. transformers' own eager attention takes
    Llama's and Qwen3's softmax in float32, so it cannot judge in float64.

    Args:
        query: (B, H, N, d).
        key, value: (B, Hkv, N, d); each key head serves H / Hkv query heads.
        attention_mask: (B, 1 or H, N, N), added to the scores.
        literal_prefix: for layers by index, keys and values (Hkv, P, d) that stand in front of the
            text's own in every row of the batch, and a bias (H, P) on their scores or None.

    Returns:
        out (B, N, H, d) and the probabilities (B, H, N, P+N).
    """
    if literal_prefix is not None and module.layer_idx in literal_prefix:
        prefix_key, prefix_value, bias = literal_prefix[module.layer_idx]
        batch, num_heads, num_queries = query.shape[:3]
        key = torch.cat([prefix_key.expand(batch, -1, -1, -1), key], dim=2)
        value = torch.cat([prefix_value.expand(batch, -1, -1, -1), value], dim=2)
        prefix_length = prefix_key.shape[1]
        if bias is None:
            bias = query.new_zeros(num_heads, prefix_length)
        prefix_mask = bias[None, :, None, :].expand(batch, -1, num_queries, -1)
        text_mask = attention_mask.expand(-1, num_heads, -1, -1)
        attention_mask = torch.cat([prefix_mask, text_mask], dim=3)

    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1)
    value = value.repeat_interleave(group, dim=1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.dropout(scores.softmax(dim=-1), dropout, module.training)
    return (probabilities @ value).transpose(1, 2), probabilities


@contextmanager
def plain_attention_in(backbone: nn.Module) -> Iterator[None]:
    """Let the backbone run :func:`plain_attention`, and put its own implementation back after."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION_NAME, plain_attention)
    config = backbone.config
    before = config._attn_implementation
    config._attn_implementation = _ATTENTION_NAME
    try:
        yield
    finally:
        config._attn_implementation = before
