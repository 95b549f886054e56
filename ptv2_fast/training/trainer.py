"""transformers' Trainer with defaults that suit prompts: rate, padding, metric, the best epoch kept."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ptv2_fast import PTuningV2Model
from ptv2_fast.task_types import TASKS
from ptv2_fast.training.array_metrics import ArrayMetric, metric_of
from ptv2_fast.training.row_collator import RowCollator
from ptv2_fast.training.settings import FitSettings

_OF_FIT = FitSettings()


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """`transformers.TrainingArguments` with other defaults; whatever is given is taken as it is.

    The rate is 1e-2, for 10 epochs of batches of 32 rows, without weight decay, as the command line trains.
    With an evaluation set each epoch is scored and saved, and the best one is the model at the end; the best and the
    last checkpoint are kept. Without one each epoch is saved.

    Attributes:
        eval_strategy: None leaves it to `Trainer` of this module, which knows whether there is an evaluation set.
        save_strategy: the same.
        load_best_model_at_end: the same.

    Example:
        ```python
        from ptv2_fast.training import TrainingArguments

        args = TrainingArguments("run", num_train_epochs=3, use_cpu=True)
        assert args.learning_rate == 1e-2 and args.per_device_train_batch_size == 32
        ```
    """

    learning_rate: float = field(default=_OF_FIT.learning_rate)
    num_train_epochs: float = field(default=_OF_FIT.epochs)
    per_device_train_batch_size: int = field(default=_OF_FIT.batch_size)
    per_device_eval_batch_size: int = field(default=_OF_FIT.batch_size)
    weight_decay: float = field(default=_OF_FIT.weight_decay)
    # Autograd's version counters see what it writes; they do not see the default, fused one.
    optim: str = field(default="adamw_torch")
    eval_strategy: Any = field(default=None)
    save_strategy: Any = field(default=None)
    save_total_limit: int | None = field(default=2)
    load_best_model_at_end: Any = field(default=None)

    def __post_init__(self) -> None:
        """Fill in what is None, as without an evaluation set; remember what it was."""
        self.left_open = {
            name
            for name in ("eval_strategy", "save_strategy", "load_best_model_at_end", "metric_for_best_model")
            if getattr(self, name) is None
        }
        if "eval_strategy" in self.left_open:
            self.eval_strategy = "no"
        if "save_strategy" in self.left_open:
            self.save_strategy = "epoch" if self.eval_strategy == "no" else self.eval_strategy
        if "load_best_model_at_end" in self.left_open:
            self.load_best_model_at_end = False
        super().__post_init__()

    def completed(self, metric: ArrayMetric | None) -> TrainingArguments:
        """A copy for a run with an evaluation set: what was left open evaluates, saves and keeps the best epoch.

        Args:
            metric: what epochs are compared by, where the arguments do not say it; None is the loss.
        """
        args = copy.copy(self)
        if "eval_strategy" in self.left_open:
            args.eval_strategy, args.do_eval = IntervalStrategy.EPOCH, True
        if "save_strategy" in self.left_open:
            args.save_strategy = SaveStrategy(IntervalStrategy(args.eval_strategy).value)
        by_epoch = {IntervalStrategy(args.eval_strategy).value, SaveStrategy(args.save_strategy).value} == {"epoch"}
        if "load_best_model_at_end" in self.left_open:
            args.load_best_model_at_end = by_epoch
        if args.load_best_model_at_end and "metric_for_best_model" in self.left_open and metric is not None:
            args.metric_for_best_model, args.greater_is_better = metric.name, metric.greater_is_better
        elif args.load_best_model_at_end and args.metric_for_best_model is None:
            args.metric_for_best_model, args.greater_is_better = "loss", False
        return args


class Trainer(transformers.Trainer):
    """`transformers.Trainer` whose defaults suit the task of a wrapped model's active adapter.

    Rows are tokenized, as transformers' Trainer wants them, and need not be padded: they are padded with
    `processing_class` (the tokenizer), or with what the base's configuration says. Labels of a causal model are its
    tokens where the rows have none. With an evaluation set the task's scores are computed: accuracy and F1 of classes,
    F1 of entities (tags O, B-x and I-x; of others their accuracy), exact match and F1 of answers over tokens, accuracy
    of choices, correlations of numbers; of texts and vectors the loss alone.

    Every argument is transformers'; one that is given (`args`, `data_collator`, `compute_metrics`) is taken as it is.

    Raises:
        ValueError: the first row of a data set is no tokenized one; the message has its columns.

    Example:
        ```python
        from transformers import BertConfig, BertModel

        from ptv2_fast import PTuningV2Config, get_ptv2_model
        from ptv2_fast.training import Trainer, TrainingArguments

        base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        model = get_ptv2_model(base, PTuningV2Config("SEQ_CLS", heads={"topic": 2}))
        rows = [{"input_ids": [101, 1000 + i, 102], "labels": i % 2} for i in range(8)]
        args = TrainingArguments("run", num_train_epochs=2, report_to=[], use_cpu=True)
        trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        assert "eval_accuracy" in trainer.evaluate()  # of the best epoch
        ```
    """

    def __init__(
        self,
        model: Any = None,
        args: transformers.TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        compute_metrics: Any = None,
        preprocess_logits_for_metrics: Any = None,
        **others: Any,
    ) -> None:
        args = TrainingArguments() if args is None else args
        if isinstance(model, PTuningV2Model):
            task = TASKS[str(model.task_type)]
            if task.reads == "input_ids":
                for name, rows in (("train_dataset", train_dataset), *_named(eval_dataset)):
                    _check_tokenized(name, rows)
                if data_collator is None:
                    data_collator = RowCollator.of(model, processing_class)
            metric = metric_of(model) if compute_metrics is None else None
            if metric is not None:
                compute_metrics = metric.compute
                if preprocess_logits_for_metrics is None:
                    preprocess_logits_for_metrics = metric.keep
            if eval_dataset is not None and isinstance(args, TrainingArguments):
                args = args.completed(metric)
                if compute_metrics is None:
                    # Logits over a vocabulary fill the memory, and nobody reads them.
                    args.prediction_loss_only = True
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class,
            compute_metrics=compute_metrics, preprocess_logits_for_metrics=preprocess_logits_for_metrics, **others,
        )  # fmt: skip


def _named(eval_dataset: Any) -> Iterable[tuple[str, Any]]:
    """The evaluation set, or sets by their names."""
    if isinstance(eval_dataset, Mapping):
        return [(f"eval_dataset[{name!r}]", rows) for name, rows in eval_dataset.items()]
    return [("eval_dataset", eval_dataset)]


def _check_tokenized(name: str, rows: Any) -> None:
    """Refuse rows that are no tokens; of a stream the columns, where it knows them."""
    columns: Any = getattr(rows, "column_names", None)
    if not isinstance(columns, list) and hasattr(rows, "__getitem__") and hasattr(rows, "__len__") and len(rows):
        first = rows[0]
        columns = list(first) if isinstance(first, Mapping) else None
    if columns and not {"input_ids", "inputs_embeds"} & set(columns):
        raise ValueError(
            f"{name} must be tokenized: expected a column 'input_ids'; got {', '.join(map(str, columns))}. For "
            f"instance {name}.map(lambda row: tokenizer(row['text'], truncation=True)), with the labels in 'labels'"
        )
