"""Batches: padding of features to tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ptv2_fast.step.labelled_rows import predictable_labels
from ptv2_fast.task_types import IGNORED_LABEL

# Kept in a feature for decoding, never given to the model.
DECODING_KEYS = ("word_ids", "num_words", "offset_mapping", "example_index")
_POSITIONS = ("start_positions", "end_positions")


@dataclass(frozen=True)
class PadCollator:
    """Pads features to the longest of the batch and stacks them into tensors.

    Per-token lists (input_ids, attention_mask, token_type_ids, integer labels) are padded on the
    tokenizer's side, or on `padding_side`; numbers become (B,) tensors; lists of floats (several
    labels a row) are stacked as they are. Start and end positions move along with left padding.
    What only decoding needs (`DECODING_KEYS`) is left out. A tokenizer without a padding token
    pads with its end-of-text token, which the mask hides. Features of several rows each (lists of C
    lists, as choices have them) become (B, C, N), padded to the longest row of all.

    Args:
        tokenizer: gives the padding ids and the side.
        label_pad: what pads labels of tokens.
        pad_to_multiple_of: round the padded length up to a multiple of this.
        padding_side: "left" or "right"; None takes the tokenizer's.

    Raises:
        ValueError: an argument is not as expected, the features differ in their keys, or a list is
            not as long as its row's input_ids.

    Example:
        ```python
        from transformers import BertTokenizer

        from ptv2_fast.training.batches import PadCollator

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fine", "film"]
        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        rows = [{**tokenizer(text), "labels": label} for text, label in [("fine", 0), ("film film", 1)]]
        batch = PadCollator(tokenizer)(rows)
        assert batch["input_ids"].tolist() == [[2, 5, 3, 0], [2, 6, 6, 3]] and batch["labels"].tolist() == [0, 1]
        ```
    """

    tokenizer: Any
    label_pad: int = IGNORED_LABEL
    pad_to_multiple_of: int | None = None
    padding_side: str | None = None

    def __post_init__(self) -> None:
        if self.padding_side not in (None, "left", "right"):
            raise ValueError(f"padding_side: must be 'left', 'right' or None; got {self.padding_side!r}")
        multiple = self.pad_to_multiple_of
        if multiple is not None and (not isinstance(multiple, int) or multiple < 1):
            raise ValueError(f"pad_to_multiple_of: must be a positive integer or None; got {multiple!r}")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """(B, N) tensors of per-token lists and (B,) tensors of numbers, int64 (floats float32)."""
        if not features:
            raise ValueError("features: expected at least one row; got none")
        _check_keys(features)
        if _is_nested(features[0]["input_ids"]):
            return self._groups(features)
        nested = next((index for index, feature in enumerate(features) if _is_nested(feature["input_ids"])), None)
        if nested is not None:
            raise ValueError(f"features[{nested}]: expected a single row as in features[0]; got several")
        lengths = [len(feature["input_ids"]) for feature in features]
        width = max(lengths)
        multiple = self.pad_to_multiple_of or 1
        width = -(-width // multiple) * multiple
        left = (self.padding_side or self.tokenizer.padding_side) == "left"
        keys = [key for key in features[0] if key not in DECODING_KEYS]
        batch = {}
        for key in keys:
            values = [feature[key] for feature in features]
            if key in _POSITIONS and left:
                values = [value + width - length for value, length in zip(values, lengths, strict=True)]
            if _is_sequence(values[0]) and not _holds_floats(values):
                values = self._pad(key, values, lengths, width, left)
            kind = torch.float32 if _holds_floats(values) else torch.int64
            batch[key] = torch.tensor(values, dtype=kind)
        return batch

    def _groups(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """(B, C, N) of features that are C rows each; what is no list of lists is of the whole feature."""
        count = len(features[0]["input_ids"])
        of_rows = [key for key, value in features[0].items() if _is_nested(value)]
        for index, feature in enumerate(features):
            _check_rows(f"features[{index}]", feature, of_rows, count)
        rows = [{key: feature[key][row] for key in of_rows} for feature in features for row in range(count)]
        batch = {key: tensor.unflatten(0, (-1, count)) for key, tensor in self(rows).items()}
        kept = [key for key in features[0] if key not in of_rows and key not in DECODING_KEYS]
        return {**batch, **{key: torch.tensor([feature[key] for feature in features]) for key in kept}}

    def _pad(self, key: str, rows: list[Any], lengths: list[int], width: int, left: bool) -> list[list[int]]:
        filler = self._filler(key)
        padded = []
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if len(row) != length:
                raise ValueError(f"features[{index}]: expected {key!r} as long as input_ids ({length}); got {len(row)}")
            padding = [filler] * (width - length)
            padded.append(padding + list(row) if left else list(row) + padding)
        return padded

    def _filler(self, key: str) -> int:
        if key == "labels":
            return self.label_pad
        if key == "input_ids":
            candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
            return next(candidate for candidate in candidates if candidate is not None)
        if key == "token_type_ids":
            return self.tokenizer.pad_token_type_id
        if key == "special_tokens_mask":
            return 1
        return 0


@dataclass(frozen=True)
class PredictableLabels:
    """A collator of a causal model's batches without the labels that nothing predicts: those behind padding in front.

    A wrapped model leaves them out of its loss by itself. Trainer counts labels before the model sees them, and its
    label smoothing takes them away from the model: with this collator both are of the labels that are predicted, over
    any number of accumulated batches and processes.

    Args:
        collator: gives "labels" and "attention_mask", (B, N) both; a batch without either comes back as it is.

    Example:
        ```python
        import torch

        from ptv2_fast.training.batches import PredictableLabels

        ids = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]])
        batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids}
        collator = PredictableLabels(lambda features: batch)  # a data collator in its place
        assert collator([])["labels"][:, 1:].tolist() == [[-100, -100, 6], [6, 7, 8]]  # nothing predicts the first
        ```
    """

    collator: Callable[[list[Any]], Any]

    def __call__(self, features: list[Any]) -> Any:
        """The collator's batch."""
        batch = self.collator(features)
        if "labels" in batch and "attention_mask" in batch:
            batch["labels"] = predictable_labels(batch["labels"], batch["attention_mask"])
        return batch

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # while a copy is made
            raise AttributeError(name)
        return getattr(self.collator, name)


