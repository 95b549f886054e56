"""Data: examples of the four tasks from files and datasets, checked one by one.

Examples are plain dicts of plain values:

    SEQ_CLS       {"text", "text_pair" (pairs only), "label"}
    TOKEN_CLS     {"tokens", "tags"}                        tags are IOB2: O, B-x, I-x
    QUESTION_ANS  {"id", "question", "context", "answers": {"text": [...], "answer_start": [...]}}
    CAUSAL_LM     {"text"} or {"prompt", "completion"}

Nothing is dropped on the way: a record that cannot be used is an error that names file and line,
columns that are not read are named in one warning, and so are IOB1 tags, which become IOB2.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ptv2_fast.training import formats
from ptv2_fast.training.columns import Wanted, choose_columns
from ptv2_fast.training.conll import conll_rows
from ptv2_fast.training.delimited import delimited_rows
from ptv2_fast.training.formats import Row
from ptv2_fast.training.labels import LabelSet as LabelSet
from ptv2_fast.training.labels import differing_by_case, same_spelled_twice
from ptv2_fast.training.tags import TAG, stray_insides, to_iob2

logger = logging.getLogger(__name__)

TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM")

# Up to so many classes may have an example each without a word.
_FEW_CLASSES = 20


def read_examples(
    path_or_name: str | Path,
    task: str,
    *,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    split: str | None = None,
    max_examples: int | None = None,
    labels: LabelSet | Sequence[str] | None = None,
    labelled: bool = True,
) -> list[dict[str, Any]]:
    """The examples of a file, a folder of `datasets` or a named dataset, all checked.

    The suffix chooses the format: .csv, .tsv, .jsonl, .json, .conll (.iob, .iob2, .bio), .txt; for
    TOKEN_CLS .tsv and .txt are CoNLL too. Anything else is a `datasets` folder or `name[:config]`.
    Columns of a CSV or TSV without a header, and of CoNLL, are named by their numbers, from "1".

    Args:
        path_or_name: the file, folder or dataset.
        task: SEQ_CLS, TOKEN_CLS, QUESTION_ANS or CAUSAL_LM; see the module for their examples.
        text_column: the column with the text (two names: a pair); found by its usual names if None.
        label_column: the column with the label or the tags; found by its usual names if None.
        prompt_column, completion_column: the two of CAUSAL_LM; "prompt" and "completion" if None.
        split: the split of a dataset; may stay None when there is only one.
        max_examples: stop reading after so many.
        labels: the labels of training; a label outside them is refused where it stands.
        labelled: False reads text for prediction: labels, tags, answers and completions are not read.

    Raises:
        FileNotFoundError: no such file or dataset.
        ValueError: an argument or a record is not as expected, or it cannot be told which columns are
            meant; the message has file and line, and the argument that decides.
    """
    if task not in TASKS:
        raise ValueError(f"task: must be one of {TASKS}; got {task!r}")
    if max_examples is not None and (not isinstance(max_examples, int) or max_examples < 1):
        raise ValueError(f"max_examples: must be a positive integer or None; got {max_examples!r}")
    if labels is not None and not isinstance(labels, LabelSet):
        labels = LabelSet(tuple(labels))
    texts = (text_column,) if isinstance(text_column, str) else tuple(text_column or ())
    wanted = Wanted(texts, label_column, prompt_column, completion_column, labelled)
    wanted.check(task)
    notes: list[str] = []
    rows = list(islice(_rows(path_or_name, task, split, wanted, notes), max_examples))
    if not rows:
        raise ValueError(f"{path_or_name}, line 1: expected at least one example; found none")
    roles = choose_columns(str(path_or_name), rows, task, wanted, notes)
    convert = _CONVERTERS[task]
    examples = [convert(row, roles, labels) for row in rows]
    _check_together(path_or_name, task, examples, notes, labels)
    for note in notes:
        logger.warning("%s", note)
    return examples


def _check_together(
    name: str | Path, task: str, examples: list[dict[str, Any]], notes: list[str], labels: LabelSet | None
) -> None:
    """What no example shows alone: ids and labels that repeat, tags in another scheme."""
    if task == "QUESTION_ANS":
        _refuse_repeated_ids(name, examples)
    if task == "SEQ_CLS":
        found = {example["label"] for example in examples if "label" in example}
        twice = same_spelled_twice(found)
        if twice:
            raise ValueError(f"{name}: labels must be spelled in one way; {twice[0]!r} and {twice[1]!r} are the same")
        cased = differing_by_case(found)
        if cased:
            notes.append(f"{name}: classes that differ by upper and lower case alone: {', '.join(map(repr, cased))}")
        if labels is None and len(found) > max(_FEW_CLASSES, len(examples) / 2):
            some = ", ".join(sorted(found)[:3])
            notes.append(
                f"{name}: {len(found)} classes in {len(examples)} examples ({some}, ...); is label_column"
                " (--label-column) the one that is meant?"
            )
    strays = sum(example.pop("strays", 0) for example in examples)
    if strays:
        notes.append(f"{name}: IOB1 tags are read as IOB2: {strays} I-x that begin an entity become B-x")


def _rows(path_or_name: str | Path, task: str, split: str | None, wanted: Wanted, notes: list[str]) -> Iterator[Row]:
    path = Path(path_or_name)
    suffix = path.suffix.lower()
    is_file = path.is_file() or (suffix in formats.FILE_SUFFIXES and not path.is_dir())
    if not is_file:
        yield from formats.dataset_rows(str(path_or_name), split)
        return
    if split is not None:
        raise ValueError(f"split: must be None for a file ({path}); got {split!r}")
    if suffix in formats.JSON_SUFFIXES:
        yield from formats.json_rows(path)
    elif suffix in formats.CONLL_SUFFIXES or (task == "TOKEN_CLS" and suffix in (".tsv", ".txt")):
        if task != "TOKEN_CLS":
            raise ValueError(f"{path}: {suffix} files are for TOKEN_CLS; got the task {task}")
        token_column = next(iter(wanted.texts), None)
        columns = {"token_column": token_column, "tag_column": wanted.label if wanted.labelled else None}
        yield from conll_rows(path, wanted.labelled, **columns, notes=notes)
    elif suffix in formats.TEXT_SUFFIXES:
        yield from formats.text_rows(path)
    elif suffix in formats.DELIMITED_SUFFIXES and task == "TOKEN_CLS":
        raise ValueError(f"{path}: tokens and their tags are read from CoNLL files and JSON; got a table ({suffix})")
    elif suffix in formats.DELIMITED_SUFFIXES:
        yield from delimited_rows(path, wanted.named, task=task, labelled=wanted.labelled, notes=notes)
    else:
        raise ValueError(f"{path}: expected a file with a suffix of {', '.join(formats.FILE_SUFFIXES)}; got {suffix!r}")


def _value(row: Row, column: str) -> Any:
    if column not in row.values:
        raise ValueError(f"{row.where}: expected the column {column!r}; the columns are {list(row.values)}")
    return row.values[column]


def _text(row: Row, column: str) -> str:
    value = _value(row, column)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{row.where}: expected text in {column!r}; got {value!r}")
    return check_text(row.where, value)


def check_text(where: str, text: str) -> str:
    """The text itself, if it is one that can be written.

    Raises:
        ValueError: it holds half of a surrogate pair, which is no character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: expected text; character {error.start} is half of a surrogate pair: {text[error.start]!a}"
        ) from error
    return text


