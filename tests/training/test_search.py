"""The search: what it tries, keeps and writes, how it goes on, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ptv2_fast.cli import app
from ptv2_fast.training import search as search_module
from ptv2_fast.training.metrics import metric_for
from ptv2_fast.training.runs import PreparedRun
from ptv2_fast.training.search import SearchSpace, Trial, table
from tiny_folders import bert_folder, toy_file

pytest.importorskip("optuna")


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _arguments(place: Path, output: Path, trials: int) -> tuple[object, ...]:
    fixed = ("--model", place / "bert", "--task", "SEQ_CLS", "--data", place / "train.tsv", "--dev", place / "dev.tsv")
    small = ("--epochs", 1, "--batch-size", 8, "--num-virtual-tokens", "2,3", "--injection", "deep,prefix")
    return ("search", *fixed, *small, "--output", output, "--trials", trials)


def search(place: Path, *more: object, trials: int = 3):
    return run(*_arguments(place, place / "out", trials), *more)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("search")
    bert_folder(place / "bert")
    toy_file(place, "SEQ_CLS", 16).rename(place / "train.tsv")
    toy_file(place, "SEQ_CLS", 8, "dev", seed=1).rename(place / "dev.tsv")
    return place


@pytest.fixture(scope="module")
def searched(place):
    result = search(place)
    assert result.exit_code == 0, result.output
    return place / "out", result.stdout


def test_the_best_trial_is_kept_whole(searched):
    folder, printed = searched
    assert {path.name for path in folder.iterdir()} == {"trials.log", "trials.md", "trials.png", "best"}
    rows = [line.split(" | ") for line in (folder / "trials.md").read_text().splitlines()[2:]]
    assert len(rows) == 3
    scores = [float(row[-1].strip(" |")) for row in rows]
    assert scores == sorted(scores, reverse=True)
    settings = json.loads((folder / "best" / "settings.json").read_text())
    assert (settings["injection"], str(settings["num_virtual_tokens"])) == (rows[0][1], rows[0][2])
    metrics = json.loads((folder / "best" / "metrics.json").read_text())
    assert metrics["dev"]["accuracy"] == pytest.approx(scores[0], abs=1e-4)
    assert (folder / "trials.png").read_bytes().startswith(b"\x89PNG")
    assert printed.count("trial ") == 3


def test_it_goes_on_where_it_stopped(searched, place):
    again = search(place, trials=3)
    assert again.exit_code == 0 and "trial " not in again.stdout
    more = search(place, trials=4)
    assert more.exit_code == 0 and more.stdout.count("trial ") == 1


def test_a_search_that_stopped_draws_what_it_would_have_drawn(searched, place, tmp_path):
    straight = searched[0]
    assert search(place, "--output", tmp_path / "out", trials=1).exit_code == 0
    for trials in (2, 3):
        again = search(place, "--output", tmp_path / "out", trials=trials)
        assert again.exit_code == 0 and again.stdout.count("trial ") == 1, again.output
    rows = [sorted((folder / "trials.md").read_text().splitlines()[2:]) for folder in (straight, tmp_path / "out")]
    assert rows[0][:3] == rows[1], "the same trials to the last digit, none of them twice"
    assert len({row.split(" | ")[3] for row in rows[1]}) == 3


def test_a_search_for_something_else_is_not_gone_on_with(searched, place, tmp_path):
    result = search(place, "--epochs", 2, "--lr", "1e-3,1e-2", trials=5)
    assert result.exit_code == 2
    assert "fit.epochs was 1, is 2" in result.stderr and "space.learning_rates was" in result.stderr
    more = tmp_path / "more.tsv"
    more.write_text((place / "train.tsv").read_text() + "good film\tpositive\n")
    result = search(place, "--data", more, trials=5)
    assert result.exit_code == 2 and "something else: other examples of --data" in result.stderr


def test_a_trial_that_diverges_is_said_and_counts(place, tmp_path):
    result = search(place, "--output", tmp_path / "out", "--lr", "1e30,1e35", trials=2)
    assert result.exit_code == 2 and result.stdout.count("diverged") == 2
    assert "all 2 trials diverged" in result.stderr and result.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["trials.log"]


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--lr", "1e-2"], "two numbers"),
        (["--lr", "a,b"], "numbers between commas"),
        (["--lr", "1,0.1"], "low <= high"),
        (["--num-virtual-tokens", "0"], "positive integers"),
        (["--injection", "sideways"], "injections must be some of"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(place, tmp_path, more, part):
    result = search(place, "--output", tmp_path / "out", *more)
    assert result.exit_code == 2 and part in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(place, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    result = search(place, "--output", tmp_path)
    assert result.exit_code == 2 and "something else than a search" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_smaller_is_better_where_the_metric_says_so(tmp_path, monkeypatch):
    trials = [Trial(0, "deep", 2, 1e-2, 5.0), Trial(1, "deep", 2, 1e-2, 4.0), Trial(2, "deep", 2, 1e-2, 4.0)]
    monkeypatch.setattr(search_module, "_finished", lambda study: trials)
    for task, kept in (("CAUSAL_LM", "trial-1"), ("SEQ_CLS", "trial-0")):
        for trial in trials:
            (tmp_path / f"trial-{trial.number}" / f"trial-{trial.number}").mkdir(parents=True)
        search_module._keep_best(None, tmp_path, metric_for(task))
        assert [path.name for path in tmp_path.iterdir()] == ["best"]
        assert [path.name for path in (tmp_path / "best").iterdir()] == [kept]


def test_the_table_has_a_line_for_each_trial():
    lines = table([Trial(7, "prefix", 64, 0.0123, 0.5)], "f1").splitlines()
    assert lines[-1] == "| 7 | prefix | 64 | 1.23e-02 | 0.5000 |"


def test_lengths_must_be_positive():
    with pytest.raises(ValueError, match="lengths must be positive"):
        SearchSpace(lengths=())


@pytest.mark.parametrize("moment", ["training", "recorded", "moved"])
def test_a_search_that_is_killed_keeps_its_best_whole(place, tmp_path, monkeypatch, moment):
    class Killed(BaseException):
        pass

    output = tmp_path / "out"
    assert search(place, "--output", output, trials=1).exit_code == 0
    before = (output / "best" / "ptv2_model.safetensors").read_bytes()

    owner, name, when = {
        # After the first look; after the score is written down; when the new best takes the old one's place.
        "training": (PreparedRun, "execute", lambda *arguments: True),
        "recorded": (search_module, "_keep_best", lambda *arguments: (output / "trial-1").is_dir()),
        "moved": (Path, "rename", lambda source, target: source.name == "trial-1"),
    }[moment]
    real, reached = getattr(owner, name), []

    def killed(*arguments, **options):
        if when(*arguments):
            reached.append(moment)
            raise Killed
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, killed)
    if moment == "moved":
        monkeypatch.setattr(search_module, "_finished", lambda study: [Trial(1, "deep", 2, 1e-2, 2.0)])
    with pytest.raises(Killed):
        CliRunner().invoke(app, list(map(str, _arguments(place, output, 2))), catch_exceptions=False)
    monkeypatch.undo()
    assert reached
    kept = output / ("best" if moment != "moved" else ".best.old")
    assert (kept / "ptv2_model.safetensors").read_bytes() == before, "one of them is whole, and the next call ends it"
    again = search(place, "--output", output, trials=2)
    assert again.exit_code == 0, again.output
    assert {path.name for path in output.iterdir()} == {"trials.log", "trials.md", "trials.png", "best"}
    rows = [line.split(" | ") for line in (output / "trials.md").read_text().splitlines()[2:]]
    metrics = json.loads((output / "best" / "metrics.json").read_text())
    assert len(rows) == 2 and metrics["dev"]["accuracy"] == pytest.approx(float(rows[0][-1].strip(" |")), abs=1e-4)
