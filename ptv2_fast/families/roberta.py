"""RoBERTa and XLM-R: BERT's shape, with positions that count from padding_idx + 1."""

from __future__ import annotations

from transformers import PreTrainedModel

from ptv2_fast.families.bert import Bert


class Roberta(Bert):
    def first_position(self, backbone: PreTrainedModel) -> int:
        """Padding has the position padding_idx; text starts behind it."""
        first: int = backbone.embeddings.padding_idx + 1
        return first
