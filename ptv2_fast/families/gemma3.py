"""Gemma 3's text model: Llama's shape, with rotary tables of their own for layers with and without a window."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone import rotary


def finish_keys(backbone: PreTrainedModel, layer: int, keys: Tensor) -> Tensor:
    """Keys (P, Hkv, d) as attention reads them: normalised, then rotated as the layer's kind is."""
    keys = backbone.layers[layer].self_attn.k_norm(keys)
    return rotary.before_text(backbone, keys, backbone.config.layer_types[layer])


def check(backbone: PreTrainedModel) -> None:
    """Refuse what is no decoder.

    Raises:
        ValueError: the configuration lets text see what stands after it.
    """
    if getattr(backbone.config, "use_bidirectional_attention", False):
        raise ValueError("base must be a decoder; got Gemma with use_bidirectional_attention=True")
