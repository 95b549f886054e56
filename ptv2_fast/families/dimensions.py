"""Sizes of a backbone, read from its configuration."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Dimensions:
    """hidden_size D, num_layers L, num_heads H, num_kv_heads Hkv, head_dim d of a backbone.

    embedding_size E is the width of word embeddings, and of shallow prompts; output_size that of the backbone's output.
    Both are D nearly everywhere.

    In an encoder with a decoder every attention that may have a prompt is a layer: the encoder's first, then the
    decoder's self-attention, then its cross-attention. decoder_layers is the number of either; 0 elsewhere.
    """

    hidden_size: int
    embedding_size: int
    output_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    initializer_range: float
    decoder_layers: int = 0

    @property
    def encoder_layers(self) -> int:
        """How many layers are the encoder's; all of them where there is no decoder."""
        return self.num_layers - 2 * self.decoder_layers

    def place(self, layer: int) -> tuple[str, int]:
        """The stack ("encoder", "decoder" or "cross") that a layer is of, and its index there."""
        return place_of(layer, self.encoder_layers, self.decoder_layers)

    @classmethod
    def of(cls, backbone: PreTrainedModel) -> Dimensions:
        """Read the sizes that `backbone.config` states."""
        config = backbone.config
        heads = config.num_attention_heads
        projected = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
        return cls(
            hidden_size=config.hidden_size,
            embedding_size=getattr(config, "embedding_size", None) or projected,
            output_size=projected,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            initializer_range=getattr(config, "initializer_range", 0.02),
        )


def place_of(layer: int, encoder_layers: int, decoder_layers: int) -> tuple[str, int]:
    """The stack ("encoder", "decoder" or "cross") that a layer is of, and its index there."""
    if layer < encoder_layers:
        return "encoder", layer
    cross, index = divmod(layer - encoder_layers, decoder_layers)
    return ("decoder", "cross")[cross], index
