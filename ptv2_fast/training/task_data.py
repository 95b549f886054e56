"""What a task's examples become: features for the model, batches, and text for a prompt to start from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from typing import Any

from ptv2_fast.task_types import TASKS, TaskType
from ptv2_fast.training.batches import PadCollator
from ptv2_fast.training.chat import is_chat
from ptv2_fast.training.labels import LabelSet
from ptv2_fast.training.metrics import Metric, metric_for
from ptv2_fast.training.tasks import TrainingTask, task_row, training_task

# Tokens of a row where nobody says otherwise.
DEFAULT_MAX_LENGTH = {name: task.max_length for name, task in TASKS.items() if task.max_length is not None}


@dataclass(frozen=True)
class TaskCodec:
    """How the examples of one task meet one tokenizer.

    Attributes:
        task_type: SEQ_CLS, TOKEN_CLS, QUESTION_ANS, MULTIPLE_CHOICE, SENTENCE_RETRIEVAL or CAUSAL_LM.
        tokenizer: a fast tokenizer.
        labels: the classes or tags in the order of the model's outputs; None for the other tasks.
        max_length: the most tokens of a row; None, filled in, means the task's usual length.
        doc_stride: tokens that neighbouring windows of a context share (QUESTION_ANS).
        no_answer: whether a question may have no answer (QUESTION_ANS).
        problem_type: what a SEQ_CLS head solves, as `HeadConfig` says it; None is one class for each row.

    Raises:
        ValueError: the task is none of these, or a number is out of range.

    Example:
        ```python
        from transformers import BertTokenizer

        from ptv2_fast.training.data import LabelSet
        from ptv2_fast.training.task_data import TaskCodec

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fine", "film"]
        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        codec = TaskCodec("SEQ_CLS", tokenizer, LabelSet(("bad", "good")), max_length=16)
        features = codec.encode([{"text": "fine film", "label": "good"}])
        assert features[0]["input_ids"] == [2, 5, 6, 3] and features[0]["labels"] == 1
        ```
    """

    task_type: str
    tokenizer: Any
    labels: LabelSet | None = None
    max_length: int = None  # type: ignore[assignment]
    doc_stride: int = 128
    no_answer: bool = False
    problem_type: str | None = None

    def __post_init__(self) -> None:
        training_task(self.task_type, self.problem_type)
        if self.max_length is None:
            object.__setattr__(self, "max_length", DEFAULT_MAX_LENGTH[self.task_type])
        if not isinstance(self.max_length, int) or self.max_length < 2:
            raise ValueError(f"max_length must be an integer of at least 2; got {self.max_length!r}")
        if not isinstance(self.doc_stride, int) or self.doc_stride < 0:
            raise ValueError(f"doc_stride must be an integer of at least 0; got {self.doc_stride!r}")

    @property
    def row(self) -> TaskType:
        """The task's row, for what its head solves."""
        return task_row(self.task_type, self.problem_type)

    @property
    def task(self) -> TrainingTask:
        """What is done for the task."""
        return training_task(self.task_type, self.problem_type)

    @property
    def metric(self) -> Metric:
        """How predictions are scored."""
        return metric_for(self.task_type, self.problem_type)

    @property
    def known_labels(self) -> LabelSet:
        """The classes or tags of a task that has them.

        Raises:
            ValueError: the codec has none.
        """
        if self.labels is None:
            raise ValueError(f"labels must be given for task_type {self.task_type!r}; got None")
        return self.labels

    @property
    def collator(self) -> PadCollator:
        """Pads on the right: scores and spans are then read from the row's start."""
        return PadCollator(self.tokenizer, padding_side="right")

    def encode(self, examples: Sequence[Mapping[str, Any]], *, quiet: bool = False) -> list[dict[str, Any]]:
        """Features of the examples; one each, but windows of long contexts and long texts.

        What max_length cuts off is counted in a warning, unless `quiet`.

        Args:
            examples: as `read_examples` gives them; without labels the features have none.
            quiet: whether nothing is warned of.

        Raises:
            ValueError: an example does not fit the task, the labels or max_length.
        """
        for index, example in enumerate(examples):
            if not any(all(name in example for name in names) for names in self.task.needs):
                expected = ", or ".join(" and ".join(map(repr, names)) for names in self.task.needs)
                raise ValueError(
                    f"examples[{index}] must have {expected} for task_type {self.task_type!r}; got {', '.join(example)}"
                )
        return self.task.encode(examples, self, quiet)


def starting_texts(examples: Iterable[Mapping[str, Any]], count: int) -> list[str]:
    """Texts of at most `count` examples, classes in turn, for `prompt_init="text"`.

    A prompt of P tokens never needs more than P texts; taken in turn, each class has its share of
    the few that a short prompt holds.
    """
    by_class: dict[str, list[str]] = {}
    for example in examples:
        by_class.setdefault(example.get("label", ""), []).append(_text_of(example))
    turns = chain.from_iterable(zip_longest(*by_class.values()))
    return list(islice((text for text in turns if text is not None), count))


def _text_of(example: Mapping[str, Any]) -> str:
    if "tokens" in example:
        return " ".join(example["tokens"])
    if is_chat(example):
        messages = example.get("messages") or [*example["prompt"], *example.get("completion", ())]
        return " ".join(message["content"] for message in messages)
    names = ("text", "text_pair", "question", "context", "prompt", "completion", "query", "positive")
    return " ".join([*(example[name] for name in names if name in example), *example.get("choices", ())])
