"""Tokenized rows as anybody's data set has them, to batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ptv2_fast.model import PTuningV2Model
from ptv2_fast.task_types import IGNORED_LABEL, TASKS
from ptv2_fast.training.batches import PadCollator

# What data sets call labels, and models do not.
_LABELS = ("label", "label_ids")


@dataclass(frozen=True)
class Filling:
    """What stands for padding, where no tokenizer says it."""

    pad_token_id: int | None
    eos_token_id: int | None = None
    pad_token_type_id: int = 0
    padding_side: str = "right"

    @classmethod
    def of(cls, config: Any) -> Filling:
        """As a base's configuration says it."""
        pad, end = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
        return cls(pad, end[0] if isinstance(end, list) else end)


@dataclass(frozen=True)
class RowCollator:
    """Pads rows on the right as `PadCollator` does; labels of written text by themselves.

    Rows are mappings of lists or tensors, with "input_ids"; an "attention_mask" that is missing is ones, and "label" is
    another word for "labels".

    Attributes:
        pad: pads what is as long as input_ids.
        gives_text: "labels" are tokens of a text: input_ids themselves where rows have none, or, of an encoder-decoder,
            as long as they like.
        own_labels: labels are of another text than input_ids.
    """

    pad: PadCollator
    gives_text: bool = False
    own_labels: bool = False

    @classmethod
    def of(cls, model: PTuningV2Model, tokenizer: Any = None) -> RowCollator:
        """The collator for a model's active task."""
        filling = tokenizer if hasattr(tokenizer, "pad_token_id") else Filling.of(model.config)
        writes = TASKS[str(model.task_type)].gives == "text"
        return cls(PadCollator(filling, padding_side="right"), writes, model.task_type == "SEQ_2_SEQ_LM")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """(B, N) tensors of per-token lists and (B,) tensors of numbers; see `PadCollator`."""
        features = [self._plain(row) for row in rows]
        if not self.own_labels or not features or "labels" not in features[0]:
            return self.pad(features)
        labels = [feature.pop("labels") for feature in features]
        width = max(map(len, labels))
        filled = [[*row, *[IGNORED_LABEL] * (width - len(row))] for row in labels]
        return {**self.pad(features), "labels": torch.tensor(filled)}

    def _plain(self, row: Mapping[str, Any]) -> dict[str, Any]:
        feature = {}
        for name, value in row.items():
            if value is not None and not isinstance(value, str):
                feature["labels" if name in _LABELS else name] = value.tolist() if hasattr(value, "tolist") else value
        if "input_ids" in feature and "attention_mask" not in feature:
            feature["attention_mask"] = _ones(feature["input_ids"])
        if self.gives_text and not self.own_labels and "labels" not in feature:
            feature["labels"] = list(feature["input_ids"])
        return feature


def _ones(ids: Any) -> Any:
    return [_ones(row) if isinstance(row, list | tuple) else 1 for row in ids]
