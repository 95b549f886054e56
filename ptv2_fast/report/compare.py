"""Several runs beside one another: what differs, and whose scores are best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath

from ptv2_fast.report.head import batch_of
from ptv2_fast.report.html import Html, Section, el, join, note, number, table
from ptv2_fast.report.judged import Judged
from ptv2_fast.report.run import Run
from ptv2_fast.training.metrics import SMALLER_IS_BETTER


def compare_section(runs: Sequence[Run], judged: Sequence[Judged | str]) -> Section:
    """A row for each run: its scores, the best of a task in bold, and the facts that are not the same in all."""
    everything = _short_facts(runs)
    differing = [name for name in everything[0] if len({str(facts[name]) for facts in everything}) > 1]
    dev = [run.scores for run in runs]
    columns = [("dev " + name, _marked(name, dev, runs)) for name in _names(dev)]
    again = [one.scores if isinstance(one, Judged) else {} for one in judged]
    if any(_differ(one, other) for one, other in zip(dev, again, strict=True)):
        columns += [("here " + name, _marked(name, again, runs)) for name in _names(again)]
    header = ["run", "best epoch", *(title for title, _ in columns), *differing]
    rows = []
    for index, (run, facts) in enumerate(zip(runs, everything, strict=True)):
        scores = (cells[index] for _, cells in columns)
        rows.append([run.name, number(run.metrics.get("best_epoch")), *scores, *(facts[name] for name in differing)])
    same = [f"{name} {value}" for name, value in everything[0].items() if name not in differing and value != "–"]
    alike = note("The same in all: ", ", ".join(same), ".") if same else None
    return Section("The runs beside one another", join([el("div", table(header, rows), class_="compare"), alike,
                                                        _caution(runs)]))  # fmt: skip


def trials_section(run: Run) -> Section:
    """All trials of the search that the run is the best one of."""
    header, *rows = run.trials
    return Section("Trials of the search", table(header, rows, words=2))


def _short_facts(runs: Sequence[Run]) -> list[dict[str, str]]:
    """What may differ, each in a few letters; a dash for what nobody wrote down, or switched on."""
    bases = told_apart([str(run.base.get("name_or_path") or "–") for run in runs])
    data = told_apart([str((run.settings.get("data") or {}).get("path") or "–") for run in runs])
    return [_facts(run, *names) for run, *names in zip(runs, bases, data, strict=True)]


def _facts(run: Run, base: str, data: str) -> dict[str, str]:
    fit, config, metrics, settings = run.fit, run.config, run.metrics, run.settings
    rate, split = fit.get("learning_rate"), (settings.get("data") or {}).get("split")
    return {
        "task": run.task,
        "base": base,
        "injection": number(config.get("injection")),
        "P": number(config.get("num_virtual_tokens")),
        "layers": ",".join(map(str, config.get("layers") or ())) or "all",
        "start": number(config.get("prompt_init")),
        "prompt MLP": number(config.get("reparameterization") or None),
        "prompt dropout": number(config.get("prompt_dropout") or None),
        "pooling": number(run.pooling),
        "data": data if split is None else f"{data} ({split})",
        "rows": number(metrics.get("rows")),
        "tokens of a row": number(settings.get("max_length") or settings.get("row_length")),
        "epochs": number(metrics.get("epochs"), 0),
        "learning rate": "–" if rate is None else f"{rate:g}",
        "schedule": number(fit.get("schedule")),
        "batch": batch_of(fit) or "–",
        "arithmetic": "bfloat16" if fit.get("bf16") else "–",
        "seed": number(fit.get("seed")),
        "trained": number(metrics.get("trained_parameters")),
        "bytes": number(run.size),
        "seconds": number(metrics.get("seconds"), 0),
        "rows/s": number(metrics.get("rows_per_second"), 1),
    }


def told_apart(paths: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as tell those apart that differ."""
    parts = [PurePath(path).parts for path in paths]
    for count in range(1, max(map(len, parts), default=0)):
        names = [str(PurePath(*path[-count:])) for path in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return list(paths)


def _names(scores: Sequence[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for one in scores for name in one))


def _differ(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether the rows that were judged here gave other scores than training wrote down."""
    return any(not isinstance(one.get(name), float) or abs(value - one[name]) > 1e-4 for name, value in other.items())


def _marked(name: str, scores: Sequence[Mapping[str, float]], runs: Sequence[Run]) -> list[object]:
    """A cell for each run; the best of a task's runs are bold where there are several."""
    cells: list[object] = []
    for run, one in zip(runs, scores, strict=True):
        value = one.get(name)
        rivals = [o[name] for r, o in zip(runs, scores, strict=True) if r.task == run.task and o.get(name) is not None]
        best = len(rivals) > 1 and value == (min if name in SMALLER_IS_BETTER else max)(rivals)
        cells.append(el("b", number(value)) if best else number(value))
    return cells


def _caution(runs: Sequence[Run]) -> Html | None:
    """What makes scores incomparable."""
    if len({run.task for run in runs}) > 1:
        return note("The runs are of different tasks: scores of one name need not mean the same.")
    sources = {tuple(str((run.dev or {}).get(key)) for key in ("path", "split")) for run in runs}
    return note("Dev scores are of different files: they need not be comparable.") if len(sources) > 1 else None
