"""Hyper-parameter search: P, learning rate and injection by the dev metric, one training run a trial.

A search's folder holds

    trials.log      every trial, written as it ends; a search that is started again goes on with it,
                    and draws what it would have drawn without the stop
    trials.md       the table of all trials, best first
    trials.png      metric against learning rate, a colour for each P and a marker for each injection
    best/           the run folder of the best trial so far
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ptv2_fast.choices import INJECTIONS
from ptv2_fast.storage.files import write_whole
from ptv2_fast.training.checked import CheckedRun, check_run
from ptv2_fast.training.metrics import Metric, metric_for
from ptv2_fast.training.run_folder import check_writable, differences
from ptv2_fast.training.train_request import TrainRequest

LOG_NAME, TABLE_NAME, PLOT_NAME, BEST_NAME = "trials.log", "trials.md", "trials.png", "best"
_ASKED = "asked"
_MARKERS = dict(zip(INJECTIONS, "os^", strict=True))


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
    device: str | None = None,
) -> list[Trial]:
    """Run trials until the folder holds `trials` finished ones; all of them, best first.

    Args:
        request: everything that is the same in all trials; it must have dev data.
        output: the search's folder, absent, empty or one of a search for the same: settings, space and data.
        say: is given a line for every trial.
        device: where they train, as `fit` takes it.

    Raises:
        ValueError: there is no dev data, the folder holds something else, or a run is refused.
    """
    return run_search(check_search(request, output, space, trials=trials), say=say, device=device)


@dataclass(frozen=True)
class CheckedSearch:
    """A search that has passed every check that needs no base; nothing is written.

    Attributes:
        first: its longest prompt, as a run.
    """

    request: TrainRequest
    output: Path
    space: SearchSpace
    trials: int
    first: CheckedRun


def check_search(request: TrainRequest, output: str | Path, space: SearchSpace, *, trials: int) -> CheckedSearch:
    """Check settings, folder and data, without torch; arguments as those of `search`.

    Raises:
        FileNotFoundError, ValueError: as `search`.
    """
    output = Path(output)
    _check(request, output, trials)
    first = _variant(request, space.injections[0], max(space.lengths), space.learning_rates[0])
    return CheckedSearch(request, output, space, trials, check_run(first, output / "trial"))


def run_search(
    checked: CheckedSearch, *, say: Callable[[str], Any] = lambda line: None, device: str | None = None
) -> list[Trial]:
    """Run the trials of a checked search; see `search`."""
    request, output, trials = checked.request, checked.output, checked.trials
    study = _study(output, request, _first_look(checked))
    metric = metric_for(request.task_type, request.problem_type)
    _keep_best(study, output, metric)
    while len(_ended(study)) < trials:
        _run_trial(study, checked, say, device)
        _keep_best(study, output, metric)
    found = sorted(_finished(study), key=lambda t: t.score, reverse=metric.greater_is_better)
    if not found:
        raise ValueError(f"{output}: all {trials} trials diverged; choose from smaller learning rates (--lr)")
    text = table(found, metric.name)
    write_whole(output / TABLE_NAME, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    plot(found, metric.name, output / PLOT_NAME)
    return found


def _first_look(checked: CheckedSearch) -> dict[str, Any]:
    """Refuses what cannot run, before anything is written; what the search is asked for, as plain JSON values."""
    from ptv2_fast.training.runs import build

    asked: dict[str, Any] = {**build(checked.first).identity(), "space": asdict(checked.space)}
    # The trials choose these.
    del asked["fit"]["learning_rate"], asked["injection"], asked["num_virtual_tokens"]
    plain: dict[str, Any] = json.loads(json.dumps(asked))
    return plain


def _study(output: Path, request: TrainRequest, asked: dict[str, Any]) -> Any:
    """The search in the folder, or a new one; the same was asked for."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    output.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        study_name="search",
        storage=JournalStorage(JournalFileBackend(str(output / LOG_NAME))),
        direction="maximize" if metric_for(request.task_type, request.problem_type).greater_is_better else "minimize",
        load_if_exists=True,
    )
    kept = study.user_attrs.get(_ASKED)
    if kept is None and study.get_trials(deepcopy=False):
        raise ValueError(f"{output} holds a search that does not say what it was asked for; name another folder")
    differing = _differences(kept, asked) if kept is not None else []
    if differing:
        raise ValueError(f"{output} holds a search that was asked for something else: {'; '.join(differing)}")
    study.set_user_attr(_ASKED, asked)
    return study


