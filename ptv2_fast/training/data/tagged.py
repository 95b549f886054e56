"""Words and their tags, from columns or from spans of a text to examples of TOKEN_CLS in IOB2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptv2_fast.training.data.columns import TAG_COLUMNS, TEXT_COLUMNS, TOKEN_COLUMNS, Table, Wanted, label_column
from ptv2_fast.training.data.examples import Given, check_known, check_text, text_of, value_of
from ptv2_fast.training.data.rows import Row
from ptv2_fast.training.data.spans import SPAN_COLUMNS, holds_spans, words_and_tags
from ptv2_fast.training.data.tags import Scheme, UnclearTags, scheme_of, to_entities
from ptv2_fast.training.labels import LabelSet


def tagged(table: Table, wanted: Wanted) -> dict[str, str]:
    """Words and tags, or a text and spans of it (and perhaps the places of its words)."""
    if wanted.texts:
        tokens: str | None = table.need(wanted.texts[0], "text_column")
    else:
        tokens = table.one_of([name for name in TOKEN_COLUMNS if not _holds(table, name, dict)], "text_column")
        tokens = tokens or table.one_of(TEXT_COLUMNS, "text_column")
    if tokens is None:
        raise table.missing(f"a column of {list(TOKEN_COLUMNS)}, or a text with spans", "text_column")
    spans = _spans_column(table, wanted, tokens)
    if spans is not None or (tokens in TEXT_COLUMNS and not wanted.labelled):
        places = [name for name in TOKEN_COLUMNS if _holds(table, name, dict)]
        roles = {"text": tokens, **({"places": places[0]} if places else {})}
        return roles if spans is None else {**roles, "spans": spans}
    if tokens in TEXT_COLUMNS and not wanted.texts:
        raise table.missing(f"spans of {tokens!r} in a column of {list(SPAN_COLUMNS)}", "label_column")
    tags = label_column(table, wanted, TAG_COLUMNS)
    return {"tokens": tokens} if tags is None else {"tokens": tokens, "tags": tags}


def _spans_column(table: Table, wanted: Wanted, tokens: str) -> str | None:
    """The column of a text's spans; None where there is none, or labels are not read."""
    if not wanted.labelled or not any(isinstance(value, str) for value in table.values(tokens)):
        return None
    if wanted.label is not None:
        return wanted.label if _some_spans(table, wanted.label) else None
    return table.one_of([name for name in SPAN_COLUMNS if _some_spans(table, name)], "label_column")


def _some_spans(table: Table, name: str) -> bool:
    return any(value and holds_spans(value) for value in table.values(name))


def _holds(table: Table, name: str, kind: type) -> bool:
    """Whether a column has lists of a kind."""
    return any(isinstance(value, list) and value and isinstance(value[0], kind) for value in table.values(name))


def tokens_example(row: Row, roles: Mapping[str, str], labels: LabelSet | None) -> dict[str, Any]:
    """Words and their tags as they stand in the file, or as spans say; `settle_tags` brings tags to IOB2."""
    if "text" in roles:
        return _from_spans(row, roles)
    tokens = value_of(row, roles["tokens"])
    if not isinstance(tokens, list | tuple) or not all(isinstance(token, str) for token in tokens) or not tokens:
        raise ValueError(f"{row.where}: expected a list of words in {roles['tokens']!r}; got {tokens!r}")
    for index, token in enumerate(tokens):
        if not token.strip(" \t\r\n"):
            raise ValueError(f"{row.where}, token {index + 1}: expected a word; got {token!r}")
    example: dict[str, Any] = {"tokens": [check_text(row.where, token) for token in tokens]}
    if "tags" not in roles:
        return example
    tags = value_of(row, roles["tags"])
    if not isinstance(tags, list | tuple):
        raise ValueError(f"{row.where}: expected a list of IOB tags in {roles['tags']!r}; got {tags!r}")
    if len(tokens) != len(tags):
        raise ValueError(f"{row.where}: expected as many tags as tokens; got {len(tokens)} tokens and {len(tags)} tags")
    return {**example, "tags": list(tags)}


def _from_spans(row: Row, roles: Mapping[str, str]) -> dict[str, Any]:
    text = text_of(row, roles["text"])
    places = None
    if "places" in roles:
        places = [_place(row, text, word) for word in value_of(row, roles["places"])]
    spans = (row.values.get(roles["spans"]) or []) if "spans" in roles else []
    words, tags, cut = words_and_tags(row.where, text, spans, places)
    if "spans" not in roles:
        return {"tokens": words}
    return {"tokens": words, "tags": tags, **({"cut": cut} if cut else {})}


