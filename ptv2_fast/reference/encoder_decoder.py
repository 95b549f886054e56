"""The literal forms on encoder-decoders (T5, BART, mBART): in every stack concat, mask, layer, slice.

Layers are numbered as prompts are: the encoder's self-attention 0..Le-1, the decoder's Le..Le+Ld-1, the decoder's
cross-attention Le+Ld..Le+2Ld-1. Padding may stand anywhere in either text: positions and distances count real tokens.

T5 adds a learned bias for the distance of two tokens. A deep prompt and a prefix stand so far in front of the text that
their distance falls into the last bucket; virtual tokens of a shallow prompt stand right in front of it.

Source: P-Tuning v2 (Liu et al., 2022), section 3; prompt tuning (Lester et al., 2021).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ptv2_fast.reference import backbones
from ptv2_fast.reference.masks import additive_mask, as_key_mask, positions_from_mask
from ptv2_fast.reference.prefix import PrefixByCall

# The model types whose stacks are called as the forms here call them.
FAMILIES = ("t5", "mt5", "bart", "mbart")
_FAR = 10**6
Pair = tuple[Tensor, Tensor]
Biases = Mapping[int, Tensor]
# Per layer: states, keys and values, what is added to the scores of either.
Prompts = tuple[Mapping[int, Tensor], Mapping[int, Pair], Biases]


def literal_encoder_decoder(
    backbone: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    decoder_input_ids: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    *,
    states: Mapping[int, Tensor] | None = None,
    keys_values: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    virtual: Tensor | None = None,
    prompt_bias: Mapping[int, Tensor] | None = None,
    position_offset: Mapping[str, int] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Run both stacks with prompts, step by step.

    deep: h[i + 1] = layer[i]([states[i] ; h[i]])[P:], and in cross-attention [states ; encoder output] in place of the
    encoder's output. prefix: keys and values in front of a layer's own. shallow: the encoder runs [virtual ; words] and
    the decoder looks at all of its P + N rows.

    Args:
        backbone: T5Model, T5EncoderModel, T5ForConditionalGeneration, BartModel or
            MBartModel.
        input_ids, attention_mask: (B, N) of the encoder.
        decoder_input_ids, decoder_attention_mask: (B, M) of the decoder; None runs the encoder alone.
        states: layer -> (P, D).
        keys_values: layer -> keys and values (H, P, d).
        virtual: (P, D) embeddings.
        prompt_bias: layer -> (H, P), added to the scores of `states` or of `keys_values`.
        position_offset: "encoder", "decoder" -> added to the learned positions of that text.

    Returns:
        The decoder's states (B, M, D), or None, and the encoder's (B, N, D), after their last norms.

    Raises:
        ValueError: the backbone is of none of `FAMILIES`.
    """
    if getattr(backbone.config, "model_type", None) not in FAMILIES:
        raise ValueError(f"backbone must be one of {', '.join(FAMILIES)}; got {type(backbone).__name__}")
    prompts = (states or {}, keys_values or {}, prompt_bias or {})
    offsets = position_offset or {}
    encoder, length = backbone.encoder, 0 if virtual is None else len(virtual)
    key_mask = as_key_mask(attention_mask, input_ids)
    positions = positions_from_mask(key_mask) + length
    words = encoder.embed_tokens(input_ids)
    if virtual is not None:
        words = torch.cat([virtual.expand(len(words), -1, -1), words], dim=1)
        positions = torch.cat([torch.arange(length).expand(len(words), -1), positions], dim=1)
        key_mask = nn.functional.pad(key_mask, (length, 0), value=True)
    hidden = _embedded(encoder, words, positions + offsets.get("encoder", 0))
    with backbones.plain_attention_in(encoder):
        encoded = _run(encoder, hidden, key_mask, positions, prompts, 0)
    if decoder_input_ids is None:
        return None, encoded[:, length:]
    decoder = backbone.decoder
    decoder_mask = as_key_mask(decoder_attention_mask, decoder_input_ids)
    positions = positions_from_mask(decoder_mask)
    hidden = _embedded(decoder, decoder.embed_tokens(decoder_input_ids), positions + offsets.get("decoder", 0))
    with backbones.plain_attention_in(decoder):
        first = len(_blocks(encoder))
        decoded = _run(decoder, hidden, decoder_mask, positions, prompts, first, encoded, key_mask)
    return decoded, encoded[:, length:]


def _blocks(stack: nn.Module) -> nn.ModuleList:
    return stack.block if hasattr(stack, "block") else stack.layers


