"""ModernBERT: pre-norm encoder with rotary positions, a fused projection, and windows in most of its layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone import rotary
from ptv2_fast.backbone.projection import Projection, linear_projection
from ptv2_fast.backbone.view import view_of
from ptv2_fast.backbone.virtual_tokens import visible_prompts, with_virtual_tokens
from ptv2_fast.families.family import Family


class ModernBert(Family):
    rotary = True
    reads_first = True
    # The first layer's is no norm.
    norm_path = "attn_norm"
    attention_path = "attn"

    def projections(self, backbone: PreTrainedModel, layer: int) -> tuple[Projection, Projection]:
        """The key and the value part of one layer's fused projection, which maps to [q | k | v]."""
        fused, width = linear_projection(backbone.layers[layer].attn.Wqkv), backbone.config.hidden_size
        return fused.rows(width, 2 * width), fused.rows(2 * width, 3 * width)

    def finish_keys(self, backbone: PreTrainedModel, layer: int, keys: Tensor) -> Tensor:
        """Keys (P, H, d) as attention reads them: rotated as the layer's kind is."""
        return self.rotate(keys, *rotary.tables_before_text(backbone, keys, backbone.config.layer_types[layer]))

    def rotate(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Keys (P, H, d) turned in float32 or better."""
        return rotary.rotate(rotary.in_float32(keys), cos, sin).to(keys.dtype)

    def shallow_view(self, backbone: PreTrainedModel, prompts: Tensor) -> PreTrainedModel:
        """A view of the backbone in which virtual tokens evolve in front of every row's text.

        Virtual tokens are in every window and see every token: windows count the text alone.

        Args:
            prompts: (P, D) embeddings of the virtual tokens, at positions 0..P-1.

        Returns:
            A module called like the backbone, with position ids from P on.
        """
        length, window = prompts.shape[0], backbone.config.sliding_window

        def embed(
            original: Callable[..., Any], input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
        ) -> Any:
            text = original(input_ids=input_ids, inputs_embeds=inputs_embeds)  # (B, N, D)
            virtual = original(inputs_embeds=prompts[None].to(text.dtype))
            return with_virtual_tokens(virtual[0], text)

        def turn(_: Any, states: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            virtual = torch.arange(length, device=position_ids.device).expand(position_ids.shape[0], -1)
            # The module itself: the compiler cannot call a copy's decorated forward.
            return backbone.rotary_emb(states, torch.cat([virtual, position_ids], dim=1), *args, **kwargs)

        def finish(original: Callable[..., Any], states: Tensor) -> Any:
            return original(states[:, length:])

        def run(
            original: Callable[..., Any],
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            inputs_embeds: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            text: Any = input_ids if input_ids is not None else inputs_embeds
            real = attention_mask
            if real is None:
                real = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
            visible = visible_prompts(real.bool(), length)
            near = _near(real.bool(), length, window) & visible[:, None, None]
            masks = {"full_attention": visible, "sliding_attention": near}
            return original(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=masks, **kwargs)

        children = {
            "embeddings": view_of(backbone.embeddings, forward=embed),
            "rotary_emb": view_of(backbone.rotary_emb, forward=turn),
            "final_norm": view_of(backbone.final_norm, forward=finish),
        }
        return view_of(view_of(backbone, children=children), forward=run)


def _near(real: Tensor, length: int, window: int) -> Tensor:
    """(B, 1, P + N, P + N): which rows are within `window` tokens of one another, virtual ones of all."""
    rank = real.cumsum(-1)
    near = (rank[:, :, None] - rank[:, None, :]).abs() <= window
    return torch.nn.functional.pad(near, (length, 0, length, 0), value=True)[:, None]
