"""A progress bar for training: one line that lives on a terminal, and a line per epoch that stays."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback


class TrainingProgress(TrainerCallback):
    """Shows steps, loss and time; prints the metric after each epoch.

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
        self.progress = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps  loss {task.fields[loss]:.4f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.bar = self.progress.add_task(title, loss=self.loss, total=None)

    def __enter__(self) -> TrainingProgress:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learn how many steps there are and how many a resumed run has behind it."""
        self.progress.update(self.bar, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        self.progress.update(self.bar, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the latest loss."""
        if logs and "loss" in logs:
            self.loss = float(logs["loss"])
            self.progress.update(self.bar, loss=self.loss)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Print the epoch's metric on the held-out rows."""
        value = (metrics or {}).get(f"eval_{self.metric}")
        if value is not None:
            line = f"epoch {state.epoch:g}: loss {self.loss:.4f}, dev {self.metric} {value:.4f}"
            self.console.print(line, highlight=False)
