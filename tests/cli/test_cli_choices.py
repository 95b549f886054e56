"""Multiple choice from the command line: COPA's fields to a trained adapter, its scores, and predictions."""

from __future__ import annotations

import json
import random

import pytest
from typer.testing import CliRunner

from ptv2_fast.cli import app
from tiny_folders import BAD, FILLERS, GOOD, bert_folder, llama_folder


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _row(generator: random.Random) -> dict:
    """The right choice has a good word, the other a bad one."""
    label = generator.randrange(2)
    texts = [f"{generator.choice(FILLERS)} {generator.choice(words)}" for words in (GOOD, BAD)]
    first, second = texts if label == 0 else texts[::-1]
    premise = " ".join(generator.choices(FILLERS, k=3))
    asked = generator.choice(("cause", "effect"))
    return {"premise": premise, "choice1": first, "choice2": second, "question": asked, "label": label, "idx": 0}


@pytest.fixture(scope="module", params=["bert", "llama"])
def trained(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    base = bert_folder(place / "base") if request.param == "bert" else llama_folder(place / "base")
    generator = random.Random(0)
    for name, count in (("train", 48), ("dev", 16)):
        lines = [json.dumps(_row(generator)) for _ in range(count)]
        (place / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    data = ["--data", place / "train.jsonl", "--dev", place / "dev.jsonl", "--output", place / "out"]
    fast = ["--epochs", 8, "--batch-size", 8, "--lr", "3e-2", "--num-virtual-tokens", 4]
    result = run("train", "--model", base, "--task", "MULTIPLE_CHOICE", *data, *fast)
    assert result.exit_code == 0, result.output
    return place


def test_the_right_choices_are_learned_and_eval_gives_the_same(trained):
    metrics = json.loads((trained / "out" / "metrics.json").read_text())
    assert metrics["metric"] == "accuracy" and metrics["dev"]["accuracy"] >= 0.9
    for size in (8, 5):
        result = run("eval", trained / "out", "--data", trained / "dev.jsonl", "--batch-size", size)
        assert result.exit_code == 0, result.output
        scores = json.loads(result.stdout)
        for name in ("accuracy", "loss"):
            assert scores[name] == pytest.approx(metrics["dev"][name], rel=1e-4, abs=1e-6), name
    facts = json.loads(run("info", trained / "out", "--json").stdout)
    assert facts["task_type"] == "MULTIPLE_CHOICE" and facts["heads"]["task"]["num_labels"] == 1


def test_predict_gives_the_choice_and_the_scores_of_all(trained):
    result = run("predict", trained / "out", "--file", trained / "dev.jsonl", "--json")
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in result.stdout.splitlines()]
    rows = [json.loads(line) for line in (trained / "dev.jsonl").read_text().splitlines()]
    right = sum(record["index"] == row["label"] for record, row in zip(records, rows, strict=True))
    assert right / len(rows) == json.loads((trained / "out" / "metrics.json").read_text())["dev"]["accuracy"]
    for record in records:
        assert record["choice"] == record["choices"][record["index"]]
        assert sum(record["scores"]) == pytest.approx(1.0, abs=1e-4)
        assert record["score"] == max(record["scores"]) == record["scores"][record["index"]]
    line = json.dumps({"text": records[0]["text"], "choices": records[0]["choices"]})
    typed = run("predict", trained / "out", line)
    assert typed.stdout == f"{records[0]['choice']}\t{records[0]['score']:.4f}\t{records[0]['text']}\n"


def test_what_are_no_choices_is_one_line(trained, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a", "choices": ["b"], "label": 0}\n')
    result = run("eval", trained / "out", "--data", tmp_path / "x.jsonl")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "x.jsonl, line 1: expected a list of two or more texts" in result.stderr
