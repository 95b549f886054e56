"""Multiple choice in training: files (COPA's own fields among them), features, batches."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ptv2_fast.training.batches import PadCollator
from ptv2_fast.training.data import read_examples
from ptv2_fast.training.metrics import metric_for
from ptv2_fast.training.records import examples_of
from ptv2_fast.training.task_data import TaskCodec, starting_texts

COPA = [
    {
        "premise": "My body cast a shadow over the grass.",
        "choice1": "The sun was rising.",
        "choice2": "The grass was cut.",
        "question": "cause",
        "label": 0,
        "idx": 0,
    },
    {
        "premise": "The physician misdiagnosed the patient.",
        "choice1": "The patient filed a lawsuit.",
        "choice2": "The patient disclosed information.",
        "question": "effect",
        "label": 1,
        "idx": 1,
    },
]


def _lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def test_copa_is_read_as_the_paper_s_code_reads_it(tmp_path):
    assert read_examples(_lines(tmp_path / "train.jsonl", COPA), "MULTIPLE_CHOICE") == [
        {
            "text": "My body cast a shadow over the grass. because",
            "choices": ["The sun was rising.", "The grass was cut."],
            "label": 0,
        },
        {
            "text": "The physician misdiagnosed the patient. so",
            "choices": ["The patient filed a lawsuit.", "The patient disclosed information."],
            "label": 1,
        },
    ]


@pytest.mark.parametrize("column", ["text", "premise", "question"])
def test_choices_stand_in_a_list(tmp_path, column):
    rows = [
        {column: "who?", "choices": ["a", "b", "c"], "label": 2},
        {column: "where?", "choices": list("xyz"), "label": "0"},
    ]
    read = read_examples(_lines(tmp_path / "x.jsonl", rows), "MULTIPLE_CHOICE")
    assert read == [
        {"text": "who?", "choices": ["a", "b", "c"], "label": 2},
        {"text": "where?", "choices": ["x", "y", "z"], "label": 0},
    ]


def test_a_table_has_a_column_for_each_choice(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("premise,choice1,choice2,choice3,label\nthe film,a,b,c,choice3\nthe river,d,e,f,0\n")
    assert [row["label"] for row in read_examples(file, "MULTIPLE_CHOICE")] == [2, 0]
    file.write_text('text,choices,label\nthe film,"[""a"", ""b""]",1\n')
    assert read_examples(file, "MULTIPLE_CHOICE", text_column="text")[0]["choices"] == ["a", "b"]
    unlabelled = read_examples(file, "MULTIPLE_CHOICE", text_column="text", labelled=False)
    assert unlabelled == [{"text": "the film", "choices": ["a", "b"]}]


@pytest.mark.parametrize("header", ["text,choices,label", "Text,Choices,Label"])
def test_a_table_may_have_the_choices_in_one_cell(tmp_path, header):
    (tmp_path / "x.csv").write_text(header + '\nwho ?,"[""anna"", ""bob""]",1\n')
    assert read_examples(tmp_path / "x.csv", "MULTIPLE_CHOICE") == [
        {"text": "who ?", "choices": ["anna", "bob"], "label": 1}
    ]


def test_the_case_of_a_header_does_not_count_nor_does_a_table_without_one_pass(tmp_path):
    (tmp_path / "x.csv").write_text("Premise,Choice1,Choice2,Question,Label\nIt fell.,I ran.,It broke.,effect,1\n")
    expected = {"text": "It fell. so", "choices": ["I ran.", "It broke."], "label": 1}
    assert read_examples(tmp_path / "x.csv", "MULTIPLE_CHOICE") == [expected]
    (tmp_path / "y.tsv").write_text("It fell.\tI ran.\tIt broke.\t1\n")
    with pytest.raises(ValueError, match="y.tsv, line 1: expected a header row with the columns of MULTIPLE_CHOICE"):
        read_examples(tmp_path / "y.tsv", "MULTIPLE_CHOICE")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 2}, "line 2: expected the right choice's number, 0 to 1, in 'label'; got 2"),
        ({"label": "first"}, "line 2: expected the right choice's number, 0 to 1"),
        ({"label": True}, "line 2: expected the right choice's number, 0 to 1"),
        ({"question": "why"}, "line 2: expected 'cause' or 'effect' in 'question'; got 'why'"),
        ({"choice2": " "}, "line 2: expected text in 'choice2'"),
    ],
)
def test_a_row_that_is_none_is_refused_where_it_stands(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_examples(_lines(tmp_path / "x.jsonl", [COPA[0], {**COPA[1], **change}]), "MULTIPLE_CHOICE")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "choices": ["x"], "label": 0}], "expected a list of two or more texts in 'choices'"),
        ([{"text": "a", "choices": "x", "label": 0}], "expected a list of two or more texts in 'choices'"),
        ([{"text": "a", "choice1": "x", "label": 0}], "expected the column 'choices', or 'choice1' and 'choice2'"),
        ([{"choices": ["x", "y"], "label": 0}], r"expected a column of \['text', 'premise', 'question'"),
        ([{"text": "a", "context": "b", "choices": ["x", "y"], "label": 0}], "any of 'text', 'context' could be meant"),
        (
            [{"text": "a", "choices": list("xy"), "label": 0}, {"text": "a", "choices": list("xyz"), "label": 0}],
            "every example must have as many choices; example 1 has 2, example 2 has 3",
        ),
    ],
)
def test_choices_that_cannot_be_told_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_examples(_lines(tmp_path / "x.jsonl", rows), "MULTIPLE_CHOICE")


def test_each_choice_is_a_pair_with_the_text(tiny_tokenizer):
    codec = TaskCodec("MULTIPLE_CHOICE", tiny_tokenizer)
    examples = [
        {"text": "the film was", "choices": ["good", "not bad ."], "label": 1},
        {"text": "who met anna in paris ?", "choices": ["bob", "the river"], "label": 0},
    ]
    features = codec.encode(examples)
    for feature, example in zip(features, examples, strict=True):
        for row, choice in enumerate(example["choices"]):
            pair = tiny_tokenizer(example["text"], choice)
            assert all(feature[name][row] == pair[name] for name in pair)
    batch = codec.collator(features)
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == (2, 2, 11)
    assert batch["labels"].tolist() == [1, 0]
    # Padded to the longest row of the batch, and hidden there.
    assert batch["attention_mask"].sum(-1).tolist() == [[len(row) for row in f["input_ids"]] for f in features]
    assert torch.equal(batch["input_ids"] == 0, batch["attention_mask"] == 0)
    left = PadCollator(tiny_tokenizer, padding_side="left")(features)
    assert torch.equal(left["attention_mask"], batch["attention_mask"].flip(-1))


def test_a_choice_does_not_glue_to_the_text_where_spaces_are_part_of_words(byte_tokenizer):
    feature = TaskCodec("MULTIPLE_CHOICE", byte_tokenizer).encode([{"text": "so", "choices": ["the cat", "a hat"]}])[0]
    assert [byte_tokenizer.decode(row) for row in feature["input_ids"]] == ["so the cat", "so a hat"]
    assert feature["input_ids"][0] == byte_tokenizer("so the cat")["input_ids"]


def test_features_of_other_numbers_of_rows_are_refused(tiny_tokenizer):
    codec = TaskCodec("MULTIPLE_CHOICE", tiny_tokenizer)
    two, three = (codec.encode([{"text": "the film", "choices": ["good"] * n}])[0] for n in (2, 3))
    with pytest.raises(ValueError, match=r"features\[1\]: expected 2 rows as in features\[0\]; got 3"):
        codec.collator([two, three])


def test_a_typed_line_is_an_object():
    line = json.dumps({key: value for key, value in COPA[0].items() if key not in ("label", "idx")})
    (example,) = examples_of([line], "MULTIPLE_CHOICE")
    assert example["text"].endswith("because") and len(example["choices"]) == 2
    with pytest.raises(ValueError, match="text, line 1: expected a JSON object with 'text' and 'choices'; got 'hello'"):
        examples_of(["hello"], "MULTIPLE_CHOICE")
    more = json.dumps({"text": "who ?", "choices": ["a", "b", "c"]})
    with pytest.raises(ValueError, match="text: every example must have as many choices; .* 2 has 3"):
        examples_of([line, more], "MULTIPLE_CHOICE")


def test_a_length_that_leaves_nothing_of_a_pair_is_refused(tiny_tokenizer):
    example = {"text": "the film", "choices": ["good", "bad"], "text_pair": "was good"}
    for task in ("MULTIPLE_CHOICE", "SEQ_CLS"):
        assert TaskCodec(task, tiny_tokenizer, max_length=5).encode([example], quiet=True)
        with pytest.raises(ValueError, match="max_length must be at least 5 for pairs of texts of this tok.*; got 4"):
            TaskCodec(task, tiny_tokenizer, max_length=4).encode([example])


def test_an_example_without_choices_is_refused(tiny_tokenizer):
    codec = TaskCodec("MULTIPLE_CHOICE", tiny_tokenizer)
    with pytest.raises(ValueError, match=r"examples\[1\]: expected at least one choice; got none"):
        codec.encode([{"text": "the film", "choices": ["good"]}, {"text": "the film", "choices": []}])


def test_prompts_may_start_from_choices_too():
    assert starting_texts([{"text": "so", "choices": ["a", "b"], "label": 0}], 4) == ["so a b"]
    for indices in ([0, 1, 1], np.array([0, 1, 1]), torch.tensor([0, 1, 1])):
        assert metric_for("MULTIPLE_CHOICE").compute(indices, [0, 1, 0]) == {"accuracy": pytest.approx(2 / 3)}