def _check_known(where: str, what: str, name: str, labels: LabelSet | None) -> None:
    if labels is not None and name not in labels:
        raise ValueError(f"{where}: {what} {name!r} was not seen in training; known: {list(labels.names)}")


def _classification_example(row: Row, roles: Mapping[str, str], labels: LabelSet | None) -> dict[str, Any]:
    example = {role: _text(row, column).strip() for role, column in roles.items() if role != "label"}
    if "label" not in roles:
        return example
    label = _value(row, roles["label"])
    if isinstance(label, str):
        label = check_text(row.where, label).strip()
    if not isinstance(label, str | int) or label == "":
        raise ValueError(f"{row.where}: expected a label (text or an integer) in {roles['label']!r}; got {label!r}")
    example["label"] = str(label)
    _check_known(row.where, "label", example["label"], labels)
    return example


def _tokens_example(row: Row, roles: Mapping[str, str], labels: LabelSet | None) -> dict[str, Any]:
    tokens = _value(row, roles["tokens"])
    if not _is_texts(tokens) or not tokens:
        raise ValueError(f"{row.where}: expected a list of words in {roles['tokens']!r}; got {tokens!r}")
    for index, token in enumerate(tokens):
        if not token.strip(" \t\r\n"):
            raise ValueError(f"{row.where}, token {index + 1}: expected a word; got {token!r}")
    example: dict[str, Any] = {"tokens": [check_text(row.where, token) for token in tokens]}
    if "tags" not in roles:
        return example
    tags = _value(row, roles["tags"])
    if not isinstance(tags, list | tuple):
        raise ValueError(f"{row.where}: expected a list of IOB tags; got {tags!r}")
    if len(tokens) != len(tags):
        raise ValueError(f"{row.where}: expected as many tags as tokens; got {len(tokens)} tokens and {len(tags)} tags")
    for index, tag in enumerate(tags):
        where = f"{row.where}, token {index + 1}"
        if row.lines is not None:
            where = f"{row.where.rpartition(', line ')[0]}, line {row.lines[index]}"
        if not isinstance(tag, str) or not TAG.fullmatch(tag):
            raise ValueError(f"{where}: expected the tag O, B-x or I-x; got {tag!r}")
        _check_known(where, "tag", check_text(where, tag), labels)
    strays = len(stray_insides(tags))
    # Labels without a B-x are the caller's own scheme.
    if strays and (labels is None or all(tag in labels for tag in to_iob2(tags))):
        example |= {"tags": to_iob2(tags), "strays": strays}
    else:
        example["tags"] = list(tags)
    return example


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _question_example(row: Row, roles: Mapping[str, str], labels: LabelSet | None) -> dict[str, Any]:
    context = _text(row, "context")
    example: dict[str, Any] = {
        # Without the file's name: an id is the same wherever the file lies.
        "id": str(row.values.get("id", row.where.rpartition(", ")[2])),
        "question": _text(row, "question"),
        "context": context,
    }
    if "answers" not in roles:
        return example
    texts, starts = _answers(row)
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text or type(start) is not int:
            raise ValueError(
                f"{row.where}: expected an answer's text and an integer answer_start; got {text!r} and {start!r}"
            )
        found = context[start : start + len(text)] if start >= 0 else ""
        if found != text:
            raise ValueError(
                f"{row.where}: answer_start {start} must point at the answer {text!r}; the context has {found!r} there"
            )
    impossible = row.values.get("is_impossible")
    if impossible not in (None, True, False):
        raise ValueError(f"{row.where}: is_impossible must be true or false; got {impossible!r}")
    if impossible and texts:
        raise ValueError(f"{row.where}: is_impossible is true; expected no answers, got {texts}")
    if impossible is False and not texts:
        raise ValueError(f"{row.where}: is_impossible is false; expected answers, got none")
    example["answers"] = {"text": texts, "answer_start": starts}
    return example


