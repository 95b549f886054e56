"""File formats: from a path or a `datasets` name to rows that know where they stand in the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DELIMITED_SUFFIXES = {".csv": ",", ".tsv": "\t"}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
CONLL_SUFFIXES = (".conll", ".iob", ".iob2", ".bio")
TEXT_SUFFIXES = (".txt",)
FILE_SUFFIXES = (*DELIMITED_SUFFIXES, *JSON_SUFFIXES, *CONLL_SUFFIXES, *TEXT_SUFFIXES)


@dataclass(frozen=True)
class Row:
    """One record as the file has it; `where` names the file and the line for error messages.

    `lines` are those of the record's tokens, where each has its own.
    """

    where: str
    values: dict[str, Any]
    lines: tuple[int, ...] | None = None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file (a leading byte-order mark is dropped).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, holds only white space, or is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a data file; there is none")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: expected UTF-8 text; byte {error.start} of the file is"
            f" 0x{raw[error.start]:02x} ({error.reason})"
        ) from error
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise ValueError(f"{path}, line 1: expected at least one example; the file is empty")
    return text


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """(1-based number, content) of each line; only LF and CRLF end one, as editors count."""
    for number, line in enumerate(text.split("\n"), start=1):
        yield number, line.removesuffix("\r")


def text_rows(path: Path) -> Iterator[Row]:
    """Each line that is not blank as a row with the column `text`."""
    for number, line in lines_of(read_text(path)):
        if line.strip():
            yield Row(f"{path}, line {number}", {"text": line})


def json_rows(path: Path) -> Iterator[Row]:
    """Rows of JSON lines, of a JSON list of objects, or of SQuAD's nested JSON.

    Raises:
        ValueError: a line is not JSON or not an object; the message has line and column.
    """
    text = read_text(path)
    if path.suffix.lower() == ".json":
        try:
            root = _parsed(text)
        except json.JSONDecodeError as error:
            # "Extra data" after a whole object: JSON lines under the suffix .json.
            if not error.msg.startswith("Extra data"):
                raise ValueError(
                    f"{path}, line {error.lineno}: expected JSON; {error.msg} at column {error.colno}"
                ) from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: expected JSON; {error}") from error
        else:
            yield from _document_rows(path, root)
            return
    for number, line in lines_of(text):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = _parsed(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: expected one JSON object a line; {error.msg} at column {error.colno}"
            ) from error
        except (ValueError, RecursionError) as error:
            # What JSON allows and Python does not read: numbers of thousands of digits, endless nesting.
            raise ValueError(f"{where}: expected one JSON object a line; {error}") from error
        yield Row(where, _json_object(where, values))


def _parsed(text: str) -> Any:
    """JSON, with a name twice in one object refused: one of its two values would be lost."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"names in an object must differ; repeated: {repeated}")
    return values


def _json_object(where: str, values: object) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a JSON object; got {type(values).__name__}")
    return values


def _document_rows(path: Path, root: object) -> Iterator[Row]:
    """Rows of one JSON document; the place of a record is its index, as JSON keeps no lines."""
    if isinstance(root, dict) and isinstance(root.get("data"), list):
        yield from _squad_rows(path, root["data"])
    elif isinstance(root, list):
        for index, values in enumerate(root):
            where = f"{path}, record [{index}]"
            yield Row(where, _json_object(where, values))
    else:
        # A file of JSON lines with a single line.
        yield Row(f"{path}, line 1", _json_object(f"{path}, line 1", root))


def _squad_rows(path: Path, articles: list[Any]) -> Iterator[Row]:
    for a, article in enumerate(articles):
        place = f"{path}, data[{a}]"
        for p, paragraph in enumerate(_member(place, article, "paragraphs")):
            inner = f"{place}.paragraphs[{p}]"
            for q, question in enumerate(_member(inner, paragraph, "qas")):
                where = f"{inner}.qas[{q}]"
                yield Row(where, {"context": paragraph.get("context"), **_json_object(where, question)})


def _member(where: str, values: object, key: str) -> list[Any]:
    member = _json_object(where, values).get(key)
    if not isinstance(member, list):
        raise ValueError(f"{where}: expected a list {key!r}; got {member!r}")
    return member


