"""The tutorial "A Deep Dive into P-Tuning v2": its two classes, literally.

Every layer of a frozen encoder gets its own trained prompts: concat, extended mask, layer, slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptv2_fast.reference import backbones
from ptv2_fast.reference.masks import additive_mask, as_key_mask, positions_from_mask

# Their layers take hidden states and a 4-D additive mask; the tutorial itself knows BERT's attributes alone.
_ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "albert", "distilbert")


class DeepPromptEncoder(nn.Module):
    """Trained prompts for every layer: num_layers embeddings of (prompt_length, hidden_dim)."""

    def __init__(self, num_layers: int, hidden_dim: int, prompt_length: int, device: torch.device | str) -> None:
        super().__init__()
        self.prompt_length = prompt_length
        self.device = device
        self.prompts = nn.ModuleList([nn.Embedding(prompt_length, hidden_dim) for _ in range(num_layers)])

    def forward(self, layer_idx: int) -> Tensor:
        """Return the prompts of one layer, (P, D)."""
        return self.prompts[layer_idx](torch.arange(self.prompt_length, device=self.device))


class P_Tuning_Model(nn.Module):
    """A frozen encoder with deep prompts and one trained head per task.

    h[i + 1] = layer[i]([prompts[i] ; h[i]])[P:], logits = classification_heads[task](h[L]).

    The tutorial's published code hands each layer a 2-D mask, (B, P+N) of ones and zeros. A layer
    adds its mask to scores of shape (B, H, P+N, P+N), so that mask either does not broadcast or
    hides nothing. Here it is what the layer expects: 4-D, 0 at visible keys and the lowest finite
    number at padding. Positions and the [CLS] row follow each row's first real token, which makes
    left padding and right padding the same. It keeps the layer's first output, as layers returned
    tuples; they return hidden states today.

    Args:
        base_model_name: name or folder of an encoder whose layers take such a mask, or such a model, without a head. A
            given model is frozen in place.
        prompt_length: P, the prompts of each layer.
        num_labels_list: the number of labels of each task, in the order of ``task_idx``.

    Raises:
        ValueError: another architecture or attention implementation.
    """

    def __init__(
        self, base_model_name: str | Path | nn.Module, prompt_length: int, num_labels_list: Sequence[int]
    ) -> None:
        super().__init__()
        self.base_model = _load_encoder(base_model_name)
        self.base_model.requires_grad_(False)
        self.device = self.base_model.device
        self.num_layers = self.base_model.config.num_hidden_layers
        self.hidden_dim = self.base_model.config.hidden_size
        self.prompt_length = prompt_length
        self.prompt_encoder = DeepPromptEncoder(self.num_layers, self.hidden_dim, prompt_length, self.device)
        self.prompt_encoder.to(self.device)
        self.classification_heads = nn.ModuleList([nn.Linear(self.hidden_dim, count) for count in num_labels_list])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, task_idx: int = 0) -> Tensor:
        """Return the logits of one task, (B, num_labels), from the [CLS] rows.

        Args:
            input_ids: (B, N) int64.
            attention_mask: (B, N), nonzero at real tokens; None means no padding.
            task_idx: which of the heads.

        Raises:
            ValueError: a shape disagrees.
        """
        key_mask = as_key_mask(attention_mask, input_ids)
        hidden = self.encode(input_ids, key_mask)
        first_token = key_mask.long().argmax(dim=1)
        return self.classification_heads[task_idx](hidden[torch.arange(len(hidden)), first_token])

    def token_logits(self, input_ids: Tensor, attention_mask: Tensor | None, task_idx: int = 0) -> Tensor:
        """Return the logits of every token, (B, N, num_labels): the tutorial's NER head, which it has in words only."""
        return self.classification_heads[task_idx](self.encode(input_ids, as_key_mask(attention_mask, input_ids)))

    def encode(self, input_ids: Tensor, key_mask: Tensor) -> Tensor:
        """Run the prompted layers: ids (B, N) and a bool mask (B, N) -> hidden states (B, N, D)."""
        base, length = self.base_model, self.prompt_length
        positions = backbones.first_position(base) + positions_from_mask(key_mask)
        hidden = backbones.embed(base, input_ids, positions, None)
        mask = additive_mask(key_mask, length, causal=False, dtype=hidden.dtype)
        for layer_idx in range(self.num_layers):
            prompt = self.prompt_encoder(layer_idx).unsqueeze(0).expand(len(hidden), -1, -1)
            rows = backbones.run_layer(base, layer_idx, torch.cat([prompt, hidden], dim=1), mask, positions, length)
            hidden = rows[:, length:, :]
        return hidden


def _load_encoder(source: str | Path | nn.Module) -> nn.Module:
    if isinstance(source, nn.Module):
        encoder = source
    else:
        from transformers import AutoModel

        encoder = AutoModel.from_pretrained(source)
    config: Any = getattr(encoder, "config", None)
    family = getattr(config, "model_type", None)
    is_decoder = getattr(config, "is_decoder", False)
    if family not in _ENCODERS or is_decoder or getattr(encoder, "base_model", None) is not encoder:
        raise ValueError(
            f"base_model_name must be an encoder without a head, one of {', '.join(_ENCODERS)}; "
            f"got {type(encoder).__name__} ({family!r})"
        )
    if config._attn_implementation not in ("eager", "sdpa"):
        raise ValueError(
            "base_model_name must use eager or sdpa attention, which take a 4-D additive mask; "
            f"got {config._attn_implementation!r}"
        )
    return encoder
