"""Schemes of tags: every one says the same entities, what is unclear is refused, and scores are of entities."""

from __future__ import annotations

import pytest

from ptv2_fast.training.data import LabelSet, read_examples
from ptv2_fast.training.data.tags import scheme_of
from ptv2_fast.training.metrics import entity_scores

# Three words of a person, a place, two persons side by side.
ENTITIES = ["B-PER", "I-PER", "I-PER", "O", "B-LOC", "B-PER", "I-PER", "B-PER"]


def write(folder, tags, name="a.conll"):
    path = folder / name
    path.write_text("".join(f"w\t{tag}\n" if tag else "\n" for tag in tags), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        pytest.param("B-PER I-PER I-PER O B-LOC B-PER I-PER B-PER", None, id="BIO"),
        pytest.param("I-PER I-PER I-PER O I-LOC I-PER I-PER B-PER", "IOB1 tags", id="IOB1"),
        pytest.param("B-PER I-PER E-PER O S-LOC B-PER E-PER S-PER", "BIOES tags", id="BIOES"),
        pytest.param("B-PER I-PER L-PER O U-LOC B-PER L-PER U-PER", "BILUO tags", id="BILUO"),
        pytest.param("B-PER M-PER E-PER O S-LOC B-PER E-PER S-PER", "BMES tags", id="BMES"),
        pytest.param("B-PER M-PER E-PER O W-LOC B-PER E-PER W-PER", "BMEWO tags", id="BMEWO"),
        pytest.param("B_PER I_PER I_PER O B_LOC B_PER I_PER B_PER", "written as 'B_PER'", id="underscores"),
        pytest.param("PER-B PER-I PER-I O LOC-B PER-B PER-I PER-B", "written as 'PER-B'", id="types in front"),
        pytest.param("b-PER i-PER i-PER 0 b-LOC b-PER i-PER b-PER", "written as 'b-PER'", id="lower case and 0"),
    ],
)
def test_every_scheme_says_the_same_entities(tmp_path, caplog, tags, said):
    path = write(tmp_path, tags.split())
    assert read_examples(path, "TOKEN_CLS")[0]["tags"] == ENTITIES
    assert (said in caplog.text) if said else not caplog.records
    assert "do not go together" not in caplog.text


@pytest.mark.parametrize(
    ("tags", "parts"),
    [
        ("B-PER E-PER L-PER O", ["line 2", "'E-PER'", "letters B, E, L"]),
        ("B-PER PER O", ["line 2", "'PER'"]),
        ("O PER LOC", ["line 2", "'PER'", "--tag-scheme plain", "IO"]),
        ("0 1 2", ["line 2", "'1'", "--label-names"]),
        ("NOUN", ["line 1", "'NOUN'"]),
    ],
)
def test_unclear_tags_are_refused(tmp_path, tags, parts):
    with pytest.raises(ValueError) as caught:
        read_examples(write(tmp_path, tags.split()), "TOKEN_CLS")
    assert not [part for part in parts if part not in str(caught.value)], caught.value


@pytest.mark.parametrize("options", [{}, {"tag_scheme": "IO"}])
def test_a_type_has_no_blanks(tmp_path, options):
    path = tmp_path / "a.jsonl"
    path.write_text('{"tokens": ["a", "b"], "tags": ["B-new york", "O"]}')
    with pytest.raises(ValueError, match="line 1, token 1: expected .*'B-new york'"):
        read_examples(path, "TOKEN_CLS", **options)


def test_the_caller_decides_what_cannot_be_told(tmp_path):
    path = write(tmp_path, "O PER PER LOC O".split())
    entities = read_examples(path, "TOKEN_CLS", tag_scheme="IO")
    assert entities[0]["tags"] == ["O", "B-PER", "I-PER", "B-LOC", "O"]
    classes = read_examples(path, "TOKEN_CLS", tag_scheme="plain")
    assert classes[0]["tags"] == ["O", "PER", "PER", "LOC", "O"]
    assert LabelSet.from_examples(classes).names == ("O", "LOC", "PER")
    with pytest.raises(ValueError, match="tag_scheme.*must be one of BIO, .*'BOI'"):
        read_examples(path, "TOKEN_CLS", tag_scheme="BOI")
    with pytest.raises(ValueError, match="line 2: expected a tag of BIOES; got 'PER'"):
        read_examples(path, "TOKEN_CLS", tag_scheme="BIOES")
    with pytest.raises(ValueError, match="tag_scheme.*SEQ_CLS has none"):
        read_examples(path, "SEQ_CLS", tag_scheme="BIO")


