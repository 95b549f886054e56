"""transformers' Trainer with defaults that suit prompts: rate, padding, metric, the best epoch kept."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch.utils.data import IterableDataset
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType, set_seed

from ptv2_fast import PTuningV2Model
from ptv2_fast.task_types import TASKS
from ptv2_fast.training.array_metrics import ArrayMetric, metric_of, problem_of
from ptv2_fast.training.metrics import SMALLER_IS_BETTER
from ptv2_fast.training.row_collator import RowCollator
from ptv2_fast.training.settings import FitSettings

_OF_FIT = FitSettings()


# What is None until it is known whether there is an evaluation set, and what it is scored by.
_OPEN = ("eval_strategy", "save_strategy", "load_best_model_at_end", "metric_for_best_model", "greater_is_better")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """`transformers.TrainingArguments` with other defaults; whatever is given is taken as it is.

    The rate is 1e-2, for 10 epochs of batches of 32 rows, without weight decay, as the command line trains.
    With an evaluation set each epoch is scored and saved, and the best one is the model at the end; the best and the
    last checkpoint are kept. Without one each epoch is saved. Memory is pinned where there is an accelerator.

    Attributes:
        eval_strategy: None leaves it to `Trainer` of this module, which knows whether there is an evaluation set.
        save_strategy: the same.
        load_best_model_at_end: the same.
        metric_for_best_model: None means the task's; of several evaluation sets the first one's, where it names none.

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
    # Where there is nothing to pin for, torch warns of it in each epoch.
    dataloader_pin_memory: bool = field(default_factory=torch.accelerator.is_available)
    eval_strategy: str | None = field(default=None)  # type: ignore[assignment]
    save_strategy: str | None = field(default=None)  # type: ignore[assignment]
    save_total_limit: int | None = field(default=2)
    load_best_model_at_end: bool | None = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Fill in what is None, as without an evaluation set; remember what it was and what it became."""
        left_open = {name for name in _OPEN if getattr(self, name) is None}
        plateau = self.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
        if "eval_strategy" in left_open and (self.load_best_model_at_end or plateau):
            # Both need scores, and cannot wait for what Trainer knows.
            left_open.remove("eval_strategy")
            steps = self.load_best_model_at_end and self.save_strategy == "steps"
            self.eval_strategy = "steps" if steps else "epoch"
        elif "eval_strategy" in left_open:
            self.eval_strategy = "no"
        if "save_strategy" in left_open:
            self.save_strategy = "epoch" if self.eval_strategy == "no" else self.eval_strategy
        if "load_best_model_at_end" in left_open:
            self.load_best_model_at_end = False
        super().__post_init__()
        self._filled_in = {name: getattr(self, name) for name in left_open}

    @property
    def left_open(self) -> set[str]:
        """What nobody has said, neither when these arguments were made nor since."""
        return {name for name, value in self._filled_in.items() if getattr(self, name) == value}

    def completed(self, metric: ArrayMetric | None, sets: Sequence[str] = ()) -> TrainingArguments:
        """A copy for a run with an evaluation set: what was left open evaluates, saves and keeps the best epoch.

        Args:
            metric: what epochs are compared by, where the arguments do not say it; None is the loss.
            sets: the names of several evaluation sets, of which the first is compared where the arguments name none.
        """
        args, left_open = copy.copy(self), self.left_open
        if "eval_strategy" in left_open:
            args.eval_strategy, args.do_eval = IntervalStrategy.EPOCH, True
        if "save_strategy" in left_open and args.eval_strategy != IntervalStrategy.NO:
            args.save_strategy = SaveStrategy(IntervalStrategy(args.eval_strategy).value)
        by_epoch = {IntervalStrategy(args.eval_strategy).value, SaveStrategy(args.save_strategy).value} == {"epoch"}
        if "load_best_model_at_end" in left_open:
            args.load_best_model_at_end = by_epoch
        if args.load_best_model_at_end and "metric_for_best_model" in left_open and metric is not None:
            args.metric_for_best_model, args.greater_is_better = metric.name, metric.greater_is_better
        elif args.load_best_model_at_end and args.metric_for_best_model is None:
            args.metric_for_best_model, args.greater_is_better = "loss", False
        name = (args.metric_for_best_model or "").removeprefix("eval_")
        if name and "greater_is_better" in left_open:
            # What scores of somebody's own mean is not known: only their loss is.
            args.greater_is_better = not name.endswith("loss" if metric is None else SMALLER_IS_BETTER)
        if name and sets and not any(name.startswith(f"{one}_") for one in sets):
            args.metric_for_best_model = f"{sets[0]}_{name}"
        if args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU:
            given: Any = args.lr_scheduler_kwargs or {}
            args.lr_scheduler_kwargs = {"mode": "max" if args.greater_is_better else "min", **given}
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
        ValueError: the first row of a data set is no tokenized one, and the message has its columns; or a training set
            is several sets.

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
        model_init: Any = None,
        *,
        compute_metrics: Any = None,
        preprocess_logits_for_metrics: Any = None,
        **others: Any,
    ) -> None:
        args = TrainingArguments() if args is None else args
        self._first_model = made = None
        if model is None and model_init is not None:
            # Which task it is for must be known beforehand: the first model is made here.
            set_seed(args.seed)
            self.model_init = model_init
            self._first_model = made = self.call_model_init()
        prompted = model if made is None else made
        if isinstance(prompted, PTuningV2Model):
            task = TASKS[str(prompted.task_type)]
            named = list(_named(eval_dataset))
            if task.reads == "input_ids":
                for name, rows in (("train_dataset", train_dataset), *named):
                    _check_tokenized(name, rows)
            looked_at = (_first_row(rows) for rows in (train_dataset, *(rows for _, rows in named)))
            problem = problem_of(prompted, next((row for row in looked_at if row is not None), None))
            if task.reads == "input_ids" and data_collator is None:
                data_collator = RowCollator.of(prompted, processing_class, problem)
            metric = metric_of(prompted, problem) if compute_metrics is None else None
            if metric is not None:
                compute_metrics = metric.compute
                if preprocess_logits_for_metrics is None:
                    preprocess_logits_for_metrics = metric.keep
            if eval_dataset is not None and isinstance(args, TrainingArguments):
                args = args.completed(metric, list(eval_dataset) if isinstance(eval_dataset, Mapping) else ())
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init,
            compute_metrics=compute_metrics, preprocess_logits_for_metrics=preprocess_logits_for_metrics, **others,
        )  # fmt: skip
        self._optimizer_is_given = self.optimizer is not None
        self._task = getattr(self.model, "task_type", None)
        self._gives_spans = self._task is not None and TASKS[self._task].gives == "span"

    def call_model_init(self, trial: Any = None) -> Any:
        """A fresh model; the first one is there already."""
        made, self._first_model = self._first_model, None
        return super().call_model_init(trial) if made is None else made

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """transformers' own; made anew where another adapter trains than the last time.

        Raises:
            ValueError: what a given optimizer has of the model is frozen; or the adapter that was chosen is for
                another task.
        """
        task = getattr(self.model, "task_type", None)
        if task != self._task:
            raise ValueError(f"the active adapter must be for {self._task}, as when this Trainer was made; got {task}")
        if self.optimizer is not None and self._optimizer_is_stale():
            if self._optimizer_is_given:
                raise ValueError(
                    "optimizers[0] must have parameters that train; got frozen ones: choose the adapter, then make it"
                )
            self.optimizer = None
        return super().create_optimizer(*args, **kwargs)

    def _optimizer_is_stale(self) -> bool:
        """Whether all that the optimizer has of the model is frozen."""
        groups: Any = getattr(self.optimizer, "param_groups", [])
        there = {id(parameter) for group in groups for parameter in group["params"]}
        model: Any = self.model
        return {parameter.requires_grad for parameter in model.parameters() if id(parameter) in there} == {False}

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """transformers' own; no answer begins or ends in padding, of which another batch has more."""
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        mask = inputs.get("attention_mask")
        if self._gives_spans and isinstance(logits, tuple) and mask is not None:
            sides = (side.masked_fill(mask == 0, torch.finfo(side.dtype).min) for side in logits[:2])
            logits = (*sides, *logits[2:])
        return loss, logits, labels


