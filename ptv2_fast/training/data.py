"""Data: examples of the four tasks from files and datasets, checked one by one.

Examples are plain dicts of plain values:

    SEQ_CLS       {"text", "text_pair" (pairs only), "label"}
    TOKEN_CLS     {"tokens", "tags"}                        tags are IOB: O, B-x, I-x
    QUESTION_ANS  {"id", "question", "context", "answers": {"text": [...], "answer_start": [...]}}
    CAUSAL_LM     {"text"} or {"prompt", "completion"}

Nothing is dropped on the way: a record that cannot be used is an error that names file and line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptv2_fast.training import formats
from ptv2_fast.training.formats import Row

TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM")

# Column names tried in this order when the caller names none (pairs before single texts).
PAIR_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "passage"),
    ("question", "sentence"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
)
TEXT_COLUMNS = ("text", "sentence", "review", "comment", "content")
LABEL_COLUMNS = ("label", "labels", "class", "category", "sentiment", "target")
TAG_COLUMNS = ("tags", "ner_tags", "labels")
TOKEN_COLUMNS = ("tokens", "words")

_TAG = re.compile(r"O|[BI]-\S+")
_INTEGER = re.compile(r"[+-]?\d+")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class LabelSet:
    """The names of the classes, in the order of the model's outputs.

    Raises:
        ValueError: no name, or a name twice.
    """

    names: tuple[str, ...]
    _ids: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = tuple(self.names)
        if not names:
            raise ValueError("names: expected at least one label; got none")
        ids = {name: index for index, name in enumerate(names)}
        if len(ids) != len(names):
            raise ValueError(f"names: labels must differ; got {list(names)}")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "_ids", ids)

    @classmethod
    def from_examples(cls, examples: Iterable[Mapping[str, Any]]) -> LabelSet:
        """The labels (or tags) that occur in the examples.

        Labels that are all integers keep numeric order, others are sorted as text. Tags are O, then
        B-x and I-x of each type x in alphabetic order, whether or not both occur: held-out text may
        have a long entity of a type that training text has only as single words.

        Raises:
            ValueError: the examples have neither labels nor tags.
        """
        labels: set[str] = set()
        types: set[str] = set()
        tagged = False
        for example in examples:
            if "tags" in example:
                tagged = True
                types.update(tag[2:] for tag in example["tags"] if tag != "O")
            elif "label" in example:
                labels.add(example["label"])
        if tagged:
            return cls(("O", *(f"{side}-{kind}" for kind in sorted(types) for side in "BI")))
        if not labels:
            raise ValueError("examples: expected 'label' or 'tags' in the examples; found neither")
        if all(_INTEGER.fullmatch(label) for label in labels):
            return cls(tuple(sorted(labels, key=lambda label: (int(label), label))))
        return cls(tuple(sorted(labels)))

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._ids

    def to_id(self, name: str) -> int:
        """The index of a label; ValueError when it is not one of `names`."""
        if name not in self._ids:
            raise ValueError(f"label: must be one of {list(self.names)}; got {name!r}")
        return self._ids[name]

    def to_name(self, index: int) -> str:
        """The label at an index; ValueError when it is out of range."""
        if not 0 <= index < len(self.names):
            raise ValueError(f"index: must be in [0, {len(self.names)}); got {index!r}")
        return self.names[index]


@dataclass(frozen=True)
class _Request:
    """What the caller asked `read_examples` for, as the converters need it."""

    text_columns: tuple[str, ...]
    label_column: str | None
    labels: LabelSet | None
    labelled: bool


def read_examples(
    path_or_name: str | Path,
    task: str,
    *,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    split: str | None = None,
    max_examples: int | None = None,
    labels: LabelSet | Sequence[str] | None = None,
    labelled: bool = True,
) -> list[dict[str, Any]]:
    """The examples of a file, a folder of `datasets` or a named dataset, all checked.

    The suffix chooses the format: .csv, .tsv, .jsonl, .json, .conll (.iob, .iob2, .bio), .txt; for
    TOKEN_CLS .tsv and .txt are CoNLL too. Anything else is a `datasets` folder or `name[:config]`.

    Args:
        path_or_name: the file, folder or dataset.
        task: SEQ_CLS, TOKEN_CLS, QUESTION_ANS or CAUSAL_LM; see the module for their examples.
        text_column: the column with the text (two names: a pair); found by its usual names if None.
        label_column: the column with the label or the tags; found by its usual names if None.
        split: the split of a dataset; may stay None when there is only one.
        max_examples: stop reading after so many.
        labels: the labels of training; a label outside them is refused where it stands.
        labelled: False reads text for prediction: labels, tags and answers may be absent.

    Raises:
        FileNotFoundError: no such file or dataset.
        ValueError: an argument or a record is not as expected; the message has file and line.
    """
    if task not in TASKS:
        raise ValueError(f"task: must be one of {TASKS}; got {task!r}")
    if max_examples is not None and (not isinstance(max_examples, int) or max_examples < 1):
        raise ValueError(f"max_examples: must be a positive integer or None; got {max_examples!r}")
    if labels is not None and not isinstance(labels, LabelSet):
        labels = LabelSet(tuple(labels))
    named = (text_column,) if isinstance(text_column, str) else tuple(text_column or ())
    _check_columns(task, named, label_column)
    request = _Request(named, label_column, labels, labelled)
    convert = _CONVERTERS[task]
    examples: list[dict[str, Any]] = []
    first_row: Row | None = None
    for row in _rows(path_or_name, task, split, request):
        first_row = first_row or row
        examples.append(convert(row, request))
        if len(examples) == max_examples:
            break
    if first_row is None:
        raise ValueError(f"{path_or_name}, line 1: expected at least one example; found none")
    if task == "SEQ_CLS" and labelled and labels is None:
        _refuse_header_as_example(first_row, examples)
    if task == "QUESTION_ANS":
        _refuse_repeated_ids(path_or_name, examples)
    return examples


def _check_columns(task: str, named: tuple[str, ...], label_column: str | None) -> None:
    most = {"SEQ_CLS": 2, "TOKEN_CLS": 1, "QUESTION_ANS": 0, "CAUSAL_LM": 1}[task]
    if len(named) > most:
        raise ValueError(f"text_column: {task} takes at most {most} column names; got {named}")
    if label_column is not None and task not in ("SEQ_CLS", "TOKEN_CLS"):
        raise ValueError(f"label_column: {task} has no label column; got {label_column!r}")


def _rows(path_or_name: str | Path, task: str, split: str | None, request: _Request) -> Iterator[Row]:
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
        yield from formats.conll_rows(path, tagged=request.labelled)
    elif suffix in formats.TEXT_SUFFIXES:
        yield from formats.text_rows(path)
    elif suffix in formats.DELIMITED_SUFFIXES:
        wanted = (*request.text_columns, *filter(None, (request.label_column,)))
        yield from formats.delimited_rows(path, wanted)
    else:
        raise ValueError(f"{path}: expected a file with a suffix of {', '.join(formats.FILE_SUFFIXES)}; got {suffix!r}")


def _column(row: Row, usual: Sequence[str], named: str | None, argument: str) -> str:
    """The name of the column to read: the one that the caller named, else the first usual one."""
    for name in (named,) if named is not None else usual:
        if name in row.values:
            return name
    wanted = f"the column {named!r}" if named is not None else f"a column of {list(usual)}"
    raise ValueError(f"{row.where}: expected {wanted} ({argument}); the columns are {list(row.values)}")


def _text(row: Row, column: str, may_be_empty: bool = False) -> str:
    value = row.values.get(column)
    if not isinstance(value, str) or not (value.strip() or may_be_empty):
        raise ValueError(f"{row.where}: expected text in {column!r}; got {value!r}")
    return value


def _check_known(where: str, what: str, name: str, labels: LabelSet | None) -> None:
    if labels is not None and name not in labels:
        raise ValueError(f"{where}: {what} {name!r} was not seen in training; known: {list(labels.names)}")


def _stated(*names: str | None) -> list[str]:
    return [name for name in names if name is not None]


def _classification_example(row: Row, request: _Request) -> dict[str, Any]:
    columns: tuple[str, ...] = request.text_columns
    if not columns:
        pairs = (pair for pair in PAIR_COLUMNS if all(name in row.values for name in pair))
        columns = next(pairs, ())
    if not columns:
        columns = (_column(row, TEXT_COLUMNS, None, "text_column"),)
    example: dict[str, Any] = {}
    for key, column in zip(("text", "text_pair"), columns, strict=False):
        example[key] = _text(row, _column(row, (), column, "text_column")).strip()
    names = _stated(request.label_column, *LABEL_COLUMNS)
    if not request.labelled and all(row.values.get(name) in (None, "") for name in names):
        return example
    column = _column(row, LABEL_COLUMNS, request.label_column, "label_column")
    label = row.values[column]
    if isinstance(label, str):
        label = label.strip()
    if not isinstance(label, str | int) or label == "":
        raise ValueError(f"{row.where}: expected a label (text or an integer) in {column!r}; got {label!r}")
    example["label"] = str(label)
    _check_known(row.where, "label", example["label"], request.labels)
    return example


def _refuse_header_as_example(row: Row, examples: list[dict[str, Any]]) -> None:
    """Refuses `comment_text<TAB>stars` as an example of a class "stars" that only it has."""
    if list(row.values) != ["sentence", "label"] or not row.where.endswith(", line 1"):
        return
    words = (examples[0]["text"], examples[0]["label"])
    counts = Counter(example["label"] for example in examples)
    # The only label that occurs once, beside a single word.
    alone = len(counts) > 1 and [name for name in counts if counts[name] == 1] == [words[1]]
    if alone and all(_IDENTIFIER.fullmatch(word) for word in words):
        raise ValueError(
            f"{row.where}: {list(words)} looks like a header with unknown names;"
            " name the columns with text_column and label_column"
        )


def _tokens_example(row: Row, request: _Request) -> dict[str, Any]:
    named = request.text_columns[0] if request.text_columns else None
    tokens = row.values[_column(row, TOKEN_COLUMNS, named, "text_column")]
    if not _is_texts(tokens) or not tokens:
        raise ValueError(f"{row.where}: expected a list of words in 'tokens'; got {tokens!r}")
    example: dict[str, Any] = {"tokens": list(tokens)}
    names = _stated(request.label_column, *TAG_COLUMNS)
    if not request.labelled and not any(row.values.get(name) for name in names):
        return example
    tags = row.values[_column(row, TAG_COLUMNS, request.label_column, "label_column")]
    if not isinstance(tags, list | tuple):
        raise ValueError(f"{row.where}: expected a list of IOB tags; got {tags!r}")
    if len(tokens) != len(tags):
        raise ValueError(f"{row.where}: expected as many tags as tokens; got {len(tokens)} tokens and {len(tags)} tags")
    file_lines = row.values.get("lines")
    for index, tag in enumerate(tags):
        where = f"{row.where}, token {index + 1}"
        if file_lines is not None:
            where = f"{row.where.rpartition(', line ')[0]}, line {file_lines[index]}"
        if not isinstance(tag, str) or not _TAG.fullmatch(tag):
            raise ValueError(f"{where}: expected the tag O, B-x or I-x; got {tag!r}")
        _check_known(where, "tag", tag, request.labels)
    example["tags"] = list(tags)
    return example


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _question_example(row: Row, request: _Request) -> dict[str, Any]:
    for column in ("question", "context"):
        _column(row, (), column, column)
    context = _text(row, "context")
    example: dict[str, Any] = {
        "id": str(row.values.get("id", row.where)),
        "question": _text(row, "question"),
        "context": context,
    }
    if "answers" not in row.values and not request.labelled:
        return example
    _column(row, ("answers",), None, "answers")
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
    if row.values.get("is_impossible") and texts:
        raise ValueError(f"{row.where}: is_impossible is true; expected no answers, got {texts}")
    example["answers"] = {"text": texts, "answer_start": starts}
    return example


def _answers(row: Row) -> tuple[list[Any], list[Any]]:
    """Texts and starts from {"text": [...], "answer_start": [...]} or a list of such pairs."""
    answers = row.values["answers"]
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


def _language_example(row: Row, request: _Request) -> dict[str, Any]:
    if not request.text_columns and {"prompt", "completion"} <= row.values.keys():
        return {
            "prompt": _text(row, "prompt"),
            "completion": _text(row, "completion", may_be_empty=not request.labelled),
        }
    if not request.text_columns and not request.labelled and "prompt" in row.values:
        return {"prompt": _text(row, "prompt")}
    named = request.text_columns[0] if request.text_columns else None
    return {"text": _text(row, _column(row, TEXT_COLUMNS, named, "text_column"))}


_CONVERTERS: dict[str, Callable[[Row, _Request], dict[str, Any]]] = {
    "SEQ_CLS": _classification_example,
    "TOKEN_CLS": _tokens_example,
    "QUESTION_ANS": _question_example,
    "CAUSAL_LM": _language_example,
}


def conll_lines(examples: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The lines of a CoNLL file (`token<TAB>tag`, a blank line after each sentence)."""
    for example in examples:
        for token, tag in zip(example["tokens"], example["tags"], strict=True):
            yield f"{token}\t{tag}"
        yield ""
