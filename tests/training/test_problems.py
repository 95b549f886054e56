"""Regression and several labels a row: files, features, metrics."""

from __future__ import annotations

import json

import pytest
import scipy.stats
from sklearn.metrics import f1_score

from ptv2_fast.training.data import LabelSet, read_examples
from ptv2_fast.training.metrics import label_set_scores, metric_for, number_scores
from ptv2_fast.training.task_data import TaskCodec

REGRESSION, SEVERAL = "regression", "multi_label_classification"


def _written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_numbers_are_read_from_tables_and_json(tmp_path):
    table = _written(
        tmp_path / "sts.tsv", "sentence1\tsentence2\tscore\nthe film\ta film\t4.5\nthe film\tthe river\t-1e-1\n"
    )
    read = read_examples(table, "SEQ_CLS", problem_type=REGRESSION)
    assert read == [
        {"text": "the film", "text_pair": "a film", "label": 4.5},
        {"text": "the film", "text_pair": "the river", "label": -0.1},
    ]
    lines = [{"text": "good", "label": 3}, {"text": "bad", "label": "0.25"}]
    file = _written(tmp_path / "one.jsonl", "\n".join(map(json.dumps, lines)))
    assert [row["label"] for row in read_examples(file, "SEQ_CLS", problem_type=REGRESSION)] == [3.0, 0.25]
    without = _written(tmp_path / "bare.tsv", "good film\t2\nbad film\t0.5\nfine film\t1.5\n")
    assert [row["label"] for row in read_examples(without, "SEQ_CLS", problem_type=REGRESSION)] == [2.0, 0.5, 1.5]


@pytest.mark.parametrize(
    "value", ['"high"', '"nan"', "true", "null", '"1e999"', "[1.0]", '"1_0"', '"1,5"', "-1e39", '""']
)
def test_what_is_no_number_is_refused_where_it_stands(tmp_path, value):
    file = _written(tmp_path / "x.jsonl", '{"text": "a", "label": 1.0}\n{"text": "b", "label": ' + value + "}\n")
    with pytest.raises(ValueError, match=r"x.jsonl, line 2: expected a finite number in 'label'; got"):
        read_examples(file, "SEQ_CLS", problem_type=REGRESSION)


def test_several_labels_stand_in_a_cell_or_in_a_list(tmp_path):
    table = _written(tmp_path / "t.csv", 'text,labels\nthe film,news | art\nthe river,\na bank,"[""money""]"\n')
    assert read_examples(table, "SEQ_CLS", problem_type=SEVERAL) == [
        {"text": "the film", "labels": ["art", "news"]},
        {"text": "the river", "labels": []},
        {"text": "a bank", "labels": ["money"]},
    ]
    file = _written(tmp_path / "t.jsonl", '{"text": "a", "labels": ["x", 3]}\n{"text": "b", "labels": []}\n')
    assert [row["labels"] for row in read_examples(file, "SEQ_CLS", problem_type=SEVERAL)] == [["3", "x"], []]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('"a||b"', "expected different labels in 'label', as a list or between '|'; got 'a||b'"),
        ('["a", "a"]', "expected different labels"),
        ('["a", 1.5]', "expected different labels"),
        ("1.5", "expected different labels"),
        ("null", "expected different labels"),
        ('"[broken"', "expected different labels"),
        ('["a|b"]', "'|' , which stands between labels".replace(" ,", ",")),
        ('["new"]', "label 'new' was not seen in training; known: ['a', 'b']"),
    ],
)
def test_what_are_no_labels_is_refused_where_it_stands(tmp_path, value, message):
    file = _written(tmp_path / "x.jsonl", '{"text": "a", "label": ["a"]}\n{"text": "b", "label": ' + value + "}\n")
    with pytest.raises(ValueError) as refused:
        read_examples(file, "SEQ_CLS", problem_type=SEVERAL, labels=["a", "b"])
    assert "x.jsonl, line 2" in str(refused.value) and message in str(refused.value)


def test_labels_of_all_rows_are_the_classes():
    assert LabelSet.from_examples([{"labels": ["b", "a"]}, {"labels": []}, {"labels": ["c"]}]).names == ("a", "b", "c")
    with pytest.raises(ValueError, match="expected a label in at least one example; every list of labels is empty"):
        LabelSet.from_examples([{"labels": []}])


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM"])
def test_other_tasks_solve_nothing_else(tmp_path, task):
    with pytest.raises(ValueError, match=f"problem_type must be 'single_label_classification' for {task}"):
        read_examples(tmp_path / "x.jsonl", task, problem_type=REGRESSION)


def test_features_have_floats_and_the_collator_stacks_them(tiny_tokenizer):
    examples = [{"text": "the film", "label": 2.0}, {"text": "a good river bank", "label": -1.5}]
    codec = TaskCodec("SEQ_CLS", tiny_tokenizer, problem_type=REGRESSION)
    batch = codec.collator(codec.encode(examples))
    assert batch["labels"].tolist() == [2.0, -1.5] and batch["labels"].is_floating_point()
    sets = [{"text": "the film", "labels": ["b"]}, {"text": "a good river bank", "labels": ["a", "c"]}]
    codec = TaskCodec("SEQ_CLS", tiny_tokenizer, LabelSet(("a", "b", "c")), problem_type=SEVERAL)
    batch = codec.collator(codec.encode(sets))
    assert batch["labels"].tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    assert "labels" not in codec.encode([{"text": "the film"}])[0]


def test_correlations_are_those_of_scipy():
    guess, truth = [0.1, 2.0, 2.0, 5.5, -1.0, 3.0], [1.0, 2.0, 2.5, 2.5, 0.0, 9.0]
    scores = number_scores(guess, truth)
    assert scores["pearson"] == pytest.approx(scipy.stats.pearsonr(guess, truth).statistic, rel=1e-12)
    assert scores["spearman"] == pytest.approx(scipy.stats.spearmanr(guess, truth).statistic, rel=1e-12)
    assert scores["mse"] == pytest.approx(sum((x - y) ** 2 for x, y in zip(guess, truth, strict=True)) / 6)
    huge = number_scores([1e150, 2e150, 4e150], [1.0, 2.0, 4.0])
    assert huge["pearson"] == pytest.approx(1.0)
    for constant in (number_scores([1.0, 1.0], [0.0, 3.0]), number_scores([0.5], [2.0])):
        assert (constant["pearson"], constant["spearman"]) == (0.0, 0.0)


def test_f1_of_label_sets_is_that_of_sklearn():
    truth, guess = [["a", "b"], [], ["c"], ["a"]], [["a"], ["b"], ["c", "a"], []]
    names = "abc"
    matrix = [[[int(name in row) for name in names] for row in rows] for rows in (truth, guess)]
    scores = label_set_scores(guess, truth)
    for average in ("micro", "macro"):
        expected = f1_score(*matrix, average=average, zero_division=0.0)
        assert scores[f"{average}_f1"] == pytest.approx(expected, rel=1e-12)
    assert label_set_scores([[]], [[]]) == {"micro_f1": 0.0, "macro_f1": 0.0}


def test_the_metric_is_the_problem_s():
    assert metric_for("SEQ_CLS").name == "accuracy"
    assert metric_for("SEQ_CLS", REGRESSION).name == "pearson"
    assert metric_for("SEQ_CLS", SEVERAL).name == "micro_f1"
