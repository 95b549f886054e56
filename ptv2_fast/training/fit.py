"""Training: one function around transformers' Trainer, with the paper's habits as defaults.

AdamW without weight decay, gradients clipped to a norm of 1, the rate falling linearly to zero or
by a factor each epoch, rows of similar length in one batch, the best epoch on dev restored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ptv2_fast import PTuningV2Model
from ptv2_fast.saving.checkpoint import TRAINER_WEIGHTS_NAME
from ptv2_fast.storage.files import write_whole
from ptv2_fast.storage.tensors import read_safetensors, write_tensors
from ptv2_fast.training.checkpoints import last_whole
from ptv2_fast.training.metrics import Metric
from ptv2_fast.training.predict import evaluate
from ptv2_fast.training.progress import TrainingProgress
from ptv2_fast.training.settings import FitSettings as FitSettings
from ptv2_fast.training.task_data import TaskCodec

# The loss is logged this often an epoch: enough points for a curve, few enough to cost nothing.
_LOGS_PER_EPOCH = 10


@dataclass(frozen=True)
class FitResult:
    """What a training run left behind, beside the trained model.

    Attributes:
        metric: the name that epochs are compared by.
        best_epoch: the epoch whose weights the model has; the last one without dev rows or `restore_best`.
        scores: that epoch's dev scores by name; empty without dev rows.
        history: the records of `Trainer.state.log_history`.
        epochs: epochs trained, those before a resume included.
        seconds: wall time of this call.
        tokens_per_second: real tokens through training steps, a second spent in them.
        rows_per_second: rows, in the same way.
        rows: how many were trained on; windows of a long text are rows of their own.
        dev_rows: how many were scored.
    """

    metric: str
    best_epoch: int
    scores: Mapping[str, float]
    history: Sequence[Mapping[str, Any]] = field(repr=False)
    epochs: float
    seconds: float
    tokens_per_second: float
    rows_per_second: float
    rows: int
    dev_rows: int


class Diverged(RuntimeError):
    """The loss or the weights are no numbers any more.

    `kept` describes the epoch before that whose weights the model has got back; None where there was none.
    """

    def __init__(self, message: str, kept: FitResult | None = None):
        super().__init__(message)
        self.kept = kept


def fit(
    model: nn.Module,
    codec: TaskCodec,
    train: Sequence[Mapping[str, Any]],
    dev: Sequence[Mapping[str, Any]] | None = None,
    *,
    settings: FitSettings,
    checkpoints: str | Path,
    resume: bool = False,
    title: str | None = "training",
    callbacks: Sequence[TrainerCallback] = (),
    device: str | None = None,
) -> FitResult:
    """Train what `model` does not freeze; afterwards it has the best epoch's weights, or the last one's.

    Args:
        model: returns a loss for the codec's features: a PTuningV2Model or any other module.
        codec: the task and how examples become features.
        train: examples as `read_examples` gives them.
        dev: the same, to score each epoch on; without them the last epoch is kept.
        settings: how long and how fast.
        checkpoints: a folder for Trainer's checkpoints, one an epoch, the best and the last kept.
        resume: go on from the last whole checkpoint there, if there is one.
        title: what the progress bar is called; None shows no bar.
        callbacks: further Trainer callbacks.
        device: "cpu" stays there; anything else leaves the choice to Trainer, which takes a GPU where it sees one.

    Raises:
        ValueError: early stopping without dev rows, or rows that the codec refuses.
        Diverged: the loss or the weights are no numbers any more.

    Example:
        ```python
        from transformers import BertConfig, BertModel, BertTokenizer

        from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model
        from ptv2_fast.training.data import LabelSet
        from ptv2_fast.training.fit import FitSettings, fit
        from ptv2_fast.training.task_data import TaskCodec

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fine", "poor", "film"]
        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        head = HeadConfig("SEQ_CLS", 2, labels=["bad", "good"])
        model = get_ptv2_model(base, PTuningV2Config("SEQ_CLS", heads={"opinion": head}))
        rows = [{"text": "fine film", "label": "good"}, {"text": "poor film", "label": "bad"}] * 8
        codec = TaskCodec("SEQ_CLS", tokenizer, LabelSet(("bad", "good")))
        settings = FitSettings(epochs=2, batch_size=4)
        result = fit(model, codec, rows, rows, settings=settings, checkpoints="run", device="cpu")
        print(result.metric, result.scores[result.metric])
        ```
    """
    if settings.early_stopping is not None and not dev:
        raise ValueError(f"early_stopping needs dev rows to watch; got {settings.early_stopping!r} and none")
    metric = codec.metric
    features = codec.encode(train)
    clock = _Clock()
    guard = _Guard(settings)
    watchers: list[TrainerCallback] = [clock, guard, *callbacks]
    if settings.early_stopping is not None:
        watchers.append(EarlyStoppingCallback(settings.early_stopping))
    with ExitStack() as stack:
        if title is not None:
            watchers.append(stack.enter_context(TrainingProgress(metric.name, title)))
        trainer = _Trainer(
            model=model,
            args=_arguments(settings, checkpoints, len(features), metric if dev else None, device),
            data_collator=codec.collator,
            train_dataset=features,
            eval_dataset=list(dev) if dev else None,
            callbacks=watchers,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.settings, trainer.codec, trainer.clock, trainer.guard = settings, codec, clock, guard
        trainer.dev_features = codec.encode(dev) if dev else []
        start = time.perf_counter()
        guard.saved = last_whole(Path(checkpoints)) if resume else None
        diverged: Diverged | None = None
        try:
            trainer.train(resume_from_checkpoint=guard.saved)
        except Diverged as error:
            diverged = error
            best = trainer.state.best_model_checkpoint if settings.restore_best else None
            if guard.saved is not None:
                trainer._load_from_checkpoint(best or guard.saved, model)
        seconds = time.perf_counter() - start
        # Under bf16 accelerate has put autocast around the module's forward; the caller gets it bare.
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    result = _result(trainer, metric, seconds)
    if diverged is not None:
        raise Diverged(str(diverged), result if guard.saved is not None else None) from diverged
    return result


def _result(trainer: _Trainer, metric: Metric, seconds: float) -> FitResult:
    state, clock = trainer.state, trainer.clock
    epochs = float(state.epoch or 0)
    best_epoch, scores = _best(state.log_history, metric, last=not trainer.settings.restore_best)
    return FitResult(
        metric=metric.name,
        best_epoch=best_epoch if scores else trainer.guard.epoch,
        scores=scores,
        history=state.log_history,
        epochs=epochs,
        seconds=seconds,
        tokens_per_second=clock.tokens / clock.seconds if clock.seconds else 0.0,
        rows_per_second=clock.rows / clock.seconds if clock.seconds else 0.0,
        rows=len(trainer.train_dataset),
        dev_rows=len(trainer.dev_features),
    )


def _arguments(
    settings: FitSettings, checkpoints: str | Path, rows: int, metric: Metric | None, device: str | None
) -> TrainingArguments:
    steps = -(-rows // (settings.batch_size * settings.gradient_accumulation))
    has_gpu = torch.cuda.is_available() and device != "cpu"
    watched: dict[str, Any] = {}
    if metric is not None:
        watched = {
            "eval_strategy": "epoch",
            "load_best_model_at_end": settings.restore_best,
            "metric_for_best_model": metric.name,
            "greater_is_better": metric.greater_is_better,
        }
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        # Autograd's version counters see what it writes; they do not see the default, fused one.
        optim="adamw_torch",
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(settings.warmup * steps * settings.epochs),
        train_sampling_strategy="group_by_length",
        logging_steps=max(1, steps // _LOGS_PER_EPOCH),
        save_strategy="epoch",
        save_total_limit=2,
        seed=settings.seed,
        bf16=settings.bf16,
        # transformers refuses bf16 on a CPU that it was not told about.
        use_cpu=device == "cpu" or (settings.bf16 and not has_gpu),
        dataloader_pin_memory=has_gpu,
        # PadCollator leaves out what only decoding needs.
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        **watched,
    )


class _Trainer(Trainer):
    """Trainer with our metrics in the examples' own terms, and the schedule of the released runs."""

    settings: FitSettings
    codec: TaskCodec
    clock: _Clock
    guard: _Guard
    dev_features: list[dict[str, Any]]
    # What `fit` gives it, of the many kinds that Trainer takes.
    model: nn.Module
    train_dataset: list[dict[str, Any]]
    eval_dataset: list[dict[str, Any]]
    optimizer: torch.optim.Optimizer

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Scores of the dev examples, logged and given to callbacks as Trainer's own are."""
        scores = evaluate(
            self.model, self.codec, self.eval_dataset, features=self.dev_features, batch_size=self.args.eval_batch_size
        )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Trainer's way, and a checksum for what it wrote of a PTuningV2Model."""
        super()._save(output_dir, state_dict)
        weights = Path(output_dir or str(self.args.output_dir)) / TRAINER_WEIGHTS_NAME
        if self.args.should_save and isinstance(self.model, PTuningV2Model):
            _, tensors = read_safetensors(weights)
            write_whole(weights, lambda path: write_tensors(path, tensors, {}))

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Linear as Trainer has it, or a rate that falls by a factor after each epoch."""
        if self.lr_scheduler is not None or self.settings.schedule == "linear":
            return super().create_scheduler(num_training_steps, optimizer)
        steps = max(1, num_training_steps // self.settings.epochs)
        decay = self.settings.decay
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: decay ** (step // steps)
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trainer's step, with its real tokens and rows counted."""
        self.clock.tokens += int(inputs["attention_mask"].sum())
        self.clock.rows += len(inputs["attention_mask"])
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.guard.check(self.state, "the loss", [loss])
        return loss


