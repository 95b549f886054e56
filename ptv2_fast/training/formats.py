"""File formats: from a path or a `datasets` name to rows that know where they stand in the file."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A first row that holds one of these (any case) names its columns; any other first row is data.
HEADER_NAMES = frozenset(
    "text sentence text_pair text_a text_b sentence1 sentence2 premise hypothesis question"
    " question1 question2 passage context review comment content label labels class category"
    " sentiment target prompt completion".split()
)
DELIMITED_SUFFIXES = {".csv": ",", ".tsv": "\t"}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
CONLL_SUFFIXES = (".conll", ".iob", ".iob2", ".bio")
TEXT_SUFFIXES = (".txt",)
FILE_SUFFIXES = (*DELIMITED_SUFFIXES, *JSON_SUFFIXES, *CONLL_SUFFIXES, *TEXT_SUFFIXES)


@dataclass(frozen=True)
class Row:
    """One record as the file has it; `where` names the file and the line for error messages."""

    where: str
    values: dict[str, Any]


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


def delimited_rows(path: Path, named: tuple[str, ...] = ()) -> Iterator[Row]:
    """Rows of a CSV (quotes as in RFC 4180) or TSV (no quoting: a tab always ends a column).

    The first row is a header when it holds a name of `HEADER_NAMES`, or when the caller named
    columns; without a header the columns are `sentence<TAB>label`, or one column `text`.

    Raises:
        ValueError: a row has more or fewer columns than the first one, or the quoting is broken.
    """
    header: list[str] | None = None
    for where, cells in _delimited_cells(path):
        if header is None:
            if named or any(cell.strip().lower() in HEADER_NAMES for cell in cells):
                header = [_column_name(cell.strip(), named) for cell in cells]
                repeated = sorted({name for name in header if header.count(name) > 1})
                if repeated:
                    raise ValueError(f"{where}: column names must differ; repeated: {repeated}")
                missing = [name for name in named if name not in header]
                if missing:
                    raise ValueError(f"{where}: expected the columns {missing}; got {header}")
                continue
            if len(cells) > 2:
                raise ValueError(
                    f"{where}: expected a header row or sentence<separator>label;"
                    f" got {len(cells)} columns without a known name: {cells}"
                )
            header = ["sentence", "label"] if len(cells) == 2 else ["text"]
        if len(cells) != len(header):
            raise ValueError(f"{where}: expected {len(header)} columns {header}; got {len(cells)}: {cells}")
        yield Row(where, dict(zip(header, cells, strict=True)))


def _column_name(cell: str, named: tuple[str, ...]) -> str:
    known = cell not in named and cell.lower() in HEADER_NAMES
    return cell.lower() if known else cell


def _delimited_cells(path: Path) -> Iterator[tuple[str, list[str]]]:
    text = read_text(path)
    separator = DELIMITED_SUFFIXES[path.suffix.lower()]
    if separator == "\t":
        for number, line in lines_of(text):
            if line.strip():
                yield f"{path}, line {number}", line.split("\t")
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{where}: expected comma-separated values; {error}") from error
        if any(cell.strip() for cell in cells):
            yield where, cells


def json_rows(path: Path) -> Iterator[Row]:
    """Rows of JSON lines, of a JSON list of objects, or of SQuAD's nested JSON.

    Raises:
        ValueError: a line is not JSON or not an object; the message has line and column.
    """
    text = read_text(path)
    if path.suffix.lower() == ".json":
        try:
            root = json.loads(text)
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
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: expected one JSON object a line; {error.msg} at column {error.colno}"
            ) from error
        except (ValueError, RecursionError) as error:
            # What JSON allows and Python does not read: numbers of thousands of digits, endless nesting.
            raise ValueError(f"{where}: expected one JSON object a line; {error}") from error
        yield Row(where, _json_object(where, values))


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


def conll_rows(path: Path, tagged: bool = True) -> Iterator[Row]:
    """Sentences of a CoNLL file as rows with `tokens`, `tags` and `lines` (of each token).

    A line is `token<TAB or spaces>...<tag>`: the first column is the token, the last the tag. A
    line of white space ends a sentence; `-DOCSTART-` lines are skipped; spaces around a column are
    tolerated. With `tagged=False` a line may hold the token alone.

    Raises:
        ValueError: a line has no token or, when `tagged`, no tag.
    """
    tokens: list[str] = []
    tags: list[str] = []
    lines: list[int] = []

    def sentence() -> Row:
        return Row(f"{path}, line {lines[0]}", {"tokens": tokens, "tags": tags, "lines": lines})

    for number, line in lines_of(read_text(path)):
        # Only ASCII blanks separate: a no-break space or an emoji selector can be a token.
        content = line.strip(" \t\r")
        if content and content.split("\t")[0].split(" ")[0] == "-DOCSTART-":
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
        if len(columns) > 1:
            tags.append(columns[-1])
    if tokens:
        yield sentence()


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
    except (OSError, ValueError) as error:
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