def _answers(row: Row) -> tuple[list[Any], list[Any]]:
    """Texts and starts from {"text": [...], "answer_start": [...]} or a list of such pairs."""
    answers = _value(row, "answers")
    texts: Any
    starts: Any
    if isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers):
        texts = [answer.get("text") for answer in answers]
        starts = [answer.get("answer_start") for answer in answers]
    elif isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
    else:
        texts = starts = None
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise ValueError(f"{row.where}: expected answers with as many 'text' as 'answer_start'; got {answers!r}")
    return texts, starts


def _refuse_repeated_ids(name: str | Path, examples: list[dict[str, Any]]) -> None:
    seen: dict[str, int] = {}
    for number, example in enumerate(examples, start=1):
        earlier = seen.setdefault(example["id"], number)
        if earlier != number:
            raise ValueError(f"{name}: ids must differ; questions {earlier} and {number} have {example['id']!r}")


def _language_example(row: Row, roles: Mapping[str, str], labels: LabelSet | None) -> dict[str, Any]:
    return {role: _text(row, column) for role, column in roles.items()}


_CONVERTERS: dict[str, Callable[[Row, Mapping[str, str], LabelSet | None], dict[str, Any]]] = {
    "SEQ_CLS": _classification_example,
    "TOKEN_CLS": _tokens_example,
    "QUESTION_ANS": _question_example,
    "CAUSAL_LM": _language_example,
}
