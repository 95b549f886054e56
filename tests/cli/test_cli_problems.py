"""Regression and several labels a row from the command line: train, eval, predict, info, and what is refused."""

from __future__ import annotations

import json
import random

import pytest
from typer.testing import CliRunner

from ptv2_fast.cli import app
from tiny_folders import FILLERS, bert_folder

REGRESSION, SEVERAL = "regression", "multi_label_classification"
METRIC = {REGRESSION: "pearson", SEVERAL: "micro_f1"}


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _rows(problem: str, count: int, seed: int) -> list[dict]:
    """Numbers that count good words; labels that name the words that are there."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        good, person = generator.randint(0, 3), generator.random() < 0.5
        words = generator.choices(FILLERS, k=2) + ["good"] * good + ["anna", "anna"] * person
        generator.shuffle(words)
        sets = [name for name, there in (("quality", good), ("who", person)) if there]
        rows.append({"text": " ".join(words), "label": float(good) if problem == REGRESSION else "|".join(sets)})
    return rows


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return bert_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module", params=[REGRESSION, SEVERAL])
def trained(request, encoder, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    for name, count, seed in (("train", 64, 0), ("dev", 24, 1)):
        lines = map(json.dumps, _rows(request.param, count, seed))
        (place / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    data = ["--data", place / "train.jsonl", "--dev", place / "dev.jsonl", "--problem-type", request.param]
    fast = ["--epochs", 20, "--batch-size", 8, "--lr", "3e-2", "--num-virtual-tokens", 4, "--pooling", "mean"]
    result = run("train", "--model", encoder, "--task", "SEQ_CLS", "--output", place / "out", *data, *fast)
    assert result.exit_code == 0, result.output
    return request.param, place


def test_the_metric_is_learned_and_eval_gives_it_again(trained):
    problem, place = trained
    metrics = json.loads((place / "out" / "metrics.json").read_text())
    assert metrics["metric"] == METRIC[problem] and metrics["dev"][METRIC[problem]] > 0.8
    result = run("eval", place / "out", "--data", place / "dev.jsonl", "--batch-size", 8)
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    for name, value in metrics["dev"].items():
        assert scores[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    # The mean over all rows, whatever the batches are.
    again = json.loads(run("eval", place / "out", "--data", place / "dev.jsonl", "--batch-size", 5).stdout)
    assert again["loss"] == pytest.approx(scores["loss"], rel=1e-4)
    if problem == REGRESSION:
        assert scores["mse"] == pytest.approx(scores["loss"], rel=1e-4)


def test_predictions_are_numbers_or_labels_with_scores(trained):
    problem, place = trained
    texts = ["the good good good film", "river anna tower anna"]
    records = [json.loads(line) for line in run("predict", place / "out", *texts, "--json").stdout.splitlines()]
    lines = run("predict", place / "out", *texts).stdout.splitlines()
    assert [record["text"] for record in records] == texts
    if problem == REGRESSION:
        assert records[0]["value"] > records[1]["value"] + 1
        assert lines[0] == f"{records[0]['value']:.4f}\t{texts[0]}"
        return
    assert [record["labels"] for record in records] == [["quality"], ["who"]]
    for record in records:
        assert set(record["scores"]) == {"quality", "who"}
        assert all((score > 0.5) == (name in record["labels"]) for name, score in record["scores"].items())
    assert lines[1] == f"who\t{records[1]['scores']['who']:.4f}\t{texts[1]}"


def test_info_says_what_the_head_solves(trained):
    problem, place = trained
    facts = json.loads(run("info", place / "out", "--json").stdout)
    assert facts["heads"]["task"]["problem_type"] == problem


def test_a_problem_without_heads_over_rows_is_one_line(encoder, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"tokens": ["a"], "tags": ["O"]}\n')
    more = ["--data", tmp_path / "x.jsonl", "--output", tmp_path / "out", "--problem-type", REGRESSION]
    result = run("train", "--model", encoder, "--task", "TOKEN_CLS", *more)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "problem_type must be 'single_label_classification' for TOKEN_CLS" in result.stderr
    assert not (tmp_path / "out").exists()


def test_no_label_at_all_is_one_line(encoder, tmp_path):
    (tmp_path / "x.tsv").write_text("text\tlabels\nanna\t\nbob\t\n")
    more = ["--data", tmp_path / "x.tsv", "--output", tmp_path / "out", "--problem-type", SEVERAL]
    result = run("train", "--model", encoder, "--task", "SEQ_CLS", *more)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "x.tsv: expected a label in at least one example; got none" in result.stderr
    assert not (tmp_path / "out").exists()