def _place(row: Row, text: str, word: Any) -> tuple[int, int]:
    start, end = (word.get("start"), word.get("end")) if isinstance(word, dict) else (None, None)
    if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(text):
        raise ValueError(f"{row.where}: expected words with a start and an end in the text; got {word!r}")
    return start, end


def settle_tags(
    name: str | Path, rows: Sequence[Row], examples: list[dict[str, Any]], given: Given, notes: list[str]
) -> None:
    """Bring the tags of a file to IOB2 in place, by the scheme that all of them are of; note what was done.

    Raises:
        ValueError: numbers have no names, tags are of no scheme, or training did not have one.
    """
    pairs = [(row, example) for row, example in zip(rows, examples, strict=True) if "tags" in example]
    if not pairs:
        return
    cut = [(row.where, example.pop("cut")) for row, example in pairs if "cut" in example]
    if cut:
        words = sum(count for _, count in cut)
        notes.append(
            f"{cut[0][0]}: spans begin or end inside of {words} words of {len(cut)} texts, which are split there"
        )
    for row, example in pairs:
        example["tags"] = [_named(row, index, tag, given) for index, tag in enumerate(example["tags"])]
    sentences = [example["tags"] for _, example in pairs]
    known = given.labels
    own = known is not None and all(tag in known for tags in sentences for tag in tags)
    try:
        scheme = scheme_of(sentences, given.tag_scheme, few=known is not None)
    except UnclearTags as error:
        if own:
            return
        row, index = next((r, e["tags"].index(error.tag)) for r, e in pairs if error.tag in e["tags"])
        raise ValueError(f"{_word(row, index)}: {error}") from None
    found = [to_entities(tags, scheme) for tags in sentences]
    if own and known is not None and any(tag not in known for tags, _ in found for tag in tags):
        return  # Known labels of another scheme are the caller's own.
    wrong = [(row, index) for (row, _), (_, places) in zip(pairs, found, strict=True) for index in places]
    _note_tags(name, scheme, sentences, [tags for tags, _ in found], wrong, notes)
    for (row, example), (tags, _) in zip(pairs, found, strict=True):
        unknown = next((index for index, tag in enumerate(tags) if known is not None and tag not in known), None)
        if unknown is not None:
            check_known(_word(row, unknown), "tag", tags[unknown], known)
        example["tags"] = tags


def _named(row: Row, index: int, tag: Any, given: Given) -> str:
    """A tag as text; a number by its name."""
    if given.label_names:
        tag = given.named(_word(row, index), tag)
    if not isinstance(tag, str):
        more = "; label_names (--label-names) names numbers" if isinstance(tag, int) else ""
        raise ValueError(f"{_word(row, index)}: expected the tag O, B-x or I-x; got {tag!r}{more}")
    if not tag.strip() or tag != tag.strip() or (tag[-1] in "-_" and len(tag) < 3):
        raise ValueError(f"{_word(row, index)}: expected the tag O, B-x or I-x; got {tag!r}")
    return tag if tag.isascii() else check_text(_word(row, index), tag)


def _word(row: Row, index: int) -> str:
    """Where a word stands."""
    if row.lines is not None:
        return f"{row.where.rpartition(', line ')[0]}, line {row.lines[index]}"
    return f"{row.where}, token {index + 1}"


def _note_tags(
    name: str | Path,
    scheme: Scheme,
    before: Sequence[Sequence[str]],
    after: Sequence[Sequence[str]],
    wrong: Sequence[tuple[Row, int]],
    notes: list[str],
) -> None:
    changed = sum(a != b for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))
    if scheme.name == "IOB1":
        notes.append(f"{name}: IOB1 tags are read as IOB2: {changed} I-x that begin an entity become B-x")
    elif scheme.name == "plain":
        notes.append(f"{name}: tags without B- and I- are read as classes, one for each word")
    elif scheme.name != "BIO" or scheme.rewritten:
        written = f", written as {_example_of(scheme)!r}," if scheme.rewritten and scheme.name != "IO" else ""
        notes.append(f"{name}: {scheme.name} tags{written} are read as IOB2")
    if wrong:
        row, index = wrong[0]
        kind = "begin an entity without B-x, and are read as B-x" if scheme.name == "BIO" else "do not go together"
        notes.append(f"{_word(row, index)}: {len(wrong)} tags {kind}, this the first")


def _example_of(scheme: Scheme) -> str:
    return next(tag for tag, (letter, kind) in scheme.parts.items() if tag != "O" and tag != f"{letter}-{kind}")