def _differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is asked for that was not; of data there is nothing to show but that it is not the same."""
    before, after = (asked.get("digests", {}) for asked in (was, now))
    data = [f"other examples of {name}" for name in after if before.get(name) != after[name]]
    return differences({**was, "digests": None}, {**now, "digests": None}) + data


def _run_trial(study: Any, checked: CheckedSearch, say: Callable[[str], Any], device: str | None) -> None:
    """One trial, into a folder of its own. What it draws follows from the seed, its number and the trials before."""
    import optuna

    from ptv2_fast.training.fit import Diverged
    from ptv2_fast.training.runs import prepare

    request, output, space = checked.request, checked.output, checked.space
    number = len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(seed=(request.fit.seed + 1_000_003 * number) % 2**32)
    trial = study.ask()
    injection = trial.suggest_categorical("injection", list(space.injections))
    length = trial.suggest_categorical("num_virtual_tokens", list(space.lengths))
    rate = trial.suggest_float("learning_rate", *space.learning_rates, log=True)
    folder = _folder(output, trial.number)
    shutil.rmtree(folder, ignore_errors=True)
    chosen = f"trial {trial.number}: {injection}, P {length}, lr {rate:.2e}"
    try:
        result = prepare(_variant(request, injection, length, rate), folder, device=device).execute(title=None)
    except Diverged as error:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        say(f"{chosen}: diverged, {error}")
        return
    score = float(result.scores[result.metric])
    study.tell(trial, score)
    say(f"{chosen}: {result.metric} {score:.4f}")


def _folder(output: Path, number: int) -> Path:
    return output / f"trial-{number}"


def _keep_best(study: Any, output: Path, metric: Metric) -> None:
    """The folder of the best trial becomes `best`, the others go; killed at any moment, the next call ends it."""
    best, replaced = output / BEST_NAME, output / f".{BEST_NAME}.old"
    found = _finished(study)
    if found:
        # The first of equals, as it was kept when it ran.
        first = max(found, key=lambda t: (t.score if metric.greater_is_better else -t.score, -t.number))
        folder = _folder(output, first.number)
        if folder.is_dir():
            if best.is_dir():
                shutil.rmtree(replaced, ignore_errors=True)
                best.rename(replaced)
            folder.rename(best)
    if replaced.is_dir() and not best.is_dir():
        replaced.rename(best)
    for leftover in (replaced, *output.glob("trial-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def table(trials: Sequence[Trial], metric: str) -> str:
    """The trials as markdown, in the order given."""
    lines = [f"| trial | injection | P | learning rate | dev {metric} |", "|---|---|---|---|---|"]
    lines += [
        f"| {t.number} | {t.injection} | {t.num_virtual_tokens} | {t.learning_rate:.2e} | {t.score:.4f} |"
        for t in trials
    ]
    return "\n".join(lines)


def plot(trials: Sequence[Trial], metric: str, path: Path) -> None:
    """Metric against learning rate as a PNG; the first trial, the best one, has a ring."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(7.5, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.add_subplot()
    lengths = sorted({t.num_virtual_tokens for t in trials})
    for kind in sorted({(t.injection, t.num_virtual_tokens) for t in trials}):
        points = [(t.learning_rate, t.score) for t in trials if (t.injection, t.num_virtual_tokens) == kind]
        colour = f"C{lengths.index(kind[1])}"
        panel.scatter(
            *zip(*points, strict=True), marker=_MARKERS[kind[0]], color=colour, label=f"{kind[0]}, P {kind[1]}"
        )
    best = trials[0]
    panel.scatter([best.learning_rate], [best.score], s=140, facecolors="none", edgecolors="black", label="best")
    count = f"{len(trials)} trial{'s' if len(trials) > 1 else ''}"
    panel.set(title=f"Search: {count}", xscale="log", xlabel="learning rate (log scale)", ylabel=f"dev {metric}")
    # Rates seldom span more than two decades: a mark at 1, 2 and 5 of each, and no words between.
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    low, high = (pick(t.learning_rate for t in trials) for pick in (min, max))
    beside = max(1.2, 2 / math.sqrt(high / low))  # a factor of 4 in all, at least
    panel.set_xlim(low / beside, high * beside)
    panel.margins(y=0.1)
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _check(request: TrainRequest, output: Path, trials: int) -> None:
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
        raise ValueError(f"trials must be a positive integer; got {trials!r}")
    if request.dev is None:
        raise ValueError("dev data is needed: a search compares runs by it")
    check_writable(output)
    if output.is_dir() and any(output.iterdir()) and not (output / LOG_NAME).is_file():
        raise ValueError(f"output {output} holds something else than a search; name another folder")


def _variant(request: TrainRequest, injection: str, length: int, rate: float) -> TrainRequest:
    fit = replace(request.fit, learning_rate=rate)
    return replace(request, injection=injection, num_virtual_tokens=length, fit=fit)


def _ended(study: Any) -> list[Any]:
    """Trials that have a score, and those that diverged; one that was killed is run again."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]


def _finished(study: Any) -> list[Trial]:
    return [
        Trial(t.number, t.params["injection"], t.params["num_virtual_tokens"], t.params["learning_rate"], t.value)
        for t in _ended(study)
        if t.value is not None
    ]
