"""The tutorial "A Deep Dive into P-Tuning v2": its two classes, literally.

Every layer of a frozen encoder gets its own trained prompts: concat, extended mask, layer, slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptv2_fast.reference.masks import additive_mask, as_key_mask, positions_from_mask

# Their layers take hidden states and a 4-D additive mask, and return hidden states.
_ENCODERS = ("bert", "roberta")
_HEAD_TYPES = ("sequence", "token")
# The usual initializer_range of the encoders that the prompts stand in front of.
_INIT_STD = 0.02


class DeepPromptEncoder(nn.Module):
    """Trained prompts for every layer, (num_layers, prompt_length, hidden_dim).

    Raises:
        ValueError: a size is not a positive integer.
    """

    def __init__(self, num_layers: int, hidden_dim: int, prompt_length: int) -> None:
        super().__init__()
        sizes = {
            "num_layers": num_layers,
            "hidden_dim": hidden_dim,
            "prompt_length": prompt_length,
        }
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer; got {size!r}")
        self.num_layers = num_layers
        self.prompt_length = prompt_length
        self.prompts = nn.Parameter(torch.empty(num_layers, prompt_length, hidden_dim))
        nn.init.normal_(self.prompts, std=_INIT_STD)

    def forward(self, layer_idx: int, batch_size: int) -> Tensor:
        """Return the prompts of one layer, copied for each row: (batch_size, P, D).

        Raises:
            ValueError: there is no such layer.
        """
        if layer_idx not in range(self.num_layers):
            raise ValueError(f"layer_idx must be in 0..{self.num_layers - 1}; got {layer_idx!r}")
        return self.prompts[layer_idx].expand(batch_size, -1, -1)


class P_Tuning_Model(nn.Module):
    """A frozen encoder with deep prompts and one trained head per task.

    h[i + 1] = layer[i]([prompts[i] ; h[i]])[P:], logits = head[task](h[L]).

    The tutorial's published code hands each layer a 2-D mask, (B, P+N) of ones and zeros. A layer
    adds its mask to scores of shape (B, H, P+N, P+N), so that mask either does not broadcast or
    hides nothing. Here it is what the layer expects: 4-D, 0 at visible keys and the lowest finite
    number at padding. Positions and the [CLS] row follow each row's first real token, which makes
    left padding and right padding the same.

    Args:
        base_model_name: name or folder of a BERT or RoBERTa, or such a model, without a head. A
            given model is frozen in place.
        prompt_length: P, the prompts of each layer.
        num_labels_list: the number of labels of each task, in the order of ``task_idx``.
        head_types: "sequence" (one label from the [CLS] row) or "token" (a label per token), for
            all tasks or for each; the default is "sequence".

    Raises:
        ValueError: another architecture or attention implementation, no task, a number of labels
            that is not positive, an unknown head type, or as many head types as there are no tasks.
    """

    def __init__(
        self,
        base_model_name: str | Path | nn.Module,
        prompt_length: int,
        num_labels_list: Sequence[int],
        head_types: str | Sequence[str] = "sequence",
    ) -> None:
        super().__init__()
        num_labels_list = list(num_labels_list)
        if isinstance(head_types, str):
            head_types = [head_types] * len(num_labels_list)
        _check_tasks(num_labels_list, head_types)
        self.head_types = tuple(head_types)
        self.base_model = _load_encoder(base_model_name)
        self.base_model.requires_grad_(False)
        config = self.base_model.config
        self.prompt_encoder = DeepPromptEncoder(
            config.num_hidden_layers, config.hidden_size, prompt_length
        )
        self.heads = nn.ModuleList(
            nn.Linear(config.hidden_size, num_labels) for num_labels in num_labels_list
        )
        self.to(self.base_model.device, self.base_model.dtype)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, task_idx: int = 0
    ) -> Tensor:
        """Return the logits of one task.

        Args:
            input_ids: (B, N) int64.
            attention_mask: (B, N), nonzero at real tokens; None means no padding.
            task_idx: which of the heads.

        Returns:
            (B, num_labels) for a sequence head, (B, N, num_labels) for a token head.

        Raises:
            ValueError: there is no such task, or a shape disagrees.
        """
        if task_idx not in range(len(self.heads)):
            raise ValueError(f"task_idx must be in 0..{len(self.heads) - 1}; got {task_idx!r}")
        key_mask = as_key_mask(attention_mask, input_ids)
        hidden = self.encode(input_ids, key_mask)
        if self.head_types[task_idx] == "sequence":
            first_token = key_mask.long().argmax(dim=1)
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), first_token]
        return self.heads[task_idx](hidden)

    def encode(self, input_ids: Tensor, key_mask: Tensor) -> Tensor:
        """Run the prompted layers: ids (B, N) and a bool mask (B, N) -> hidden states (B, N, D)."""
        embeddings = self.base_model.embeddings
        first = embeddings.padding_idx + 1 if self.base_model.config.model_type == "roberta" else 0
        hidden = embeddings(input_ids=input_ids, position_ids=first + positions_from_mask(key_mask))
        length = self.prompt_encoder.prompt_length
        mask = additive_mask(key_mask, length, causal=False, dtype=hidden.dtype)
        for layer_idx, layer in enumerate(self.base_model.encoder.layer):
            prompts = self.prompt_encoder(layer_idx, len(hidden))
            rows = layer(torch.cat([prompts, hidden], dim=1), attention_mask=mask)
            hidden = rows[:, length:]
        return hidden


def _check_tasks(num_labels_list: list[int], head_types: Sequence[str]) -> None:
    if not num_labels_list:
        raise ValueError("num_labels_list must name at least one task; got an empty list")
    for num_labels in num_labels_list:
        if not isinstance(num_labels, int) or num_labels < 1:
            raise ValueError(f"num_labels_list must hold positive integers; got {num_labels!r}")
    if len(head_types) != len(num_labels_list):
        raise ValueError(
            f"head_types must name one type for each of the {len(num_labels_list)} tasks; "
            f"got {len(head_types)}"
        )
    for head_type in head_types:
        if head_type not in _HEAD_TYPES:
            raise ValueError(f"head_types must be of {_HEAD_TYPES}; got {head_type!r}")


def _load_encoder(source: str | Path | nn.Module) -> nn.Module:
    if isinstance(source, nn.Module):
        encoder = source
    else:
        from transformers import AutoModel

        encoder = AutoModel.from_pretrained(source, attn_implementation="eager")
    config: Any = getattr(encoder, "config", None)
    family = getattr(config, "model_type", None)
    is_decoder = getattr(config, "is_decoder", False)
    if family not in _ENCODERS or is_decoder or not hasattr(encoder, "encoder"):
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