class _Clock(TrainerCallback):
    """Real tokens and rows, and the seconds spent in training steps alone: no evaluation, no saving."""

    def __init__(self) -> None:
        self.rows = self.tokens = 0
        self.seconds = 0.0
        self._started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._started


class _Guard(TrainerCallback):
    """Stops a run whose loss or weights are no numbers any more, before they are saved; knows what was saved last."""

    def __init__(self, settings: FitSettings) -> None:
        self.settings = settings
        self.saved: str | None = None
        self.epoch = 0

    def check(self, state: Any, what: str, tensors: Iterable[torch.Tensor]) -> None:
        """Raise Diverged where a number is NaN or infinite."""
        if all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            return
        raise Diverged(
            f"{what} became NaN or infinite in epoch {float(state.epoch or 0):.2f}, step {state.global_step}: training"
            f" stopped; try a smaller learning rate than {self.settings.learning_rate:g} (--lr)"
            f"{', or without --bf16' if self.settings.bf16 else ''}"
        )

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.check(state, "a weight", (p.detach() for p in model.parameters() if p.requires_grad))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch = round(state.epoch or 0)
        if state.best_model_checkpoint:
            # A resumed run may have been moved, or be called from another folder.
            state.best_model_checkpoint = str(Path(args.output_dir) / Path(state.best_model_checkpoint).name)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved, self.epoch = str(Path(args.output_dir) / f"checkpoint-{state.global_step}"), round(state.epoch)


def _best(history: Sequence[Mapping[str, Any]], metric: Metric, *, last: bool) -> tuple[int, dict[str, float]]:
    """The first of the best epochs, as Trainer chooses, or the last one, and its scores; (0, {}) without scores."""
    key = f"eval_{metric.name}"
    records = [record for record in history if key in record]
    if not records:
        return 0, {}
    sign = 1 if metric.greater_is_better else -1
    best = records[-1] if last else max(records, key=lambda record: sign * record[key])
    scores = {name[5:]: value for name, value in best.items() if name.startswith("eval_")}
    return round(best["epoch"]), scores
