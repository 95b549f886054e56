"""Spans of characters become words with tags, whichever tool wrote them; what is none is refused with its row."""

from __future__ import annotations

import json

import pytest

from ptv2_fast.training.data import read_examples

TEXT = "Anna Lee sings in New York."
SPANS = [[0, 8, "PER"], [18, 26, "LOC"]]
EXAMPLE = {
    "tokens": ["Anna", "Lee", "sings", "in", "New", "York", "."],
    "tags": ["B-PER", "I-PER", "O", "O", "B-LOC", "I-LOC", "O"],
}
OBJECTS = [{"start": start, "end": end, "label": label} for start, end, label in SPANS]
WORDS = [{"text": word, "start": TEXT.index(word), "end": TEXT.index(word) + len(word)} for word in EXAMPLE["tokens"]]


def label_studio(text, spans, **more):
    result = [
        {"value": {"start": s, "end": e, "text": text[s:e], "labels": [label]}, "type": "labels"}
        for s, e, label in spans
    ]
    return {"id": 1, "data": {"text": text}, "annotations": [{"result": result, **more}], "predictions": []}


def write(folder, name, *records):
    path = folder / name
    document = json.dumps(records) if name.endswith(".json") else "\n".join(map(json.dumps, records))
    path.write_text(document, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "record"),
    [
        pytest.param("a.jsonl", {"id": 1, "text": TEXT, "label": SPANS}, id="doccano"),
        pytest.param("a.jsonl", {"text": TEXT, "labels": SPANS[::-1]}, id="doccano, older"),
        pytest.param("a.jsonl", {"text": TEXT, "entities": SPANS}, id="entities"),
        pytest.param("a.json", [TEXT, {"entities": SPANS}], id="spacy"),
        pytest.param("a.jsonl", {"text": TEXT, "tokens": WORDS, "spans": OBJECTS, "answer": "accept"}, id="prodigy"),
        pytest.param("a.json", label_studio(TEXT, SPANS), id="label studio"),
        pytest.param(
            "a.jsonl", {"text": TEXT, "label": [{**o, "labels": [o["label"]]} for o in OBJECTS]}, id="minimal"
        ),
    ],
)
def test_every_tool_says_the_same(tmp_path, name, record):
    assert read_examples(write(tmp_path, name, record), "TOKEN_CLS") == [EXAMPLE]


@pytest.mark.parametrize(
    ("spans", "parts"),
    [
        ([[0, 8, "PER"], [5, 8, "LAST"]], ["overlap", "[0, 8) 'PER' and [5, 8) 'LAST'"]),
        ([[0, 99, "PER"]], ["end <= 27", "[0, 99)"]),
        ([[4, 4, "PER"]], ["start < end", "[4, 4)"]),
        ([[4, 5, "PER"]], ["expected a word in the span"]),
        ([[0, 4, 7]], ["one label", "[0, 4, 7]"]),
        ([{"start": 0, "end": 4, "labels": ["A", "B"]}], ["one label"]),
        ([{"start": 0, "end": 4, "label": "PER", "text": "Bob"}], ["'Bob'", "'Anna'"]),
    ],
)
def test_what_is_no_span_is_refused(tmp_path, spans, parts):
    path = write(tmp_path, "a.jsonl", {"text": "nobody is here", "label": []}, {"text": TEXT, "label": spans})
    with pytest.raises(ValueError) as caught:
        read_examples(path, "TOKEN_CLS")
    assert not [part for part in (f"{path}, line 2", *parts) if part not in str(caught.value)], caught.value


def test_a_cut_word_is_split_and_said(tmp_path, caplog):
    path = write(tmp_path, "a.jsonl", {"text": "in New-York", "label": [[7, 11, "LOC"]]})
    assert read_examples(path, "TOKEN_CLS") == [{"tokens": ["in", "New-", "York"], "tags": ["O", "O", "B-LOC"]}]
    assert f"{path}, line 1: spans begin or end inside of 1 words of 1 texts" in caplog.text


def test_blanks_at_the_ends_of_a_span_are_no_words(tmp_path):
    path = write(tmp_path, "a.jsonl", {"text": TEXT, "label": [[0, 9, "PER"], [17, 26, "LOC"]]})
    assert read_examples(path, "TOKEN_CLS") == [EXAMPLE]


def test_offsets_of_a_browser_are_told_by_the_spans_own_text(tmp_path):
    text = "\U0001f600 Anna sings"
    task = label_studio(text, [[2, 6, "PER"]])
    value = task["annotations"][0]["result"][0]["value"]
    value["start"], value["end"] = 3, 7
    assert value["text"] == "Anna"
    assert read_examples(write(tmp_path, "a.json", task), "TOKEN_CLS")[0]["tags"] == ["O", "B-PER", "O"]


def test_tasks_that_nobody_labelled_are_counted_and_two_opinions_refused(tmp_path, caplog):
    whole, skipped = label_studio(TEXT, SPANS), label_studio(TEXT, [], was_cancelled=True)
    assert len(read_examples(write(tmp_path, "a.json", whole, skipped), "TOKEN_CLS")) == 1
    assert "1 tasks without a submitted annotation are left out" in caplog.text
    whole["annotations"].append({"result": []})
    with pytest.raises(ValueError, match=r"record \[0\]: 2 annotations of one text differ"):
        read_examples(write(tmp_path, "b.json", whole), "TOKEN_CLS")


def test_choices_of_label_studio_are_classes(tmp_path):
    def task(text, *chosen):
        result = [{"value": {"choices": list(chosen)}, "type": "choices"}]
        return {"data": {"review": text}, "annotations": [{"result": result}]}

    path = write(tmp_path, "a.json", task("fine day", "good"), task("grey day", "bad"))
    assert [e["label"] for e in read_examples(path, "SEQ_CLS")] == ["good", "bad"]
    several = write(tmp_path, "b.json", task("fine day", "good", "short"))
    with pytest.raises(ValueError, match="expected one label.*multi_label_classification"):
        read_examples(several, "SEQ_CLS")
    found = read_examples(several, "SEQ_CLS", problem_type="multi_label_classification")
    assert found == [{"text": "fine day", "labels": ["good", "short"]}]


def test_texts_alone_are_split_for_prediction(tmp_path):
    path = write(tmp_path, "a.jsonl", {"text": TEXT})
    assert read_examples(path, "TOKEN_CLS", labelled=False) == [{"tokens": EXAMPLE["tokens"]}]
