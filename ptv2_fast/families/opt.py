"""OPT: decoder with learned positions; the smallest and the 350m model norm before and after their attention."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.backbone.projection import Projection, linear_projection


def layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers in order."""
    return backbone.decoder.layers


def attention_input(backbone: PreTrainedModel, layer: int, states: Tensor) -> Tensor:
    """What a layer's projections read: its input after the first norm, or as it is in post-norm models."""
    module = backbone.decoder.layers[layer]
    return module.self_attn_layer_norm(states) if module.do_layer_norm_before else states


def projections(backbone: PreTrainedModel, layer: int) -> tuple[Projection, Projection]:
    """The key and the value projection of one layer."""
    attention = backbone.decoder.layers[layer].self_attn
    return linear_projection(attention.k_proj), linear_projection(attention.v_proj)


def finish_keys(backbone: PreTrainedModel, layer: int, keys: Tensor) -> Tensor:
    """Keys (P, H, d) as attention reads them: OPT's projection is all there is."""
    return keys


def check(backbone: PreTrainedModel) -> None:
    """Refuse layers that are left out at random: a shallow prompt's pass would lack their keys.

    Raises:
        ValueError: the configuration has a layerdrop.
    """
    if backbone.config.layerdrop:
        raise ValueError(f"base must have layerdrop 0; got {backbone.config.layerdrop}")
