"""Spans of characters become words with tags, whichever tool wrote them; what is none is refused with its row."""

from __future__ import annotations

import json
import re

import pytest

from ptv2_fast.training.data import read_examples

TEXT = "Anna Lee sings in New York."
SPANS = [[0, 8, "PER"], [18, 26, "LOC"]]
EXAMPLE = {
    "tokens": ["Anna", "Lee", "sings", "in", "New", "York", "."],
    "tags": ["B-PER", "I-PER", "O", "O", "B-LOC", "I-LOC", "O"],
}
OBJECTS = [{"start": start, "end": end, "label": label} for start, end, label in SPANS]
NEWER = [{"id": 7, "start_offset": start, "end_offset": end, "label": label} for start, end, label in SPANS]
WORDS = [{"text": m[0], "start": m.start(), "end": m.end()} for m in re.finditer(r"\w+|\.", TEXT)]


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
        pytest.param("a.jsonl", {"id": 1, "text": TEXT, "entities": NEWER, "relations": []}, id="doccano, newer"),
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


def test_words_that_overlap_and_a_span_without_an_end_are_refused(tmp_path):
    words = {"text": TEXT, "spans": OBJECTS, "tokens": [*WORDS, WORDS[0]]}
    with pytest.raises(ValueError, match=r"line 1: expected words one behind the other; got \[26, 27\) and \[0, 4\)"):
        read_examples(write(tmp_path, "a.jsonl", words), "TOKEN_CLS")
    path = write(tmp_path, "b.jsonl", {"text": TEXT, "spans": OBJECTS}, {"text": TEXT, "spans": [{"start": 0}]})
    with pytest.raises(ValueError, match="line 2: expected a list of spans"):
        read_examples(path, "TOKEN_CLS")


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


def test_ends_of_lines_in_a_span_and_arrows_between_spans_are_as_label_studio_writes_them(tmp_path):
    task = label_studio("Anna\nLee sings", [[0, 8, "PER"]])
    result = task["annotations"][0]["result"]
    result[0]["value"]["text"] = "Anna\\nLee"
    result.append({"type": "relation", "from_id": "a", "to_id": "b", "direction": "right"})
    assert read_examples(write(tmp_path, "a.json", task), "TOKEN_CLS")[0]["tags"] == ["B-PER", "I-PER", "O"]


def test_what_prodigy_rejected_is_left_out_and_what_was_chosen_is_read(tmp_path, caplog):
    accepted, other = (
        {"text": text, "spans": OBJECTS, "answer": "accept"} for text in (TEXT, TEXT.replace("Anna", "Emma"))
    )
    path = write(tmp_path, "a.jsonl", accepted, {**other, "answer": "reject"}, {**other, "answer": "ignore"})
    assert read_examples(path, "TOKEN_CLS") == [EXAMPLE]
    assert f"2 examples that were rejected or ignored are left out, {path}, line 2 the first" in caplog.text
    options = [{"id": name, "text": name} for name in ("good", "bad")]
    asked = {"text": TEXT, "options": options, "accept": ["bad"], "answer": "accept", "_task_hash": 1}
    assert read_examples(write(tmp_path, "b.jsonl", asked), "SEQ_CLS") == [{"text": TEXT, "label": "bad"}]


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
