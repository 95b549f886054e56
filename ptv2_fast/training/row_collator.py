"""Tokenized rows as anybody's data set has them, to batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ptv2_fast.model import PTuningV2Model
from ptv2_fast.task_types import IGNORED_LABEL, SINGLE_LABEL, TASKS
from ptv2_fast.training.array_metrics import LABELS, problem_of
from ptv2_fast.training.batches import PadCollator


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

    Rows are mappings of lists or tensors, with "input_ids" or "inputs_embeds" (N, E); an "attention_mask" that is
    missing is ones, and "label" is another word for "labels" where a row has none. A text that is a batch of one, as a
    tokenizer's `return_tensors` makes it, is that text.

    Attributes:
        pad: pads what is as long as input_ids.
        gives_text: "labels" are tokens of a text: input_ids themselves without their padding where rows have none, or,
            of an encoder-decoder, as long as they like. A number or a name beside it is of no use and left out.
        own_labels: labels are of another text than input_ids.
        in_groups: an example is several texts.
        numbers: labels are floating-point numbers, whatever a data set writes them as.

    Raises:
        ValueError: a row is no mapping, or its labels are names; or as `PadCollator`.
    """

    pad: PadCollator
    gives_text: bool = False
    own_labels: bool = False
    in_groups: bool = False
    numbers: bool = False

    @classmethod
    def of(cls, model: PTuningV2Model, tokenizer: Any = None, problem: str | None = None) -> RowCollator:
        """The collator for a model's active task.

        Args:
            problem: as `problem_of` gives it; None asks the model alone.
        """
        filling = tokenizer if hasattr(tokenizer, "pad_token_id") else Filling.of(model.config)
        task = TASKS[str(model.task_type)]
        problem = problem_of(model) if problem is None else problem
        return cls(
            PadCollator(filling, padding_side="right"),
            gives_text=task.gives == "text",
            own_labels=model.task_type == "SEQ_2_SEQ_LM",
            in_groups=task.in_groups,
            numbers=task.solves_others and problem != SINGLE_LABEL,
        )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """(B, N) tensors of per-token lists and (B,) tensors of numbers; see `PadCollator`."""
        features = [self._plain(row) for row in rows]
        apart = {}
        if self.own_labels and features and "labels" in features[0]:
            labels = [feature.pop("labels") for feature in features]
            width = max(map(len, labels))
            apart["labels"] = torch.tensor([[*row, *[IGNORED_LABEL] * (width - len(row))] for row in labels])
        if features and "input_ids" not in features[0] and "inputs_embeds" in features[0]:
            texts = [torch.as_tensor(feature.pop("inputs_embeds")) for feature in features]
            apart["inputs_embeds"] = pad_sequence(texts, batch_first=True)
            lengths = ({"input_ids": [0] * len(text), "attention_mask": [1] * len(text)} for text in texts)
            features = [{**length, **feature} for length, feature in zip(lengths, features, strict=True)]
        batch = self.pad(features)
        if "inputs_embeds" in apart:
            del batch["input_ids"]
        return {**batch, **apart}

    def _plain(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(row, Mapping):
            raise ValueError(f"rows must be mappings of names to lists or numbers; got {type(row).__name__}")
        feature = {}
        for name, value in row.items():
            if name not in LABELS and value is not None and not isinstance(value, str):
                feature[name] = value.tolist() if hasattr(value, "tolist") else value
        labels = self._labels(row)
        if labels is not None:
            feature["labels"] = labels
        if not self.in_groups and _is_one_text(feature.get("input_ids")):
            feature = {name: value[0] if _is_one_text(value) else value for name, value in feature.items()}
        if "input_ids" in feature and "attention_mask" not in feature:
            feature["attention_mask"] = _ones(feature["input_ids"])
        if self.gives_text and not self.own_labels and "input_ids" in feature and "labels" not in feature:
            pairs = zip(feature["input_ids"], feature["attention_mask"], strict=True)
            feature["labels"] = [token if seen else IGNORED_LABEL for token, seen in pairs]
        return feature

    def _labels(self, row: Mapping[str, Any]) -> Any:
        """A row's labels as plain numbers; None where it has none."""
        for name in LABELS:
            value: Any = row.get(name)
            value = value.tolist() if hasattr(value, "tolist") else value
            if value is None or (self.gives_text and not isinstance(value, list | tuple)):
                continue
            if isinstance(value, str) or (isinstance(value, list | tuple) and value and isinstance(value[0], str)):
                raise ValueError(
                    f"{name!r} must be numbers, not names (the model's config.label2id has the number of each); "
                    f"got {value!r}"
                )
            return _as_floats(value) if self.numbers else value
        return None


def _is_one_text(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], list | tuple)


def _as_floats(labels: Any) -> Any:
    return [float(label) for label in labels] if isinstance(labels, list | tuple) else float(labels)


def _ones(ids: Any) -> Any:
    return [_ones(row) if isinstance(row, list | tuple) else 1 for row in ids]
