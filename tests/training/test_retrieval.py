"""Sentence retrieval in training: files of pairs, features, rankings and their scores."""

from __future__ import annotations

import json

import pytest
import torch

from ptv2_fast import PTuningV2Config, get_ptv2_model
from ptv2_fast.training.data import read_examples
from ptv2_fast.training.metrics import retrieval_scores
from ptv2_fast.training.predict import evaluate, predict
from ptv2_fast.training.retrieval import embed, ranking
from ptv2_fast.training.task_data import TaskCodec, starting_texts
from tiny_folders import tiny_bert, tiny_tokenizer

TASK = "SENTENCE_RETRIEVAL"
PAIRS = [
    {"query": "where is anna ?", "positive": "anna saw paris"},
    {"query": "who likes the river ?", "positive": "bob likes the river very"},
    {"query": "where is anna ?", "positive": "anna met lee in paris"},
    {"query": "is the film good ?", "positive": "the film was great"},
    {"query": "is the film fine ?", "positive": "the film was great"},
]


def _lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def _model(**config):
    torch.manual_seed(0)
    return get_ptv2_model(tiny_bert(), PTuningV2Config(TASK, num_virtual_tokens=4, **config)).eval()


def test_pairs_are_read_from_json_and_tables(tmp_path):
    assert read_examples(_lines(tmp_path / "p.jsonl", PAIRS), TASK) == PAIRS
    table = tmp_path / "p.tsv"
    table.write_text("query\tpositive\tid\nwhere ?\tin rome\t7\n")
    assert read_examples(table, TASK) == [{"query": "where ?", "positive": "in rome"}]
    wrong = [{**row, "negative": "a tower"} for row in PAIRS]
    assert read_examples(_lines(tmp_path / "n.jsonl", wrong), TASK) == wrong
    named = tmp_path / "x.csv"
    named.write_text("a,b,c\nwhere ?,in rome,a tower\n")
    assert read_examples(named, TASK, text_column=["a", "b"]) == [{"query": "where ?", "positive": "in rome"}]
    # Without labels there are texts alone.
    assert read_examples(named, TASK, text_column=["b", "a"], labelled=False) == [{"text": "in rome"}]
    (tmp_path / "t.txt").write_text("in rome\n\na tower\n")
    assert read_examples(tmp_path / "t.txt", TASK, labelled=False) == [{"text": "in rome"}, {"text": "a tower"}]


@pytest.mark.parametrize(
    ("table", "options"),
    [
        ("query\nwhere ?\nin rome\n", {}),
        ("Query,positive\nwhere ?,x\nin rome,y\n", {}),
        ("text\nwhere ?\nin rome\n", {}),
        ("where ?\nin rome\n", {}),
        # What training was told to read names the columns of pairs.
        ("q\nwhere ?\nin rome\n", {"text_column": ["q", "p"]}),
    ],
    ids=["queries", "pairs", "texts", "no-header", "named"],
)
def test_texts_alone_stand_in_tables_without_positives(tmp_path, table, options):
    (tmp_path / "x.csv").write_text(table)
    found = read_examples(tmp_path / "x.csv", TASK, labelled=False, **options)
    assert found == [{"text": "where ?"}, {"text": "in rome"}]


