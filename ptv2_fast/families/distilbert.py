"""DistilBERT: BERT's shape under other names, with layers that do not know their index."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.backbone.projection import Projection, linear_projection
from ptv2_fast.backbone.view import view_of, with_modules
from ptv2_fast.families import bert


def layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The encoder's layers in order."""
    return backbone.transformer.layer


def projections(backbone: PreTrainedModel, layer: int) -> tuple[Projection, Projection]:
    """The key and the value projection of one layer."""
    attention = backbone.transformer.layer[layer].attention
    return linear_projection(attention.k_lin), linear_projection(attention.v_lin)


def with_layer_index(backbone: PreTrainedModel) -> PreTrainedModel:
    """A view of the backbone whose attention modules know their layer."""
    numbered = {
        f"transformer.layer.{index}.attention": view_of(layer.attention, attributes={"layer_idx": index})
        for index, layer in enumerate(backbone.transformer.layer)
    }
    return with_modules(backbone, numbered)


def shallow_view(backbone: PreTrainedModel, prompts: Tensor) -> PreTrainedModel:
    """A view of the backbone in which virtual tokens evolve in front of every row's text."""
    return bert.shallow_view(backbone, prompts, encoder="transformer")