def _named(eval_dataset: Any) -> Iterable[tuple[str, Any]]:
    """The evaluation set, or sets by their names."""
    if isinstance(eval_dataset, Mapping):
        return [(f"eval_dataset[{name!r}]", rows) for name, rows in eval_dataset.items()]
    return [("eval_dataset", eval_dataset)]


def _first_row(rows: Any) -> Mapping[str, Any] | None:
    """The first row of a data set that is no stream."""
    if isinstance(rows, IterableDataset) or not (hasattr(rows, "__getitem__") and hasattr(rows, "__len__")):
        return None
    first = rows[0] if len(rows) else None
    return first if isinstance(first, Mapping) else None


def _check_tokenized(name: str, rows: Any) -> None:
    """Refuse several sets, and rows that are no tokens; of a stream the columns, where it knows them."""
    if isinstance(rows, Mapping):
        raise ValueError(f"{name} must be one data set; got several: {', '.join(map(str, rows))}")
    columns: Any = getattr(rows, "column_names", None)
    if not isinstance(columns, list):
        columns = list(_first_row(rows) or ())
    if columns and not {"input_ids", "inputs_embeds"} & set(columns):
        raise ValueError(
            f"{name} must be tokenized: expected a column 'input_ids'; got {', '.join(map(str, columns))}. For "
            f"instance {name}.map(lambda row: tokenizer(row['text'], truncation=True)), with the labels in 'labels'"
        )
