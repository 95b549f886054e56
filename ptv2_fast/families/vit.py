"""ViT: pre-norm encoder of an image's patches behind a class token."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.backbone.projection import Projection, linear_projection
from ptv2_fast.backbone.view import numbered
from ptv2_fast.backbone.virtual_tokens import evolving_view


def layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The encoder's layers in order."""
    return backbone.layers


def attention_input(backbone: PreTrainedModel, layer: int, states: Tensor) -> Tensor:
    """What a layer's projections read: its input after the norm before its attention."""
    return backbone.layers[layer].layernorm_before(states)


def projections(backbone: PreTrainedModel, layer: int) -> tuple[Projection, Projection]:
    """The key and the value projection of one layer."""
    attention = backbone.layers[layer].attention
    return linear_projection(attention.k_proj), linear_projection(attention.v_proj)


def with_layer_index(backbone: PreTrainedModel) -> PreTrainedModel:
    """A view of the backbone whose attention modules know their layer."""
    return numbered(backbone, "layers.{}.attention", len(backbone.layers))


def tokens(backbone: PreTrainedModel, pixel_values: Tensor) -> int:
    """How many rows N images (B, C, H, W) become: their patches and the class token."""
    patch = backbone.config.patch_size
    high, wide = (patch, patch) if isinstance(patch, int) else patch
    return 1 + (pixel_values.shape[2] // high) * (pixel_values.shape[3] // wide)


def shallow_view(backbone: PreTrainedModel, prompts: Tensor) -> PreTrainedModel:
    """A view of the backbone in which virtual tokens evolve with the patches (VPT-shallow).

    They enter behind the embeddings, position embeddings and dropout included, of which they have none.

    Args:
        prompts: (P, D).

    Returns:
        A module called like the backbone.
    """
    return evolving_view(backbone, prompts, "layers.0", "layernorm")
