"""Hyper-parameter search: P, learning rate and injection by the dev metric, one training run a trial.

A search's folder holds

    trials.log      every trial, written as it ends; a search that is started again goes on with it
    trials.md       the table of all trials, best first
    trials.png      metric against learning rate, a colour for each P and a marker for each injection
    best/           the run folder of the best trial so far
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptv2_fast.checkpoint import write_whole
from ptv2_fast.training.metrics import metric_for
from ptv2_fast.training.runs import TrainRequest, prepare

LOG_NAME, TABLE_NAME, PLOT_NAME, BEST_NAME = "trials.log", "trials.md", "trials.png", "best"
INJECTIONS = ("deep", "shallow", "prefix")
_MARKERS = dict(zip(INJECTIONS, "os^"))


@dataclass(frozen=True)
class SearchSpace:
    """What a search chooses from.

    Attributes:
        lengths: values of P.
        learning_rates: the lowest and the highest, drawn on a logarithmic scale.
        injections: "deep", "shallow", "prefix".
    """

    lengths: tuple[int, ...] = (8, 20, 64)
    learning_rates: tuple[float, float] = (1e-3, 5e-2)
    injections: tuple[str, ...] = ("deep",)

    def __post_init__(self) -> None:
        if not self.lengths or any(not isinstance(p, int) or p < 1 for p in self.lengths):
            raise ValueError(f"lengths must be positive integers; got {self.lengths!r}")
        low, high = self.learning_rates
        if not 0 < low <= high < math.inf:
            raise ValueError(f"learning_rates must be 0 < low <= high; got {self.learning_rates!r}")
        unknown = set(self.injections) - set(INJECTIONS)
        if not self.injections or unknown:
            raise ValueError(f"injections must be some of {', '.join(INJECTIONS)}; got {self.injections!r}")


@dataclass(frozen=True)
class Trial:
    """One finished trial: what it tried and the dev metric that it reached."""

    number: int
    injection: str
    num_virtual_tokens: int
    learning_rate: float
    score: float


def search(
    request: TrainRequest,
    output: str | Path,
    space: SearchSpace,
    *,
    trials: int,
    say: Callable[[str], Any] = lambda line: None,
) -> list[Trial]:
    """Run trials until the folder holds `trials` finished ones; all of them, best first.

    Args:
        request: everything that is the same in all trials; it must have dev data.
        output: the search's folder, absent, empty or a search's with the same space.
        say: is given a line for every trial.

    Raises:
        ValueError: there is no dev data, the folder holds something else, or a run is refused.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    output = Path(output)
    _check(request, output, trials)
    # A first look at data and model: what cannot run is refused before anything is written.
    prepare(_variant(request, space.injections[0], max(space.lengths), space.learning_rates[0]), output / BEST_NAME,
            overwrite=(output / BEST_NAME).is_dir())  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    metric = metric_for(request.task_type)
    study = optuna.create_study(
        study_name="search",
        storage=JournalStorage(JournalFileBackend(str(output / LOG_NAME))),
        sampler=optuna.samplers.TPESampler(seed=request.fit.seed),
        direction="maximize" if metric.greater_is_better else "minimize",
        load_if_exists=True,
    )

    def run(trial: optuna.Trial) -> float:
        injection = trial.suggest_categorical("injection", list(space.injections))
        length = trial.suggest_categorical("num_virtual_tokens", list(space.lengths))
        rate = trial.suggest_float("learning_rate", *space.learning_rates, log=True)
        folder = output / f"trial-{trial.number}"
        shutil.rmtree(folder, ignore_errors=True)
        result = prepare(_variant(request, injection, length, rate), folder).execute(title=None)
        score = float(result.scores[metric.name])
        say(f"trial {trial.number}: {injection}, P {length}, lr {rate:.2e}: {metric.name} {score:.4f}")
        if _is_best(_finished(study), score, metric.greater_is_better):
            shutil.rmtree(output / BEST_NAME, ignore_errors=True)
            folder.rename(output / BEST_NAME)
        else:
            shutil.rmtree(folder)
        return score

    left = trials - len(_finished(study))
    if left > 0:
        study.optimize(run, n_trials=left)
    found = sorted(_finished(study), key=lambda t: t.score, reverse=metric.greater_is_better)
    text = table(found, metric.name)
    write_whole(output / TABLE_NAME, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    plot(found, metric.name, output / PLOT_NAME)
    return found


def table(trials: Sequence[Trial], metric: str) -> str:
    """The trials as markdown, in the order given."""
    lines = [f"| trial | injection | P | learning rate | dev {metric} |", "|---|---|---|---|---|"]
    lines += [
        f"| {t.number} | {t.injection} | {t.num_virtual_tokens} | {t.learning_rate:.2e} | {t.score:.4f} |"
        for t in trials
    ]
    return "\n".join(lines)


def plot(trials: Sequence[Trial], metric: str, path: Path) -> None:
    """Metric against learning rate as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.add_subplot()
    lengths = sorted({t.num_virtual_tokens for t in trials})
    for kind in sorted({(t.injection, t.num_virtual_tokens) for t in trials}):
        points = [(t.learning_rate, t.score) for t in trials if (t.injection, t.num_virtual_tokens) == kind]
        colour = f"C{lengths.index(kind[1])}"
        panel.scatter(*zip(*points), marker=_MARKERS[kind[0]], color=colour, label=f"{kind[0]}, P {kind[1]}")
    panel.set(xscale="log", xlabel="learning rate", ylabel=f"dev {metric}")
    panel.grid(alpha=0.3)
    panel.legend()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _check(request: TrainRequest, output: Path, trials: int) -> None:
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
        raise ValueError(f"trials must be a positive integer; got {trials!r}")
    if request.dev is None:
        raise ValueError("dev data is needed: a search compares runs by it")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output must be a folder; {output} is a file")
    if output.is_dir() and any(output.iterdir()) and not (output / LOG_NAME).is_file():
        raise ValueError(f"output {output} holds something else than a search; name another folder")


def _variant(request: TrainRequest, injection: str, length: int, rate: float) -> TrainRequest:
    fit = replace(request.fit, learning_rate=rate)
    return replace(request, injection=injection, num_virtual_tokens=length, fit=fit)


def _finished(study: Any) -> list[Trial]:
    return [
        Trial(t.number, t.params["injection"], t.params["num_virtual_tokens"], t.params["learning_rate"], t.value)
        for t in study.get_trials(deepcopy=False)
        if t.state.is_finished() and t.value is not None
    ]


def _is_best(before: Sequence[Trial], score: float, greater_is_better: bool) -> bool:
    scores = [trial.score for trial in before]
    return not scores or (score > max(scores) if greater_is_better else score < min(scores))
