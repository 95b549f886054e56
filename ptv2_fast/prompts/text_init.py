"""Prompts that start as what the frozen model itself computes for a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone.hooked import Hooked
from ptv2_fast.backbone.view import in_eval
from ptv2_fast.families.family import Family
from ptv2_fast.prompts.encoder import PromptEncoder
from ptv2_fast.prompts.keys_values import record_keys_values


def token_ids(tokenizer: Callable[..., Any], text: str | Sequence[str], length: int) -> Tensor:
    """Exactly `length` token ids of a text, repeated where it is shorter; (length,) int64.

    Raises:
        ValueError: the text has no tokens.
    """
    texts = [text] if isinstance(text, str) else list(text)
    ids = [i for one in texts for i in tokenizer(one, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise ValueError(f"init_text must have at least one token; got {text!r}")
    repeats = -(-length // len(ids))
    return torch.tensor((ids * repeats)[:length])


@torch.no_grad()
def initialise_from_text(
    encoder: PromptEncoder, backbone: PreTrainedModel, family: Family, hooked: Hooked, ids: Tensor
) -> None:
    """Overwrite the encoder's prompts by what the backbone computes for token ids (P,).

    deep: the hidden states that enter each prompted layer; prefix: each layer's keys and values;
        shallow: the word embeddings. Texts longer than the position table run in pieces.
    An encoder-decoder reads the text in its encoder and again in its decoder; what enters cross-attention is what the
        encoder made of it.

    Source: the initialisation that PEFT's own benchmark shows to decide prefix quality (keys and
        values of real text).
    """
    device = backbone.get_input_embeddings().weight.device
    embeddings = backbone.get_input_embeddings()(ids.to(device))[None]  # (1, P, D)
    if encoder.injection == "shallow":
        encoder.prompts.copy_(embeddings[0])
        return
    evaluated = in_eval(backbone)
    pieces = embeddings.split(_longest_run(backbone, family), dim=1)
    made = [_piece(encoder, evaluated, family, hooked, piece) for piece in pieces]
    encoder.prompts.copy_(torch.cat(made, dim=-2))


def _piece(
    encoder: PromptEncoder, backbone: PreTrainedModel, family: Family, hooked: Hooked, embeddings: Tensor
) -> Tensor:
    """(L', p, D) for deep, (L', 2, Hkv, p, d) for prefix."""
    if encoder.injection == "prefix":
        pairs = record_keys_values(backbone, embeddings, family, hooked)
        return torch.stack([torch.stack(pairs[layer]) for layer in encoder.layers])
    sizes = family.sizes(backbone)
    if not sizes.decoder_layers:
        output = hooked(backbone)(inputs_embeds=embeddings, output_hidden_states=True)
        return torch.stack([output.hidden_states[layer][0] for layer in encoder.layers])
    output = hooked(backbone)(
        inputs_embeds=embeddings, decoder_inputs_embeds=embeddings, output_hidden_states=True, use_cache=False
    )
    entering = {"encoder": output.encoder_hidden_states, "decoder": output.decoder_hidden_states}
    entering["cross"] = (output.encoder_last_hidden_state,) * sizes.decoder_layers
    places = [sizes.place(layer) for layer in encoder.layers]
    return torch.stack([entering[stack][index][0] for stack, index in places])


def _longest_run(backbone: PreTrainedModel, family: Family) -> int:
    """How many tokens the backbone can take at once."""
    limit = getattr(backbone.config, "max_position_embeddings", None) or 2048
    return limit - family.first_position(backbone)