def _embedded(stack: nn.Module, words: Tensor, positions: Tensor) -> Tensor:
    """What enters the first layer: (B, N, D)."""
    if not hasattr(stack, "embed_positions"):
        return words
    table = stack.embed_positions
    return stack.layernorm_embedding(words + nn.functional.embedding(positions + table.offset, table.weight))


def _run(
    stack: nn.Module,
    hidden: Tensor,
    key_mask: Tensor,
    positions: Tensor,
    prompts: Prompts,
    first: int,
    encoded: Tensor | None = None,
    encoded_mask: Tensor | None = None,
) -> Tensor:
    """All layers of a stack; its self-attention is layer `first` and those behind it."""
    states, keys_values, biases = prompts
    blocks = _blocks(stack)
    for index, block in enumerate(blocks):
        own, cross = first + index, first + len(blocks) + index
        prompt = states.get(own, hidden.new_zeros(0, hidden.shape[2]))
        length = len(prompt)
        rows = torch.cat([prompt.expand(len(hidden), -1, -1), hidden], dim=1)  # [B, P+N, D]
        mask = additive_mask(key_mask, length, causal=encoded is not None, dtype=hidden.dtype)
        where = nn.functional.pad(positions, (length, 0), value=-_FAR)
        mask = mask + _distance_bias(stack, where, hidden)
        if own in states and own in biases:
            mask = mask + nn.functional.pad(biases[own][None, :, None, :], (0, hidden.shape[1]))
        calls = {0: _prefix(keys_values, biases, own, _far_bias(stack, hidden))}
        options: dict[str, Tensor] = {}
        if encoded is not None and encoded_mask is not None:
            options = _looking(states, biases, cross, encoded, encoded_mask, rows.shape[1])
            calls[1] = _prefix(keys_values, biases, cross, None)
        literal_prefix = PrefixByCall(calls)
        output = block(rows, mask, **options, literal_prefix=literal_prefix)
        hidden = (output[0] if isinstance(output, tuple) else output)[:, length:]
    for norm in ("final_layer_norm", "layer_norm"):  # T5's, mBART's; BART has none
        if hasattr(stack, norm):
            hidden = getattr(stack, norm)(hidden)
    return hidden


def _looking(
    states: Mapping[int, Tensor], biases: Biases, cross: int, encoded: Tensor, encoded_mask: Tensor, queries: int
) -> dict[str, Tensor]:
    """The encoder's states as a decoder's layer takes them, with that layer's prompts in front."""
    prompt = states.get(cross, encoded.new_zeros(0, encoded.shape[2]))
    seen = torch.cat([prompt.expand(len(encoded), -1, -1), encoded], dim=1)
    visible = nn.functional.pad(encoded_mask, (len(prompt), 0), value=True)[:, None, None, :]
    visible = visible.expand(-1, 1, queries, -1)
    mask = torch.zeros(visible.shape, dtype=encoded.dtype).masked_fill(~visible, torch.finfo(encoded.dtype).min)
    if cross in states and cross in biases:
        mask = mask + nn.functional.pad(biases[cross][None, :, None, :], (0, encoded.shape[1]))
    return {"encoder_hidden_states": seen, "encoder_attention_mask": mask}


def _prefix(
    keys_values: Mapping[int, Pair], biases: Biases, layer: int, far: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Keys, values and what is added to their scores, (H, P), of one attention; None where it has no prefix."""
    if layer not in keys_values:
        return None
    keys, values = keys_values[layer]
    bias = biases.get(layer)
    if far is not None:
        bias = far[:, None].expand(-1, keys.shape[1]) + (0 if bias is None else bias)
    return keys, values, bias


def _far_bias(stack: nn.Module, like: Tensor) -> Tensor | None:
    """(H,) what T5 adds to the score of a token far in front of another; None on BART."""
    if not hasattr(stack, "block"):
        return None
    return _distance_bias(stack, torch.tensor([[-_FAR, 0]], device=like.device), like)[0, :, 1, 0]


def _distance_bias(stack: nn.Module, positions: Tensor, like: Tensor) -> Tensor:
    """(B, H, n, n) what T5 adds to the scores of tokens at positions (B, n); 0 on BART."""
    if not hasattr(stack, "block"):
        return like.new_zeros(1, 1, 1, 1)
    attention = stack.block[0].layer[0].SelfAttention
    buckets = attention._relative_position_bucket(
        positions[:, None, :] - positions[:, :, None],
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return attention.relative_attention_bias(buckets).permute(0, 3, 1, 2)
