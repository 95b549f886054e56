"""What a run of `benchmarks.quality.float8` found, as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

SUITE = "float8-quality"
WAYS = ("plain", "float8", "float8, gradients in e5m2")
# Task -> what it is scored by on the test set; of that, in points, float8 may lose so much.
METRICS = {"sst2": "accuracy", "wnut17": "f1"}
GOAL = 0.3


def table(cells: Iterable[Mapping[str, Any]], markdown: Callable[[list[str], list[list[str]]], str]) -> str:
    """Scores of every seed and way, what float8 loses on average, and the errors of gradients, for each task.

    Args:
        cells: of the result file.
        markdown: (head, rows) -> a table.
    """
    cells = list(cells)
    rows = [row for task in METRICS for row in _rows(task, [cell for cell in cells if cell["task"] == task])]
    head = [
        "task, metric", "frozen maps", "on the test set, each seed",
        f"points lost on average (goal: at most {GOAL})", "test loss on average",
        "error of the prompts' first gradient",
    ]  # fmt: skip
    return markdown(head, rows)


def _rows(task: str, cells: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows of one task, one for each way; none without cells."""
    metric = METRICS[task]
    runs = {(cell["seed"], cell["way"]): cell["test"] for cell in cells if "way" in cell}
    errors = [cell["relative_errors"] for cell in cells if "relative_errors" in cell]
    seeds = sorted({seed for seed, way in runs if way == "float8"})
    rows = []
    for way in WAYS if cells else ():
        own = [runs[seed, way] for seed in seeds if (seed, way) in runs]
        lost = [runs[seed, "plain"][metric] - runs[seed, way][metric] for seed in seeds if (seed, way) in runs]
        points = 100 * sum(lost) / max(len(lost), 1)
        error = [each[way] for each in errors if way in each]
        rows.append([
            f"{task}, {metric}",
            way,
            " / ".join(f"{100 * test[metric]:.2f}" for test in own) or "–",
            f"{points:.2f}, {'met' if points <= GOAL else '**not met**'}" if own and way != "plain" else "–",
            f"{sum(test['loss'] for test in own) / len(own):.4f}" if own else "–",
            f"{100 * sum(error) / len(error):.1f} %" if error else "–",
        ])  # fmt: skip
    return rows
