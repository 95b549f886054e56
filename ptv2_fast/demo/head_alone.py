"""The head alone over the frozen encoder: what a task gets without prompts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import TokenClassifierOutput

from ptv2_fast import PTuningV2Model
from ptv2_fast.config import HeadConfig
from ptv2_fast.heads import Head, classification_loss


class HeadAlone(nn.Module):
    """A trained head on hidden states that the bare base computes once for each row, since nothing changes them.

    Args:
        model: whose base is read, without any adapter.
        config: of the head.
    """

    def __init__(self, model: PTuningV2Model, config: HeadConfig):
        super().__init__()
        self.head = Head(model.config.hidden_size, config)
        # In a tuple it is no child: neither trained nor in a checkpoint.
        self._outside = (model,)
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> TokenClassifierOutput:
        """Logits of rows (B, N), padded on the right, int64; with labels, their loss."""
        lengths = attention_mask.sum(-1).tolist()
        keys = [tuple(row[:length]) for row, length in zip(input_ids.tolist(), lengths, strict=True)]
        missing = [index for index, key in enumerate(keys) if key not in self._kept]
        if missing:
            states = self._states(input_ids[missing], attention_mask[missing])
            for index, state in zip(missing, states, strict=True):
                self._kept[keys[index]] = state[: lengths[index]].clone()
        hidden = pad_sequence([self._kept[key] for key in keys], batch_first=True)
        logits = self.head(hidden, attention_mask)
        return TokenClassifierOutput(None if labels is None else classification_loss(logits, labels), logits)

    @torch.no_grad()
    def _states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, N, D) of the bare base, where the head is."""
        (model,) = self._outside
        device = next(model.parameters()).device
        model.eval()
        with model.disable_adapter():
            output = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device))
        return output.last_hidden_state.to(input_ids.device)
