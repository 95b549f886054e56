"""The demo's two tasks: their data, and the settings that a search on part of the training rows chose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptv2_fast.config import HeadConfig, PTuningV2Config
from ptv2_fast.training.data import LabelSet, read_examples
from ptv2_fast.training.fit import FitSettings
from ptv2_fast.training.task_data import TaskCodec

DATA = Path(__file__).parent / "data"
MAX_LENGTH = 64
# Every so many training rows, one is scored after each epoch instead of being trained on: for the curves alone, since
# the best epoch of so few rows is one by chance.
_DEV_STRIDE = 8
_FAST_ROWS = 24


@dataclass(frozen=True)
class DemoTask:
    """One task of the demo.

    Attributes:
        name: of the adapter, its folder and its files.
        what: what it does, for people.
        task_type: SEQ_CLS or TOKEN_CLS.
        suffix: of the data files.
        pooling: what the head reads.
        num_virtual_tokens, learning_rate, epochs, batch_size: how it is trained.
    """

    name: str
    what: str
    task_type: str
    suffix: str
    pooling: str
    num_virtual_tokens: int
    learning_rate: float
    epochs: int
    batch_size: int

    def settings(self, *, fast: bool = False) -> FitSettings:
        """How long and how fast; `fast` makes a single epoch."""
        epochs = 1 if fast else self.epochs
        return FitSettings(
            learning_rate=self.learning_rate, epochs=epochs, batch_size=self.batch_size, restore_best=False
        )

    def config(self, labels: LabelSet, *, fast: bool = False) -> PTuningV2Config:
        """A deep prompt that starts from training text, and a linear head."""
        head = HeadConfig(self.task_type, len(labels), pooling=self.pooling, labels=labels.names)
        length = 4 if fast else self.num_virtual_tokens
        return PTuningV2Config(self.task_type, num_virtual_tokens=length, prompt_init="text", heads={self.name: head})

    def load(self, tokenizer: Any, *, fast: bool = False) -> tuple[TaskCodec, dict[str, list[dict[str, Any]]]]:
        """The codec, and the examples of "train", "dev" (part of the training file) and "test"."""
        train = read_examples(DATA / f"{self.name}_train{self.suffix}", self.task_type)
        labels = LabelSet.from_examples(train)
        test = read_examples(DATA / f"{self.name}_test{self.suffix}", self.task_type, labels=labels)
        splits = {
            "train": [row for index, row in enumerate(train) if index % _DEV_STRIDE],
            "dev": train[::_DEV_STRIDE],
            "test": test,
        }
        if fast:
            splits = {name: rows[:_FAST_ROWS] for name, rows in splits.items()}
        return TaskCodec(self.task_type, tokenizer, labels, MAX_LENGTH), splits


# Measured with MiniLM on the training files alone. Sentiment, two folds of 88 rows scored after the last of 8 epochs:
# 73 % at (32, 5e-3) and (64, 5e-3), 74 % at (32, 1e-2) and for the head alone, give or take 3. Entities, trained on
# three quarters: F1 0.81 at (32, 3e-2), 0.80 at (32, 2e-2) and (64, 3e-2).
TASKS = (
    DemoTask("sentiment", "is a sentence positive or negative?", "SEQ_CLS", ".tsv", "mean", 32, 5e-3, 8, 16),
    DemoTask("ner", "which words name people, places, companies?", "TOKEN_CLS", ".conll", "first", 32, 3e-2, 10, 16),
)

SENTENCES = (
    "The staff at Hotel Miramar in Lisbon were kind, and the breakfast was wonderful.",
    "Maria Costa gave a beautiful concert in Porto last night.",
    "My new phone from Northwind Electronics broke after a week, and nobody there would help.",
)
