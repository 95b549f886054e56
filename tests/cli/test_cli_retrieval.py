"""Sentence retrieval from the command line: pairs to a trained adapter, its scores, embeddings and rankings."""

from __future__ import annotations

import json
import random

import pytest
from typer.testing import CliRunner

from ptv2_fast.cli import app
from tiny_folders import FILLERS, PEOPLE, PLACES, bert_folder


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _pair(generator: random.Random) -> dict[str, str]:
    """A question and the text that has its two names."""
    person, place = generator.choice(PEOPLE), generator.choice(PLACES)
    words = [person, place, *generator.choices(FILLERS, k=2)]
    generator.shuffle(words)
    return {"query": f"where is {person} {place} ?", "positive": " ".join(words)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("retrieval")
    base = bert_folder(place / "base")
    generator = random.Random(0)
    for name, count in (("train", 96), ("dev", 16)):
        lines = [json.dumps(_pair(generator)) for _ in range(count)]
        (place / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    data = ["--data", place / "train.jsonl", "--dev", place / "dev.jsonl", "--output", place / "out"]
    fast = ["--epochs", 8, "--batch-size", 8, "--lr", "3e-2", "--num-virtual-tokens", 4]
    result = run("train", "--model", base, "--task", "SENTENCE_RETRIEVAL", *data, *fast, "--pooling", "mean")
    assert result.exit_code == 0, result.output
    return place


def test_it_trains_and_eval_gives_the_same_scores(trained):
    metrics = json.loads((trained / "out" / "metrics.json").read_text())
    assert metrics["metric"] == "mrr@10"
    history = [record["eval_loss"] for record in metrics["history"] if "eval_loss" in record]
    assert min(history) < history[0] and metrics["dev"]["mrr@10"] > 0.35
    result = run("eval", trained / "out", "--data", trained / "dev.jsonl", "--batch-size", 8)
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    for name, value in metrics["dev"].items():
        assert scores[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    facts = json.loads(run("info", trained / "out", "--json").stdout)
    assert (facts["task_type"], facts["pooling"], facts["heads"]) == ("SENTENCE_RETRIEVAL", "mean", {})


def test_predict_gives_embeddings(trained):
    records = [
        json.loads(line) for line in run("predict", trained / "out", "anna", "the river", "--json").stdout.splitlines()
    ]
    assert [record["text"] for record in records] == ["anna", "the river"]
    for record in records:
        assert len(record["embedding"]) == 32 and sum(x * x for x in record["embedding"]) == pytest.approx(1, abs=1e-4)
    # The same texts: in another batch sums are made in another order.
    text, numbers = run("predict", trained / "out", "anna", "the river").stdout.splitlines()[0].split("\t")
    assert text == "anna" and [float(x) for x in numbers.split()] == records[0]["embedding"]


def test_predict_ranks_candidates_for_each_query(trained, tmp_path):
    file = tmp_path / "texts.txt"
    texts = ["anna saw paris", "bob saw rome", "lee saw oslo", "anna saw paris"]
    file.write_text("\n".join(texts) + "\n")
    more = ("--candidates", file, "--top", 2)
    queries = ["where is bob rome ?", "where is lee oslo ?"]
    result = run("predict", trained / "out", *queries, *more, "--json")
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in result.stdout.splitlines()]
    vectors = {}
    for line in run("predict", trained / "out", *queries, *texts[:3], "--json").stdout.splitlines():
        record = json.loads(line)
        vectors[record["text"]] = record["embedding"]
    for record, query in zip(records, queries, strict=True):
        cosines = {text: sum(x * y for x, y in zip(vectors[query], vectors[text], strict=True)) for text in texts[:3]}
        best = sorted(cosines, key=lambda text: -cosines[text])[:2]
        assert record["query"] == query and [hit["text"] for hit in record["hits"]] == best
        assert [hit["score"] for hit in record["hits"]] == pytest.approx([cosines[text] for text in best], abs=1e-4)
    lines = run("predict", trained / "out", *queries, *more).stdout.splitlines()
    hit = records[0]["hits"][0]
    assert len(lines) == 4 and lines[0] == f"{queries[0]}\t{hit['score']:.4f}\t{hit['text']}"
    # The queries of a file of pairs.
    ranked = run("predict", trained / "out", "--file", trained / "dev.jsonl", "--text-column", "query", *more, "--json")
    assert len(ranked.stdout.splitlines()) == 16


def test_what_cannot_be_meant_is_one_line(trained, tmp_path):
    def refused(result, part):
        assert result.exit_code == 2 and result.stderr.count("\n") == 1 and part in result.stderr, result.output

    refused(run("predict", trained / "out", "anna", "--top", 3), "--top is read with --candidates alone")
    base, data = trained / "base", trained / "train.jsonl"
    alone = ["--data", data, "--output", tmp_path / "out", "--batch-size", 1]
    refused(run("train", "--model", base, "--task", "SENTENCE_RETRIEVAL", *alone), "batch_size must be at least 2")
    (tmp_path / "one.jsonl").write_text(data.read_text().splitlines()[0] + "\n")
    alone = ["--data", tmp_path / "one.jsonl", "--output", tmp_path / "out"]
    message = "one.jsonl: examples must be at least 2 where no text but a query's own is compared with it; got 1"
    refused(run("train", "--model", base, "--task", "SENTENCE_RETRIEVAL", *alone), message)
    assert not (tmp_path / "out").exists()
