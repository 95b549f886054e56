"""T5 and mT5: pre-norm stacks without biases, whose scores get a learned bias for the distance of two tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone.view import view_of
from ptv2_fast.backbone.virtual_tokens import of_the_text, visible_prompts, with_virtual_tokens
from ptv2_fast.families.dimensions import Dimensions
from ptv2_fast.families.encoder_decoder import EncoderDecoder


class T5(EncoderDecoder):
    relative_positions = True
    layers_path, decoder_path = "encoder.block", "decoder.block"
    norm_path = "layer.0.layer_norm"
    attention_path, cross_path = "layer.0.SelfAttention", "layer.1.EncDecAttention"
    key_path, value_path = "k", "v"

    def check(self, backbone: PreTrainedModel) -> None:
        """Refuse a stack alone, the one class that has its own head beside its stacks, and an attention of T5's own.

        Raises:
            ValueError: the message names the class, and the version where that is the reason.
        """
        name = type(backbone).__name__
        if not hasattr(sys.modules[type(backbone).__module__], "ALL_ATTENTION_FUNCTIONS"):
            raise ValueError(
                f"base must use transformers' attention interface, which T5 uses in later versions; got {name} of "
                f"transformers {transformers.__version__}"
            )
        if not hasattr(backbone, "encoder") or hasattr(backbone, "qa_outputs"):
            raise ValueError(
                "base must be T5Model, T5EncoderModel, T5ForConditionalGeneration, T5ForSequenceClassification or "
                f"T5ForTokenClassification, or that of mT5; got {name}"
            )

    def sizes(self, backbone: PreTrainedModel) -> Dimensions:
        """The sizes, with a layer for each attention of both stacks; a T5EncoderModel has the encoder's alone."""
        config = backbone.config
        return Dimensions(
            hidden_size=config.d_model,
            embedding_size=config.d_model,
            output_size=config.d_model,
            num_layers=self.num_attentions(backbone),
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_dim=config.d_kv,
            initializer_range=0.02,
            decoder_layers=self.decoder_layers(backbone),
        )

    def far_keys_and_bias(self, backbone: PreTrainedModel, layer: int, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (H, P, d), and the bias (H, P) of the farthest distance in front of a token.

        Distances share buckets, and the last one in front holds all that are as large as the model can tell. The first
        block has the table of its stack; cross-attention has none.
        """
        stack, _ = self.place(backbone, layer)
        if stack == "cross":
            return keys, keys.new_zeros(keys.shape[:2])
        attention = getattr(backbone, stack).block[0].layer[0].SelfAttention
        buckets = attention.relative_attention_num_buckets
        # An encoder's second half is for distances behind a token.
        last = buckets - 1 if stack == "decoder" else buckets // 2 - 1
        return keys, attention.relative_attention_bias.weight[last][:, None].expand(-1, keys.shape[1])

    def shallow_view(self, backbone: PreTrainedModel, prompts: Tensor) -> PreTrainedModel:
        """A view of an encoder alone in which virtual tokens (P, D) evolve in front of every row's text, P tokens
        nearer to it than anything else would be: distances count them."""
        length = prompts.shape[0]

        def run(
            original: Callable[..., Any],
            input_ids: Tensor | None = None,
            inputs_embeds: Tensor | None = None,
            attention_mask: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            words = backbone.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            rows, mask = with_virtual_tokens(prompts, words), visible_prompts(attention_mask, length)
            return of_the_text(original(inputs_embeds=rows, attention_mask=mask, **kwargs), length)

        return view_of(backbone, forward=run)
