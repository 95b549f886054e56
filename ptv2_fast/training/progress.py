"""Progress of training: one line that lives on a terminal, and a line per epoch that stays, in a pipe too."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from transformers import TrainerCallback


class TrainingProgress(TrainerCallback):
    """Shows steps, loss, speed and the time left; prints a line after each epoch.

    Use it as a context manager around `Trainer.train`, so that an exception gives the terminal
    back.

    Args:
        metric: the name of the metric that chooses the best epoch.
        title: stands in front of the bar.
        console: where to write; None means standard error.
    """

    def __init__(self, metric: str, title: str = "training", console: Console | None = None):
        self.metric = metric
        self.console = console or Console(stderr=True)
        self.loss = float("nan")
        self.rows = self.epochs = 0.0
        self.began_at = self.began = 0.0
        self.progress = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps  loss {task.fields[loss]:.4f}  {task.fields[pace]}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )
        self.bar = self.progress.add_task(title, loss=self.loss, pace="", total=None)

    def __enter__(self) -> TrainingProgress:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Learn how many steps and rows there are, and how many a resumed run has behind it."""
        self.rows, self.epochs = float(len(train_dataloader.dataset)), float(state.num_train_epochs)
        self.began_at, self.began = float(state.epoch or 0), time.perf_counter()
        self.progress.update(self.bar, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        self.progress.update(self.bar, completed=state.global_step, pace=self.pace(state))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the latest loss."""
        if logs and "loss" in logs:
            self.loss = float(logs["loss"])
            self.progress.update(self.bar, loss=self.loss)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the epoch's loss, where no held-out rows are scored."""
        if args.eval_strategy == "no":
            self._print(state, "")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Print the epoch's metric on the held-out rows."""
        value = (metrics or {}).get(f"eval_{self.metric}")
        if value is not None:
            self._print(state, f", dev {self.metric} {value:.4f}")

    def pace(self, state: Any) -> str:
        """Rows a second since training began, scoring and saving included, and the time left at that speed."""
        done, seconds = float(state.epoch or 0) - self.began_at, time.perf_counter() - self.began
        if done <= 0 or seconds <= 0:
            return ""
        left = max(0.0, self.epochs - float(state.epoch)) * seconds / done
        speed = done * self.rows / seconds
        return f"{speed:,.{0 if speed >= 10 else 1}f} rows/s, {_clock(left)} left"

    def _print(self, state: Any, score: str) -> None:
        pace = self.pace(state)
        line = f"epoch {state.epoch:g} of {self.epochs:g}: loss {self.loss:.4f}{score}{', ' if pace else ''}{pace}"
        self.console.print(line, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    """Minutes and seconds, after hours where there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
