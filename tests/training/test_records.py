"""Records say where in the text something was found, and how sure the model is."""

from __future__ import annotations

import pytest

from ptv2_fast.training.decoding import Prediction
from ptv2_fast.training.texts import answer_record, tags_record, typed_sentence
from ptv2_fast.training.typed import examples_of

TAGS = ["B-PER", "I-PER", "O", "B-LOC", "O"]
SCORES = {0: 0.9, 1: 0.7, 2: 0.99, 3: 0.8, 4: 1.0}


def test_entities_have_the_characters_of_what_was_typed():
    line = "  Ada Lovelace,\tParis .\n"
    record = tags_record(typed_sentence(line, "", 1, None), Prediction(TAGS, 0.7, SCORES))
    assert record["text"] == "  Ada Lovelace,\tParis ." and record["tokens"] == ["Ada", "Lovelace", ",", "Paris", "."]
    assert record["entities"] == [
        {"text": "Ada Lovelace", "label": "PER", "start": 2, "end": 14, "score": 0.7},
        {"text": "Paris", "label": "LOC", "start": 16, "end": 21, "score": 0.8},
    ]
    for entity in record["entities"]:
        assert record["text"][entity["start"] : entity["end"]] == entity["text"]


def test_words_of_a_file_stand_between_blanks():
    tokens = ["New", "York", "is", "Åre", "!"]
    record = tags_record({"tokens": tokens}, Prediction(["B-LOC", "I-LOC", "O", "B-LOC", "O"], 0.5, SCORES))
    assert record["text"] == "New York is Åre !"
    assert [record["text"][e["start"] : e["end"]] for e in record["entities"]] == ["New York", "Åre"]


def test_an_answer_has_its_place_and_no_answer_none():
    example = {"id": "1", "question": "who ?", "context": "anna saw"}
    found = answer_record(example, Prediction("anna", 3.25, place=(0, 4)))
    assert found == {"id": "1", "question": "who ?", "answer": "anna", "start": 0, "end": 4, "score": 3.25}
    none = answer_record(example, Prediction("", 1.0))
    assert (none["answer"], none["start"], none["end"]) == ("", None, None)


def test_what_is_typed_may_begin_with_a_mark_and_objects_are_texts(caplog):
    typed = examples_of(["\ufeffgood film\r\n", "\n", '{"text": "bad"}\n'], "SEQ_CLS", where="standard input")
    assert typed == [{"text": "good film"}, {"text": '{"text": "bad"}'}]
    assert "standard input, line 3: 1 lines are JSON objects, which are read as texts" in caplog.text
    with pytest.raises(ValueError, match="line 1: expected text; .* the byte 0xff is read, which is no UTF-8"):
        examples_of([b"\xff\n".decode("utf-8", "surrogateescape")], "TOKEN_CLS")
