"""A finished run as its folder describes it: what was asked for, what came out; no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptv2_fast.report.asked import Asked
from ptv2_fast.storage.names import WEIGHTS_NAME
from ptv2_fast.task_types import SINGLE_LABEL
from ptv2_fast.training.described import read_description, read_settings
from ptv2_fast.training.run_folder import METRICS_NAME, SETTINGS_NAME, read_object

# Of what kind the parts of both files are that the page reads: [kind] is a list, {kind} an object of such values; None
# may stand for any.
_METRICS: Mapping[str, Any] = {
    "metric": str, "dev": {float}, "history": [dict], "versions": {str}, "best_epoch": int, "rows": int,
    "dev_rows": int, "epochs": float, "seconds": float, "tokens_per_second": float, "rows_per_second": float,
    "trained_parameters": int, "total_parameters": int,
}  # fmt: skip
_SETTINGS: Mapping[str, Any] = {"task_type": str, "data": dict, "dev": dict, "fit": dict}


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
        return ", ".join([task, *sorted(self._of_heads("problem_type") - {SINGLE_LABEL})])

    @property
    def pooling(self) -> str | None:
        """What of a row its heads read."""
        return ", ".join(sorted(self._of_heads("pooling"))) or None

    def _of_heads(self, name: str) -> set[str]:
        """What the descriptions of the heads say under a name."""
        heads = self.config.get("heads")
        said = heads.values() if isinstance(heads, dict) else ()  # a head may be its number of labels alone
        return {str(head[name]) for head in said if isinstance(head, dict) and head.get(name) is not None}

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
        settings=_checked(folder / SETTINGS_NAME, read_settings(folder), _SETTINGS),
        metrics=_checked(folder / METRICS_NAME, read_object(folder / METRICS_NAME) or {}, _METRICS),
        size=(folder / WEIGHTS_NAME).stat().st_size,
        trials=() if table is None else _rows_of(table.read_text(encoding="utf-8")),
    )


def _checked(path: Path, values: dict[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The values, which are of their kinds.

    Raises:
        ValueError: one is not.
    """
    for name, kind in kinds.items():
        if not _is(values.get(name), kind):
            raise ValueError(f"{path} is damaged: {name} cannot be {values[name]!r}")
    return values


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind: a type, a list of one ([kind]), or an object with values of one ({kind})."""
    if value is None:
        return True
    if isinstance(kind, list):
        return isinstance(value, list) and all(_is(inner, kind[0]) for inner in value)
    if isinstance(kind, set):
        return isinstance(value, dict) and all(_is(inner, next(iter(kind))) for inner in value.values())
    return isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)


def _rows_of(markdown: str) -> list[list[str]]:
    """The cells of a table's lines; the second line parts its header from its rows."""
    lines = [line.strip().strip("|") for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")] for line in lines if set(line) - set("|-")]
