"""CLIP's two towers: a pre-norm encoder of patches, and a causal pre-norm encoder of text with learned positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone.view import view_of
from ptv2_fast.backbone.virtual_tokens import with_own_states, with_virtual_tokens
from ptv2_fast.families.family import Family
from ptv2_fast.families.vit import Vit


class ClipVision(Vit):
    reads_first = False
    layers_path = "encoder.layers"
    norm_path = "layer_norm1"
    attention_path = "self_attn"

    def shallow_view(self, backbone: PreTrainedModel, prompts: Tensor) -> PreTrainedModel:
        """A view of the vision tower in which virtual tokens evolve with the patches (VPT-shallow).

        They enter as embeddings do, so the norm in front of the first layer is theirs as well; they have no position.
        The class token stays the first row of what the pooler reads.

        Args:
            prompts: (P, D).

        Returns:
            A module called like the backbone.
        """
        length = prompts.shape[0]

        def embed(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return with_virtual_tokens(prompts, original(*args, **kwargs))

        def encode(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            output.last_hidden_state = output.last_hidden_state[:, length:]
            return output

        children = {
            "embeddings": view_of(backbone.embeddings, forward=embed),
            "encoder": view_of(backbone.encoder, forward=encode),
        }
        return with_own_states(view_of(backbone, children=children))


class ClipText(Family):
    causal = True
    own_pooler = True
    skips_unread_tokens = True
    layer_index = "layer_idx"
    layers_path = "encoder.layers"
    norm_path = "layer_norm1"

    def with_layer_index(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """A view of the text tower whose attention modules know their layer, and that takes embeddings for ids.

        Given `inputs_embeds` (B, N, D) in place of ids it has no end-of-text token to pool at: `pooler_output` is None.
        """

        def run(
            original: Any, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
        ) -> Any:
            if inputs_embeds is None:
                return original(input_ids=input_ids, **kwargs)

            def embed(
                embeddings: Callable[..., Any], input_ids: Tensor | None = None, position_ids: Tensor | None = None
            ) -> Any:
                return embeddings(inputs_embeds=inputs_embeds, position_ids=position_ids)

            embeddings = view_of(backbone.embeddings, forward=embed)
            # The tower insists on ids, of which only the shape is read here.
            ids = torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
            output = view_of(original.__self__, children={"embeddings": embeddings})(input_ids=ids, **kwargs)
            output.pooler_output = None
            return output

        return view_of(super().with_layer_index(backbone), forward=run)

    def with_own_pooler(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """A view of the text tower whose `pooler_output` is each row's state at its own end-of-text token.

        The tower itself takes the first such id of the slots that it was given, which may be padding in front of a
        text, or another row's where padding was dropped. A row without one gives its first token.
        """

        def run(
            original: Callable[..., Any],
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            output = original(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            if input_ids is None or kwargs["ptv2_prompts"].cu_seqlens is not None:
                return output
            real = torch.ones_like(input_ids, dtype=torch.bool)
            if attention_mask is not None and attention_mask.dim() == 2:
                real = attention_mask.bool()
            end = backbone.config.eos_token_id
            # Old configurations say 2 for an end of text that has the highest id.
            rank = input_ids + 1 if end == 2 else 1 + (input_ids == end).int()
            slot = (rank * real).argmax(-1)
            rows = torch.arange(len(slot), device=slot.device)
            output.pooler_output = output.last_hidden_state[rows, slot]
            return output

        return view_of(backbone, forward=run)
