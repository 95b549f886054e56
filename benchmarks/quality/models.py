"""What the quality comparison trains: every method as a module that `fit` can train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel
from transformers.modeling_outputs import TokenClassifierOutput

from ptv2_fast import PTuningV2Config, get_ptv2_model
from ptv2_fast.config import HeadConfig
from ptv2_fast.heads import Head, classification_loss
from ptv2_fast.training.task_data import TaskCodec, starting_texts

PROMPT_METHODS = ("deep", "shallow", "prefix")
METHODS = ("head", *PROMPT_METHODS, "full")


@dataclass(frozen=True)
class Candidate:
    """One setting of a search; num_virtual_tokens is None for methods without prompts."""

    learning_rate: float
    num_virtual_tokens: int | None = None

    def label(self) -> str:
        """A short name, unique within a method's search."""
        prompt = "" if self.num_virtual_tokens is None else f"P={self.num_virtual_tokens} "
        return f"{prompt}lr={self.learning_rate:g}"


class BaseWithHead(nn.Module):
    """A backbone with our own head and no prompt: all of it trained, or the head alone.

    Frozen, the backbone runs without dropout and each row's hidden states are computed once and
    kept: a row's states depend on nothing that training changes.
    """

    def __init__(self, backbone: nn.Module, head: HeadConfig, *, frozen: bool):
        super().__init__()
        self.head = Head(backbone.config.hidden_size, head)
        self.frozen = frozen
        self._kept: dict[bytes, Tensor] = {}
        if frozen:
            # In a tuple the backbone is no child: checkpoints hold the head alone.
            self._outside = (backbone.eval().requires_grad_(False),)
        else:
            self.backbone = backbone

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> TokenClassifierOutput:
        """Logits, and the loss where there are labels."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        if self.frozen:
            hidden = self._kept_states(inputs)
        else:
            hidden = self.backbone(**inputs).last_hidden_state
        logits = self.head(hidden, attention_mask)
        loss = None if labels is None else classification_loss(logits, labels)
        return TokenClassifierOutput(loss, logits)

    @torch.no_grad()
    def _kept_states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(B, N, D) from memory; rows that are not there yet run through the backbone."""
        lengths = inputs["attention_mask"].sum(-1).tolist()
        keys = [row[:n].numpy().tobytes() for row, n in zip(inputs["input_ids"], lengths, strict=False)]
        missing = [i for i, key in enumerate(keys) if key not in self._kept]
        if missing:
            rows = {name: tensor[missing] for name, tensor in inputs.items() if tensor is not None}
            states = self._outside[0](**rows).last_hidden_state.float()
            for state, i in zip(states, missing, strict=False):
                self._kept[keys[i]] = state[: lengths[i]].clone()
        return pad_sequence([self._kept[key] for key in keys], batch_first=True)


def build(
    method: str,
    candidate: Candidate,
    codec: TaskCodec,
    train: Sequence[Mapping[str, Any]],
    folder: Path,
    seed: int,
) -> tuple[nn.Module, int, int]:
    """A fresh model of a method, its trained parameters, and all parameters that it runs with."""
    torch.manual_seed(seed)
    pooling = "mean" if codec.task_type == "SEQ_CLS" else "first"
    head = HeadConfig(codec.task_type, len(codec.labels), pooling=pooling)
    backbone = AutoModel.from_pretrained(folder)
    size = sum(p.numel() for p in backbone.parameters())
    if method in PROMPT_METHODS:
        config = PTuningV2Config(
            codec.task_type,
            num_virtual_tokens=candidate.num_virtual_tokens,
            injection=method,
            prompt_init="text",
            heads={"task": head},
        )
        texts = starting_texts(train, candidate.num_virtual_tokens)
        model = get_ptv2_model(backbone, config, tokenizer=codec.tokenizer, init_text=texts)
    else:
        model = BaseWithHead(backbone, head, frozen=method == "head")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model, trained, trained if method == "full" else size + trained