def test_a_table_of_pairs_needs_a_header(tmp_path):
    (tmp_path / "x.tsv").write_text("where ?\tin rome\n")
    with pytest.raises(ValueError, match="x.tsv, line 1: expected a header row with the columns of SENTENCE_RETRIEVAL"):
        read_examples(tmp_path / "x.tsv", TASK)
    (tmp_path / "y.csv").write_text("query;positive\nwhere ?;in rome\n")
    with pytest.raises(ValueError, match="'query;positive' looks like 2 columns between ';'"):
        read_examples(tmp_path / "y.csv", TASK)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"query": "a"}], {}, "expected the column 'positive'"),
        ([{"query": "a", "positive": " "}], {}, "line 1: expected text in 'positive'"),
        ([PAIRS[0] | {"negative": "x"}, PAIRS[1]], {}, "line 2: expected the column 'negative'"),
        ([PAIRS[0]], {"text_column": "query"}, "text_column: expected two or three names"),
        ([PAIRS[0]], {"label_column": "query"}, "label_column: SENTENCE_RETRIEVAL has no label column"),
        ([{"text": "a", "query": "b"}], {"labelled": False}, "any of 'text', 'query' could be meant"),
    ],
)
def test_pairs_that_are_none_are_refused(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        read_examples(_lines(tmp_path / "p.jsonl", rows), TASK, **options)


def test_a_pair_is_a_group_of_rows_and_a_text_a_row():
    tokenizer = tiny_tokenizer()
    codec = TaskCodec(TASK, tokenizer)
    features = codec.encode([{**PAIRS[0], "negative": "the tower"}, {**PAIRS[1], "negative": "rome"}])
    assert features[0]["input_ids"][1] == tokenizer(PAIRS[0]["positive"])["input_ids"]
    batch = codec.collator(features)
    assert batch["input_ids"].shape == (2, 3, 7) and "labels" not in batch
    assert codec.encode([{"text": "the tower"}])[0]["input_ids"] == tokenizer("the tower")["input_ids"]
    assert starting_texts(PAIRS[:1], 3) == ["where is anna ? anna saw paris"]


def test_scores_are_of_the_first_right_text():
    ranked = [list("abcd"), list("dcba"), list("xyz"), [*"0123456789", "a"]]
    scores = retrieval_scores(ranked, [{"a"}, {"a", "b"}, {"a"}, {"a"}])
    assert scores == {"mrr@10": pytest.approx((1 + 1 / 3 + 0 + 0) / 4), "accuracy@1": 0.25}


def test_rankings_are_by_the_cosine(monkeypatch):
    monkeypatch.setattr("ptv2_fast.training.retrieval._QUERIES", 2)
    queries = torch.nn.functional.normalize(torch.randn(5, 8), dim=-1)
    texts = torch.nn.functional.normalize(torch.randn(7, 8), dim=-1)
    for row, hits in enumerate(ranking(queries, texts, 3)):
        scores = [float(queries[row] @ text) for text in texts]
        assert [index for index, _ in hits] == sorted(range(7), key=lambda index: -scores[index])[:3]
        assert [score for _, score in hits] == pytest.approx(sorted(scores, reverse=True)[:3], abs=1e-6)
    assert len(ranking(queries, texts, 10)[0]) == 7


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_query_is_judged_among_all_positives_and_by_any_of_its_own(size):
    model, codec = _model(), TaskCodec(TASK, tiny_tokenizer())
    scores = evaluate(model, codec, PAIRS, batch_size=size)
    positives = list(dict.fromkeys(row["positive"] for row in PAIRS))
    against = embed(model, codec, positives)
    ranks = []
    for query in dict.fromkeys(row["query"] for row in PAIRS):
        own = {row["positive"] for row in PAIRS if row["query"] == query}
        (vector,) = embed(model, codec, [query])
        order = sorted(positives, key=lambda text: -float(vector @ against[positives.index(text)]))
        ranks.append(1 + next(place for place, text in enumerate(order) if text in own))
    assert len(ranks) == 4
    assert scores["mrr@10"] == pytest.approx(sum(1 / rank for rank in ranks) / 4)
    assert scores["accuracy@1"] == pytest.approx(sum(rank == 1 for rank in ranks) / 4)
    if size == 5:
        features = codec.collator(codec.encode(PAIRS))
        with torch.no_grad():
            assert scores["loss"] == pytest.approx(float(model(**features).loss), rel=1e-5)


def test_embeddings_come_in_the_order_of_the_texts():
    model, codec = _model(pooling="first"), TaskCodec(TASK, tiny_tokenizer())
    model.train()
    texts = ["the tower", "anna met bob in the river of rome", "film"]
    vectors = embed(model, codec, texts, batch_size=2)
    assert model.training
    for text, vector in zip(texts, vectors, strict=True):
        alone = model.eval().encode(**codec.tokenizer(text, return_tensors="pt"))[0]
        torch.testing.assert_close(vector, alone, rtol=1e-5, atol=1e-6)


def test_it_predicts_no_values():
    with pytest.raises(ValueError, match="task_type must be one of .*MULTIPLE_CHOICE; got 'SENTENCE_RETRIEVAL'"):
        predict(_model(), TaskCodec(TASK, tiny_tokenizer()), [{"text": "a"}])
    with pytest.raises(ValueError, match="examples: expected 'query' in each example"):
        evaluate(_model(), TaskCodec(TASK, tiny_tokenizer()), [{"text": "a"}])
    with pytest.raises(ValueError, match="examples: expected at least one; got none"):
        evaluate(_model(), TaskCodec(TASK, tiny_tokenizer()), [])


def test_texts_without_tokens_have_no_vector():
    codec = TaskCodec(TASK, tiny_tokenizer(causal=True))
    with pytest.raises(ValueError, match=r"texts\[1\]: expected a text with tokens; got ''"):
        embed(_model(), codec, ["anna", ""])
    for texts, size in (([], 2), (["anna"], 0)):
        with pytest.raises(ValueError, match="texts and batch_size must be at least one"):
            embed(_model(), codec, texts, batch_size=size)