@pytest.mark.parametrize(
    ("tags", "found", "said"),
    [
        ("O B-PER I-LOC I-LOC O I-PER", "O B-PER B-LOC I-LOC O B-PER", "line 3: 2 tags begin an entity without B-x"),
        ("B-PER O S-LOC I-LOC E-PER O", "B-PER O B-LOC B-LOC B-PER O", "line 2: 3 tags do not go together"),
        ("S-LOC B-PER I-PER", "B-LOC B-PER I-PER", "line 3: 1 tags do not go together"),
    ],
)
def test_tags_that_begin_wrongly_are_said(tmp_path, caplog, tags, found, said):
    assert read_examples(write(tmp_path, tags.split()), "TOKEN_CLS")[0]["tags"] == found.split()
    assert said in caplog.text


def test_tags_without_types_are_entities_of_one_type(tmp_path):
    path = write(tmp_path, "B M E S".split())
    assert read_examples(path, "TOKEN_CLS")[0]["tags"] == ["B-SPAN", "I-SPAN", "I-SPAN", "B-SPAN"]


def test_numbers_have_the_names_that_are_given(tmp_path):
    names = ["O", "B-X", "I-X"]
    path = write(tmp_path, "0 1 2".split())
    assert read_examples(path, "TOKEN_CLS", label_names=names)[0]["tags"] == names
    with pytest.raises(ValueError, match="line 3: expected a number from 0 to 1.*got '2'"):
        read_examples(path, "TOKEN_CLS", label_names=names[:2])
    table = tmp_path / "a.csv"
    table.write_text("text,label\na b,0\nc d,1\n")
    assert [e["label"] for e in read_examples(table, "SEQ_CLS", label_names=["bad", "good"])] == ["bad", "good"]


def test_labels_of_another_scheme_are_kept_where_they_are_known(tmp_path):
    tags = "B-PER E-PER O S-PER".split()
    known = ["O", "B-PER", "I-PER", "E-PER", "S-PER"]
    path = write(tmp_path, tags)
    # As IOB2 these fit too, and are what training on this file would have made.
    assert read_examples(path, "TOKEN_CLS", labels=known)[0]["tags"] == ["B-PER", "I-PER", "O", "B-PER"]
    assert read_examples(path, "TOKEN_CLS", labels=["O", "B-PER", "E-PER", "S-PER"])[0]["tags"] == tags


def test_scores_are_of_entities_whatever_the_scheme():
    truth = ["B-PER", "E-PER", "O", "S-LOC", "S-LOC"]
    guess = ["B-PER", "E-PER", "O", "S-LOC", "O"]
    scores = entity_scores([guess], [truth])
    as_iob2 = entity_scores([["B-PER", "I-PER", "O", "B-LOC", "O"]], [["B-PER", "I-PER", "O", "B-LOC", "B-LOC"]])
    assert scores == as_iob2 and scores["precision"] == 1.0 and scores["recall"] == pytest.approx(2 / 3)


def test_scores_of_classes_are_of_words():
    truth, guess = ["NOUN", "VERB", "DET", "NOUN"], ["NOUN", "NOUN", "DET", "NOUN"]
    scores = entity_scores([guess], [truth])
    assert scores == {"f1": 0.75, "precision": 0.75, "recall": 0.75, "accuracy": 0.75}


def test_a_scheme_is_told_by_the_whole_file():
    assert scheme_of([["O"], ["S-X"], ["B-X", "E-X"]]).name == "BIOES"
    assert scheme_of([["O", "O"]]).name == "BIO"
