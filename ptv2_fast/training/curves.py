"""Curves: loss and metrics over the steps of a training run, as a PNG."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptv2_fast.storage.files import write_whole

# What transformers logs beside losses and metrics.
_NOT_CURVES = ("step", "epoch", "learning_rate", "grad_norm", "total_flos", "num_input_tokens_seen")
# What stands below the x axis.
_AXES = {"step": "optimizer step", "epoch": "epoch", "record": "record"}
# Points of which each is worth a mark.
_FEW_POINTS = 30
_NOT_CURVE_ENDINGS = ("runtime", "per_second", "_time")


def curves_of(
    history: Sequence[Mapping[str, Any]],
) -> tuple[str, dict[str, list[tuple[float, float]]]]:
    """The x axis ("step", else "epoch", else "record") and, by name, each curve's (x, y) points.

    Losses are the names that end in "loss"; speeds, rates and anything that is not a number are
    left out. A record without the x axis is placed by its position in the history.
    """
    axis = next((name for name in ("step", "epoch") if all(name in r for r in history)), "record")
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for position, record in enumerate(history, start=1):
        x = float(record.get(axis, position))
        for name, value in record.items():
            if name in _NOT_CURVES or name.endswith(_NOT_CURVE_ENDINGS):
                continue
            if isinstance(value, int | float) and not isinstance(value, bool):
                curves[name].append((x, float(value)))
    # The summary that a finished run logs repeats the loss as a single mean.
    if "loss" in curves:
        curves.pop("train_loss", None)
    return axis, dict(curves)


def plot_curves(history: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draws losses in one panel and the scores on held-out rows in a second one, as a PNG.

    The file is written under a temporary name beside `path` and renamed, so that `path` is either
    the whole picture or what it was before.

    Args:
        history: records as `Trainer.state.log_history` has them: numbers by name, with "step".
        path: the PNG to write; its folder is made.

    Returns:
        The path.

    Raises:
        ValueError: the history holds nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    axis, curves = curves_of(history)
    if not curves:
        raise ValueError(f"history: expected losses or metrics; got {len(history)} records without")
    losses = {name: points for name, points in curves.items() if name.endswith("loss")}
    scores = {name: points for name, points in curves.items() if name not in losses}
    panels = [panel for panel in (("Loss", "loss", losses), ("Dev scores", "score", scores)) if panel[2]]
    figure = Figure(figsize=(6.0 * len(panels), 4.0), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for index, (title, unit, group) in enumerate(panels, start=1):
        panel = figure.add_subplot(1, len(panels), index)
        for name, points in group.items():
            marker = "o" if len(points) < _FEW_POINTS else None
            panel.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=_named(name))
        panel.set(title=title, xlabel=_AXES[axis], ylabel=unit)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
        panel.margins(y=0.1)
        panel.grid(alpha=0.3)
        panel.legend()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    def draw(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            canvas.print_png(file)  # savefig draws twice

    write_whole(path, draw)
    return path


def _named(curve: str) -> str:
    """A curve's name for a reader."""
    return {"loss": "training", "eval_loss": "dev"}.get(curve, curve.removeprefix("eval_").replace("_", " "))