def conll_rows(path: Path, tagged: bool = True, *, notes: list[str]) -> Iterator[Row]:
    """Sentences of a CoNLL file as rows with `tokens`, `tags` and the line of each token.

    A line is `token<TAB or spaces>...<tag>`: the first column is the token, the last the tag. A
    line of white space ends a sentence; `-DOCSTART-` lines are skipped; spaces around a column are
    tolerated. With `tagged=False` a line may hold the token alone. `notes` is given a line that
    counts the columns between them.

    Raises:
        ValueError: a line has no token or, when `tagged`, no tag.
    """
    tokens: list[str] = []
    tags: list[str] = []
    lines: list[int] = []
    between = starts = 0

    def sentence() -> Row:
        return Row(f"{path}, line {lines[0]}", {"tokens": tokens, "tags": tags}, tuple(lines))

    for number, line in lines_of(read_text(path)):
        # Only ASCII blanks separate: a no-break space or an emoji selector can be a token.
        content = line.strip(" \t\r")
        if content and content.split("\t")[0].split(" ")[0] == "-DOCSTART-":
            starts += 1
            content = ""
        if not content:
            if tokens:
                yield sentence()
                tokens, tags, lines = [], [], []
            continue
        columns = _conll_columns(line)
        if not columns[0] or (tagged and len(columns) < 2):
            raise ValueError(f"{path}, line {number}: expected token<TAB>tag; got {line!r}")
        tokens.append(columns[0])
        lines.append(number)
        between = max(between, len(columns) - 2)
        if len(columns) > 1:
            tags.append(columns[-1])
    if tokens:
        yield sentence()
    columns_between = f"up to {between} columns between token and tag"
    left = [text for count, text in ((between, columns_between), (starts, f"{starts} document marks")) if count > 0]
    if left:
        notes.append(f"{path}: left out: {' and '.join(left)}")


def _conll_columns(line: str) -> list[str]:
    line = line.rstrip(" \t\r")
    if "\t" in line:
        return [column.strip(" \r") for column in line.split("\t")]
    return re.split(" +", line.strip(" \r"))


def dataset_rows(name: str, split: str | None) -> Iterator[Row]:
    """Rows of a `datasets` folder on disk, a folder of data files, or a `name[:config]` on the hub.

    Class numbers become the class names that the dataset declares.

    Raises:
        FileNotFoundError: the dataset cannot be found or loaded.
        ValueError: the split is missing or must be chosen.
    """
    rows, split_name = _choose_split(name, _load_dataset(name), split)
    decoders = {column: _class_names(feature) for column, feature in rows.features.items()}
    for index, values in enumerate(rows):
        where = f"{name}[{split_name}], row {index}"
        yield Row(where, {key: _decode(values[key], decoders[key]) for key in values})


def _load_dataset(name: str) -> Any:
    import datasets

    folder = Path(name)
    markers = ("dataset_dict.json", "dataset_info.json", "state.json")
    try:
        if folder.is_dir() and any((folder / marker).is_file() for marker in markers):
            return datasets.load_from_disk(name)
        if folder.is_dir():
            return datasets.load_dataset(name)
        repository, _, configuration = name.partition(":")
        return datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # its loaders raise what they like; the message is theirs
        raise FileNotFoundError(
            f"{name}: expected a data file ({', '.join(FILE_SUFFIXES)}), a `datasets` folder or the"
            f" name of a dataset; it could not be loaded: {error}"
        ) from error


def _choose_split(name: str, loaded: Any, split: str | None) -> tuple[Any, str]:
    if not isinstance(loaded, dict):
        own = str(loaded.split) if loaded.split is not None else None
        if split is not None and own is not None and split != own:
            raise ValueError(f"split: {name} holds only {own!r}; got {split!r}")
        return loaded, own or split or "all"
    if split is None and len(loaded) == 1:
        split = next(iter(loaded))
    if split not in loaded:
        raise ValueError(f"split: must be one of {sorted(loaded)} for {name}; got {split!r}")
    return loaded[split], str(split)


def _class_names(feature: Any) -> list[str] | None:
    inner = getattr(feature, "feature", feature)
    names = getattr(inner, "names", None)
    return list(names) if isinstance(names, list | tuple) else None


def _decode(value: Any, names: list[str] | None) -> Any:
    if names is None or value is None:
        return value
    if isinstance(value, list):
        return [_decode(item, names) for item in value]
    # A split without labels stores -1, which names no class.
    return names[value] if 0 <= value < len(names) else None
