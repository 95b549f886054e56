"""BART: post-norm stacks with learned positions, which are slots of the batch."""

from __future__ import annotations

from transformers import PreTrainedModel

from ptv2_fast.families.dimensions import Dimensions
from ptv2_fast.families.encoder_decoder import EncoderDecoder


class Bart(EncoderDecoder):
    def check(self, backbone: PreTrainedModel) -> None:
        """Refuse a stack alone, stacks of different heads, and layers that are left out at random.

        Raises:
            ValueError: the message says what is refused.
        """
        config = backbone.config
        if not (hasattr(backbone, "encoder") and hasattr(backbone, "decoder")):
            raise ValueError(f"base must have BART's encoder and its decoder; got {type(backbone).__name__}")
        heads = config.encoder_attention_heads, config.decoder_attention_heads
        if heads[0] != heads[1]:
            raise ValueError(
                f"base must have as many heads in its decoder as in its encoder, {heads[0]}; got {heads[1]}"
            )
        for name in ("encoder_layerdrop", "decoder_layerdrop"):
            if getattr(config, name):
                raise ValueError(f"base must have {name} 0, since its layers have prompts; got {getattr(config, name)}")

    def sizes(self, backbone: PreTrainedModel) -> Dimensions:
        """The sizes, with a layer for each attention of both stacks."""
        config = backbone.config
        return Dimensions(
            hidden_size=config.d_model,
            embedding_size=config.d_model,
            output_size=config.d_model,
            num_layers=self.num_attentions(backbone),
            num_heads=config.encoder_attention_heads,
            num_kv_heads=config.encoder_attention_heads,
            head_dim=config.d_model // config.encoder_attention_heads,
            initializer_range=config.init_std,
            decoder_layers=self.decoder_layers(backbone),
        )
