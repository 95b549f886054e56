"""From trained prompts to the keys and values that attention reads, once per step and never per row."""

from __future__ import annotations

import functools
from collections import deque
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.attention.prompt_batch import LayerPrompt, LazyPrompt, PromptBatch, not_reached
from ptv2_fast.backbone.hooked import Hooked
from ptv2_fast.backbone.sharded_weights import check_gathered, check_runs_alone, dtype_of, kept_together
from ptv2_fast.families.family import Family
from ptv2_fast.prompts.encoder import PromptEncoder
from ptv2_fast.prompts.projection import LayerProjections


def layer_prompts(
    encoder: PromptEncoder,
    backbone: PreTrainedModel,
    family: Family,
    projections: LayerProjections,
    backend: str,
    *,
    hooked: Hooked,
) -> tuple[LayerPrompt | LazyPrompt | None, ...]:
    """The prompt of every layer of the backbone; None where a layer has none.

    deep: K_p, V_p = the layer's own projection of its prompt states. prefix: the parameters themselves. shallow on a
    causal model: one pass of the P virtual tokens through the frozen stack, which cannot see the text.

    Args:
        encoder: the trained prompts.
        projections: of the backbone's layers that the encoder prompts.
        backend: which backend of `prompt_attention` the prompts are for.
        hooked: makes the view of the backbone that a shallow prompt runs through.

    Returns:
        One LayerPrompt of keys and values (Hkv, P, d) per layer, in the backbone's dtype; a lazy one where the layer's
        weights are there only while it runs.

    Raises:
        ValueError: FSDP2 has sharded the prompts, and what it wrapped does not run.

    Source: P-Tuning v2 (Liu et al., 2022), section 3.2; the batch never enters, so neither does its size.
    """
    prompts = encoder().to(dtype_of(backbone))
    check_gathered(prompts)
    count = projections.num_layers
    gates = dict(zip(encoder.layers, encoder.gate.unbind(0), strict=True)) if encoder.gate is not None else {}
    waits = projections.must_wait()

    def finished(layer: int, keys: Tensor, values: Tensor) -> LayerPrompt:
        bias = gates.get(layer)
        if family.relative_positions:
            keys, distance = family.far_keys_and_bias(backbone, layer, keys)
            if distance is not None:
                bias = distance if bias is None else distance + bias
        return LayerPrompt(keys, values, bias=bias)

    # What a layer's weights make is made while the layer runs.
    if waits and (encoder.injection == "deep" or (encoder.injection == "prefix" and family.relative_positions)):
        pair_of = projections.of_layer if encoder.injection == "deep" else _as_they_are

        def late(layer: int, own: Tensor) -> LayerPrompt:
            return finished(layer, *pair_of(layer, own))

        made = {
            layer: LazyPrompt(functools.partial(late, layer, own))
            for layer, own in zip(encoder.layers, prompts.unbind(0), strict=True)
        }
        return tuple(made.get(layer) for layer in range(count))
    match encoder.injection:
        case "prefix":
            pairs = dict(zip(encoder.layers, pairs_of(prompts), strict=True))
        case "deep":
            pairs = dict(zip(encoder.layers, projections(prompts, backend), strict=True))
        case "shallow":
            if waits:
                check_runs_alone(backbone)
            recorded = record_keys_values(backbone, prompts[None], family, hooked, virtual=True, together=waits)
            pairs = {layer: recorded[layer] for layer in encoder.layers}
    return tuple(finished(layer, *pairs[layer]) if layer in pairs else None for layer in range(count))


def pairs_of(prompts: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The keys and the values of every layer of (L', 2, ...)."""
    flat = prompts.flatten(0, 1).unbind(0)
    return list(zip(flat[::2], flat[1::2], strict=True))


def _as_they_are(layer: int, pair: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = pair.unbind(0)
    return keys, values


def record_keys_values(
    backbone: PreTrainedModel,
    embeddings: Tensor,
    family: Family,
    hooked: Hooked,
    *,
    virtual: bool = False,
    together: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """Run embeddings (1, P, E) through the backbone and keep each layer's keys and values (Hkv, P, d).

    They stand right before the text: at rotary positions -P..-1, or at the first P learned ones.

    An encoder-decoder reads them in its decoder too, behind the same text in its encoder.

    Args:
        virtual: they are virtual tokens, which sliding windows never hide; else they are a text like any other.
        together: weights come and go with the layers: backward reaches every layer by its output.

    Raises:
        RuntimeError: the backbone runs attention elsewhere than in its view.
    """
    sizes = family.sizes(backbone)
    length = embeddings.shape[1]
    start = -length if family.rotary else family.first_position(backbone)
    positions = torch.arange(start, start + length, device=embeddings.device)[None]
    # With a mask at hand transformers does not look for packed rows in the positions.
    mask = torch.ones(1, length, dtype=torch.bool, device=embeddings.device)
    # Wrappers of modules rebuild the lists among a call's arguments, not this.
    record: deque[tuple[Tensor, Tensor]] = deque()
    decoder = {"decoder_inputs_embeds": embeddings} if sizes.decoder_layers else {}
    output = hooked(backbone)(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        **decoder,
        ptv2_record=record,
        ptv2_prompts=PromptBatch(layers=(), windowed=not virtual),
    )
    # A recomputation in backward (gradient checkpointing) appends again: only the first pass
    # counts.
    pairs = [(keys[0], values[0]) for keys, values in islice(record, sizes.num_layers)]
    if len(pairs) < sizes.num_layers:
        raise RuntimeError(not_reached(type(backbone).__name__, "all of its layers"))
    if sizes.decoder_layers:
        # A decoder's layer runs its self-attention, then its cross-attention; all of the former are numbered first.
        first = sizes.encoder_layers
        pairs = pairs[:first] + pairs[first::2] + pairs[first + 1 :: 2]
    return kept_together(pairs, output.last_hidden_state) if together else pairs
