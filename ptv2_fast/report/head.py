"""What was trained: the facts of a run, and its scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptv2_fast.report.html import Html, Section, el, facts, join, note, number
from ptv2_fast.report.run import Run

_METRICS_MISSING = "The folder has no metrics.json, so scores, curves, time and speed are left out."


def head_section(run: Run) -> Section:
    """The run's facts, and its dev scores with the epoch that they are of."""
    metrics = run.metrics
    parts: list[Html] = []
    if run.scores:
        best = f"dev, best epoch {metrics.get('best_epoch')} of {number(metrics.get('epochs'), 0)}"
        parts.append(tiles(run.scores, run.metric, best))
    elif metrics:
        parts.append(note("Trained without development data: the last epoch is kept, and has no scores."))
    else:
        parts.append(note(_METRICS_MISSING))
    parts.append(facts(facts_of(run)))
    missing = [name for name, key in (("rows", "rows"), ("versions", "versions")) if metrics and key not in metrics]
    if missing:
        parts.append(note(f"The run wrote down no {' and no '.join(missing)}."))
    return Section("What was trained", join(parts))


def tiles(scores: Mapping[str, float], chosen: str | None, below: str) -> Html:
    """Scores in large letters, the one that epochs are chosen by first."""
    names = sorted(scores, key=lambda name: name != chosen)
    shown = [
        el("div", el("b", number(scores[name])), el("span", name), class_="tile chosen" if name == chosen else "tile")
        for name in names
    ]
    return join([el("div", *shown, class_="tiles"), note(below)])


def facts_of(run: Run) -> dict[str, object]:
    """Names and values, in the order in which they are read; None where nobody wrote it down."""
    metrics, fit, settings, config = run.metrics, run.fit, run.settings, run.config
    trained, total = metrics.get("trained_parameters"), metrics.get("total_parameters")
    share = f" ({100 * trained / total:.2f} % of {total:,})" if trained and total else ""
    versions = metrics.get("versions")
    return {
        "task": run.task,
        "base": run.base.get("name_or_path"),
        "injection": config.get("injection"),
        "virtual tokens (P)": config.get("num_virtual_tokens"),
        "layers": _listed(config.get("layers")) or "all",
        "prompts start as": config.get("prompt_init"),
        "prompt MLP": config.get("reparameterization") or None,
        "prompt dropout": config.get("prompt_dropout") or None,
        "pooling": run.pooling,
        "trained parameters": f"{trained:,}{share}" if trained else None,
        "adapter on disk": f"{run.size:,} bytes",
        "training rows": _counted(metrics.get("rows"), settings.get("data")),
        "dev rows": _counted(metrics.get("dev_rows"), settings.get("dev")),
        "tokens of a row": settings.get("max_length") or settings.get("row_length"),
        "epochs": number(metrics["epochs"], 0) if "epochs" in metrics else None,
        "learning rate": f"{fit['learning_rate']:g}, {fit.get('schedule')}" if "learning_rate" in fit else None,
        "batch size": batch_of(fit),
        "arithmetic": "bfloat16" if fit.get("bf16") else None,
        "seed": fit.get("seed"),
        "time": f"{metrics['seconds']:,.0f} s, evaluation included" if "seconds" in metrics else None,
        "speed in training steps": _speed(metrics),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) if versions else None,
        "folder": str(run.folder),
    }


def _listed(values: Any) -> str | None:
    return ", ".join(map(str, values)) if values else None


def _counted(rows: int | None, source: Mapping[str, Any] | None) -> str | None:
    """How many rows, and of what file; data of no rows is none."""
    said = [] if not rows else [f"{rows:,}"]
    if source and source.get("path"):
        said.append(str(source["path"]) + (f" ({source['split']})" if source.get("split") else ""))
    return ", ".join(said) or None


def batch_of(fit: Mapping[str, Any]) -> str | None:
    """Rows of a batch, and how many batches are a step."""
    size, steps = fit.get("batch_size"), fit.get("gradient_accumulation", 1)
    return None if size is None else f"{size}" if steps == 1 else f"{size} × {steps} accumulated"


def _speed(metrics: Mapping[str, Any]) -> str | None:
    rates = (("rows", "rows_per_second", 1), ("tokens", "tokens_per_second", 0))
    said = [f"{metrics[key]:,.{digits}f} {what}/s" for what, key, digits in rates if metrics.get(key)]
    return ", ".join(said) or None
