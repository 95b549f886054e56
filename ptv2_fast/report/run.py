"""A finished run as its folder describes it: what was asked for, what came out; no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptv2_fast.report.asked import Asked
from ptv2_fast.storage.names import WEIGHTS_NAME
from ptv2_fast.training.described import read_description, read_settings
from ptv2_fast.training.run_folder import METRICS_NAME, read_object

# Of all scores that a run may have, those of which less is better.
SMALLER_IS_BETTER = ("loss", "perplexity", "mse")


@dataclass(frozen=True)
class Run:
    """What a folder says of a run; what it does not say is None or empty.

    Attributes:
        name: what the page calls it.
        config, base: of the adapter.
        settings, metrics: what `settings.json` and `metrics.json` hold.
        size: bytes of the adapter's weights.
        trials: the header and the rows of a search's table, where the run is its best one.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    base: Mapping[str, Any]
    settings: Mapping[str, Any]
    metrics: Mapping[str, Any]
    size: int
    trials: Sequence[Sequence[str]] = field(default=(), repr=False)

    @property
    def task(self) -> str:
        """The task, and what its head solves where that is not one class for each row."""
        task = str(self.settings.get("task_type") or self.config.get("task_type"))
        problem = self.settings.get("problem_type")
        return task if problem is None else f"{task}, {problem}"

    @property
    def metric(self) -> str | None:
        """The name that epochs are compared by."""
        return self.metrics.get("metric")

    @property
    def scores(self) -> Mapping[str, float]:
        """Dev scores of the best epoch."""
        return self.metrics.get("dev") or {}

    @property
    def history(self) -> Sequence[Mapping[str, Any]]:
        """Trainer's records."""
        return self.metrics.get("history") or ()

    @property
    def fit(self) -> Mapping[str, Any]:
        """How it was trained."""
        return self.settings.get("fit") or {}

    @property
    def dev(self) -> Mapping[str, Any] | None:
        """Where its development data was."""
        return self.settings.get("dev")


def read_runs(asked: Asked) -> list[Run]:
    """The runs of a report.

    Raises:
        ValueError: a file of a folder is damaged.
    """
    return [_read(*one) for one in zip(asked.names, asked.folders, asked.tables, strict=True)]


def _read(name: str, folder: Path, table: Path | None) -> Run:
    description = read_description(folder)
    return Run(
        name=name,
        folder=folder,
        config=description["config"],
        base=description["base"],
        settings=read_settings(folder),
        metrics=read_object(folder / METRICS_NAME) or {},
        size=(folder / WEIGHTS_NAME).stat().st_size,
        trials=() if table is None else _rows_of(table.read_text(encoding="utf-8")),
    )


def _rows_of(markdown: str) -> list[list[str]]:
    """The cells of a table's lines; the second line parts its header from its rows."""
    lines = [line.strip().strip("|") for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")] for line in lines if set(line) - set("|-")]
