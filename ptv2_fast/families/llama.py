"""Llama and its kin: pre-norm decoders with rotary positions, grouped heads, sometimes key norms.

Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, SmolLM3, Gemma 2: their windows, softcaps, scales and experts are the layers'
own business and reach attention without the package's help.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.backbone import rotary
from ptv2_fast.backbone.norms import normed_together as norms_together
from ptv2_fast.backbone.projection import Projection, linear_projection


def layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers in order."""
    return backbone.layers


def attention_input(backbone: PreTrainedModel, layer: int, states: Tensor) -> Tensor:
    """What a layer's projections read: its input after the input norm."""
    return backbone.layers[layer].input_layernorm(states)


def projections(backbone: PreTrainedModel, layer: int) -> tuple[Projection, Projection]:
    """The key and the value projection of one layer."""
    attention = backbone.layers[layer].self_attn
    return linear_projection(attention.k_proj), linear_projection(attention.v_proj)


def finish_keys(backbone: PreTrainedModel, layer: int, keys: Tensor) -> Tensor:
    """Keys (P, Hkv, d) as attention reads them: normalised where the family does that, then rotated.

    Some of SmolLM3's layers know no positions at all.
    """
    attention = backbone.layers[layer].self_attn
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    return rotary.before_text(backbone, keys) if getattr(attention, "use_rope", True) else keys


def attention_inputs(backbone: PreTrainedModel, layers: Sequence[int], states: Tensor) -> Tensor | None:
    """`attention_input` of several layers' states (L, P, D)."""
    return norms_together([backbone.layers[layer].input_layernorm for layer in layers], states)


def finish_all_keys(backbone: PreTrainedModel, layers: Sequence[int], keys: Tensor) -> Tensor | None:
    """`finish_keys` of several layers' keys (L, P, Hkv, d)."""
    attentions = [backbone.layers[layer].self_attn for layer in layers]
    if not all(attention.__dict__.get("use_rope", True) for attention in attentions):
        return None
    finished: Tensor | None = keys
    if hasattr(attentions[0], "k_norm"):
        finished = norms_together([attention.k_norm for attention in attentions], keys)
    return None if finished is None else rotary.rotate(finished, *rotary.tables_before_text(backbone, finished[0]))
