"""Whisper's encoder: pre-norm, over frames of a log-mel spectrogram."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.backbone.projection import Projection, linear_projection
from ptv2_fast.backbone.view import numbered
from ptv2_fast.backbone.virtual_tokens import evolving_view
from ptv2_fast.families.dimensions import Dimensions


def sizes(backbone: PreTrainedModel) -> Dimensions:
    """The encoder's sizes, which the configuration has beside the decoder's."""
    config = backbone.config
    return Dimensions(
        hidden_size=config.d_model,
        embedding_size=config.d_model,
        output_size=config.d_model,
        num_layers=config.encoder_layers,
        num_heads=config.encoder_attention_heads,
        num_kv_heads=config.encoder_attention_heads,
        head_dim=config.d_model // config.encoder_attention_heads,
        initializer_range=config.init_std,
    )


def layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The encoder's layers in order."""
    return backbone.layers


def attention_input(backbone: PreTrainedModel, layer: int, states: Tensor) -> Tensor:
    """What a layer's projections read: its input after the norm before its attention."""
    return backbone.layers[layer].self_attn_layer_norm(states)


def projections(backbone: PreTrainedModel, layer: int) -> tuple[Projection, Projection]:
    """The key projection, which has no bias, and the value projection of one layer."""
    attention = backbone.layers[layer].self_attn
    return linear_projection(attention.k_proj), linear_projection(attention.v_proj)


def with_layer_index(backbone: PreTrainedModel) -> PreTrainedModel:
    """A view of the encoder whose attention modules know their layer."""
    return numbered(backbone, "layers.{}.self_attn", len(backbone.layers))


def shallow_view(backbone: PreTrainedModel, prompts: Tensor) -> PreTrainedModel:
    """A view of the encoder in which virtual tokens evolve with the frames.

    They enter behind the convolutions, the position embeddings and their dropout, of which they have none.

    Args:
        prompts: (P, D).

    Returns:
        A module called like the encoder.
    """
    return evolving_view(backbone, prompts, "layers.0", "layer_norm")


def check(backbone: PreTrainedModel) -> None:
    """Refuse everything but the encoder, and layers that are left out at random.

    Raises:
        ValueError: the message says what to wrap instead, or names the setting.
    """
    if not hasattr(backbone, "conv1"):
        raise ValueError(
            "base must be WhisperEncoder or WhisperForAudioClassification; wrap the encoder of "
            f"{type(backbone).__name__}, its get_encoder()"
        )
    if backbone.config.encoder_layerdrop:
        raise ValueError(f"base must have encoder_layerdrop 0; got {backbone.config.encoder_layerdrop}")
