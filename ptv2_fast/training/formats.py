"""File formats: from a path or a `datasets` name to rows that know where they stand in the file."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DELIMITED_SUFFIXES = {".csv": ",", ".tsv": "\t"}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
CONLL_SUFFIXES = (".conll", ".iob", ".iob2", ".bio")
TEXT_SUFFIXES = (".txt",)
# What `datasets` reads together, of all that it finds in a folder.
_TOGETHER = {**dict.fromkeys(DELIMITED_SUFFIXES, ".csv"), **dict.fromkeys(JSON_SUFFIXES, ".jsonl"), ".txt": ".txt"}
_TOGETHER |= {".parquet": ".parquet", ".arrow": ".arrow"}
_OTHER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip
_POINTER = "version https://git-lfs.github.com/spec/"
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
    """The text of a UTF-8 file (a leading byte-order mark is dropped); where no LF is in it, CR ends its lines.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, holds only white space, is not UTF-8, or is not what it was before it was copied.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a data file; there is none")
    raw = path.read_bytes()
    _refuse_other_encoding(path, raw)
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
    if text.startswith(_POINTER):
        raise ValueError(f"{path}, line 1: expected data; this is a pointer to it, which `git lfs pull` replaces")
    if "\n" not in text:
        return text.replace("\r", "\n")
    inside = text.find("\n\ufeff")
    if inside >= 0:
        line = text.count("\n", 0, inside) + 2
        raise ValueError(f"{path}, line {line}: a byte-order mark inside the file; two files seem to be joined in it")
    return text


def _refuse_other_encoding(path: Path, raw: bytes) -> None:
    for mark, name in _OTHER_MARKS:
        if raw.startswith(mark):
            raise ValueError(f"{path}, line 1: expected UTF-8 text; the file is {name} by its first bytes")
    if b"\0" in raw:
        at = raw.index(b"\0")
        line = raw.count(b"\n", 0, at) + 1
        raise ValueError(f"{path}, line {line}: expected UTF-8 text; byte {at} of the file is NUL, as in UTF-16")


def lines_of(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """(1-based number, content) of each line; LF ends one, with CR in front of it or not, as editors count.

    Raises:
        ValueError: CR stands inside a line, where other programs end one.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        if "\r" in line:
            raise ValueError(f"{path}, line {number}: a carriage return stands inside the line; end lines in one way")
        yield number, line


def text_rows(path: Path) -> Iterator[Row]:
    """Each line that is not blank as a row with the column `text`."""
    for number, line in lines_of(path, read_text(path)):
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
    for number, line in lines_of(path, text):
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
                values = _json_object(where, question)
                if "context" in values:
                    raise ValueError(f"{where}: 'context' must stand in the paragraph alone, not in the question too")
                yield Row(where, {"context": paragraph.get("context"), **values})


def _member(where: str, values: object, key: str) -> list[Any]:
    member = _json_object(where, values).get(key)
    if not isinstance(member, list):
        raise ValueError(f"{where}: expected a list {key!r}; got {member!r}")
    return member


def dataset_rows(name: str, split: str | None) -> Iterator[Row]:
    """Rows of a `datasets` folder on disk, a folder of data files, or a `name[:config]` on the hub.

    Class numbers become the class names that the dataset declares.

    Raises:
        FileNotFoundError: the dataset cannot be found or loaded.
        ValueError: the split is missing or must be chosen, or a folder has files of several formats.
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
    saved = any((folder / marker).is_file() for marker in markers)
    if folder.is_dir() and not saved:
        _refuse_several_formats(folder)
    try:
        if folder.is_dir() and saved:
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


def _refuse_several_formats(folder: Path) -> None:
    """Refuses a folder of which `datasets` would read the files of one format and leave out the others."""
    about = ("readme", "license", "dataset_info")
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.lower().startswith((".", *about))]
    found = sorted({_TOGETHER[path.suffix.lower()] for path in files if path.suffix.lower() in _TOGETHER})
    if len(found) > 1:
        raise ValueError(f"{folder}: expected data files of one format in the folder; got {', '.join(found)}")


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
