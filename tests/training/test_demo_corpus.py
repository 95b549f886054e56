"""The demo's corpus: counts as its README says, disjoint, balanced, well formed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import ptv2_fast.training.data as training_data
from ptv2_fast.training.data import LabelSet, read_examples

DATA = Path(training_data.__file__).parents[1] / "demo" / "data"


def sentiment(part):
    return read_examples(DATA / f"sentiment_{part}.tsv", "SEQ_CLS")


def entities(part):
    return read_examples(DATA / f"ner_{part}.conll", "TOKEN_CLS")


def spans(example):
    """(type, words) of each entity."""
    found = []
    for token, tag in zip(example["tokens"], example["tags"], strict=True):
        if tag.startswith("B-"):
            found.append([tag[2:], token])
        elif tag.startswith("I-"):
            found[-1][1] += " " + token
    return [tuple(span) for span in found]


def plain(sentence):
    """Only letters and digits, in lower case: what two equal sentences have in common."""
    return "".join(character for character in sentence.lower() if character.isalnum())


@pytest.mark.parametrize(("part", "count"), [("train", 900), ("test", 160)])
def test_sentiment_is_balanced(part, count):
    labels = Counter(example["label"] for example in sentiment(part))
    assert labels == {"positive": count // 2, "negative": count // 2}


def test_sentiment_sentences_differ():
    texts = [plain(e["text"]) for part in ("train", "test") for e in sentiment(part)]
    assert len(texts) == len(set(texts)) == 1060


def test_sentiment_is_not_made_from_templates():
    openings = Counter(" ".join(e["text"].split()[:4]) for e in sentiment("train"))
    assert openings.most_common(1)[0][1] <= 8


@pytest.mark.parametrize(
    ("part", "sentences", "tokens", "names"), [("train", 995, 9415, 1348), ("test", 260, 2429, 401)]
)
def test_entity_counts(part, sentences, tokens, names):
    examples = entities(part)
    assert len(examples) == sentences
    assert sum(len(example["tokens"]) for example in examples) == tokens
    assert sum(len(spans(example)) for example in examples) == names
    without = sum(not spans(example) for example in examples)
    assert 0.08 < without / sentences < 0.25
    kinds = Counter(kind for example in examples for kind, _ in spans(example))
    assert min(kinds.values()) > 0.5 * max(kinds.values())


@pytest.mark.parametrize("part", ["train", "test"])
def test_entity_tags_are_iob2(part):
    examples = entities(part)
    names = ("O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER")
    assert LabelSet.from_examples(examples).names == names
    for example in examples:
        for before, tag in zip(["O", *example["tags"]], example["tags"], strict=False):
            if tag.startswith("I-"):
                assert before in (tag, "B" + tag[1:]), example


def test_entity_sentences_differ_and_most_test_names_are_unseen():
    texts = [plain(" ".join(e["tokens"])) for part in ("train", "test") for e in entities(part)]
    assert len(texts) == len(set(texts)) == 1255
    train, test = ({span for e in entities(part) for span in spans(e)} for part in ("train", "test"))
    assert len(test - train) > 0.96 * len(test)


def test_readme_says_what_is_there():
    text = (DATA / "README.md").read_text(encoding="utf-8")
    for fact in ("900 sentences", "160 sentences", "9415 tokens", "2429 tokens", "Apache-2.0"):
        assert fact in text
    files = {path.name for path in DATA.iterdir()} - {"README.md"}
    assert all(f"`{name}`" in text for name in files)