def _check_keys(features: Sequence[Mapping[str, Any]]) -> None:
    for key in features[0]:
        missing = [index for index, feature in enumerate(features) if key not in feature]
        if missing and key not in DECODING_KEYS:
            raise ValueError(f"features[{missing[0]}]: expected {key!r} as in features[0]")


def _check_rows(where: str, feature: Mapping[str, Any], of_rows: Sequence[str], count: int) -> None:
    """Refuse a feature of another number of rows, or whose lists are not as long as input_ids."""
    for key in of_rows:
        rows = feature[key]
        if not _is_nested(rows) or len(rows) != count:
            got = "a single row" if len(rows) and not _is_nested(rows) else len(rows)
            raise ValueError(f"{where}: expected {count} rows as in features[0]; got {got} in {key!r}")
        lengths, own = [[len(row) for row in feature[name]] for name in ("input_ids", key)]
        if own != lengths and not _holds_floats(rows):
            raise ValueError(f"{where}: expected {key!r} as long as input_ids ({lengths}); got {own}")


def _is_sequence(value: object) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, torch.Tensor) and value.dim() > 0)


def _is_nested(value: Any) -> bool:
    return _is_sequence(value) and len(value) > 0 and _is_sequence(value[0])


def _holds_floats(values: Sequence[Any]) -> bool:
    return any(isinstance(item, float) for value in values for item in (value if _is_sequence(value) else (value,)))


def length_of(feature: Mapping[str, Any]) -> int:
    """How long a feature's longest row is."""
    ids = feature["input_ids"]
    return max(map(len, ids)) if _is_nested(ids) else len(ids)
