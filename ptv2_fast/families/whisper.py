"""Whisper's encoder: pre-norm, over frames of a log-mel spectrogram."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone.virtual_tokens import evolving_view
from ptv2_fast.families.dimensions import Dimensions
from ptv2_fast.families.family import Family


class Whisper(Family):
    reads = "input_features"
    layer_index = "layer_idx"
    norm_path = "self_attn_layer_norm"

    def check(self, backbone: PreTrainedModel) -> None:
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

    def sizes(self, backbone: PreTrainedModel) -> Dimensions:
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

    def shallow_view(self, backbone: PreTrainedModel, prompts: Tensor) -> PreTrainedModel:
        """A view of the encoder in which virtual tokens (P, D) evolve with the frames.

        They enter behind the convolutions, the position embeddings and their dropout, of which they have none.
        """
        return evolving_view(backbone, prompts, "layers.0", "layer_norm")
