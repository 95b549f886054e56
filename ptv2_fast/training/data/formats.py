"""Formats: how each kind of file is recognised and read, and the splits of whatever holds data.

A file is recognised by its suffix, a `.gz` behind it aside, or is of the format that the caller names. Tagged words are
often in `.txt` and `.tsv`, which is what these are for TOKEN_CLS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeAlias

from ptv2_fast.training.data.arrow_files import arrow_rows, parquet_rows
from ptv2_fast.training.data.columns import Wanted
from ptv2_fast.training.data.conll import conll_rows
from ptv2_fast.training.data.conllu import conllu_rows
from ptv2_fast.training.data.delimited import delimited_rows
from ptv2_fast.training.data.folders import file_parts, saved_features, saved_parts, usual_split
from ptv2_fast.training.data.hub import hub_rows, hub_splits
from ptv2_fast.training.data.json_files import json_rows
from ptv2_fast.training.data.rows import Row, suffix_of
from ptv2_fast.training.data.text_files import text_rows


@dataclass(frozen=True)
class Reading:
    """What a file is read for.

    Attributes:
        task: of the rows.
        wanted: the columns that the caller names.
        headers: usual names of the task's own columns, by which the header of a table is known.
        notes: is given a line for whatever is left out or read otherwise than it stands there.
        format: one of `FORMATS`, where the caller says it.
    """

    task: str
    wanted: Wanted = Wanted()
    headers: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    format: str | None = None


def _table(separator: str, path: Path, reading: Reading) -> Iterator[Row]:
    if reading.task == "TOKEN_CLS":
        kind = "csv" if separator == "," else "tsv"
        raise ValueError(f"{path}: tokens and their tags are read from CoNLL files and JSON; got a table (.{kind})")
    return delimited_rows(
        path,
        reading.wanted.named,
        separator=separator,
        task=reading.task,
        headers=reading.headers,
        labelled=reading.wanted.labelled,
        notes=reading.notes,
    )


def _json(path: Path, reading: Reading) -> Iterator[Row]:
    return json_rows(path, reading.notes)


def _text(path: Path, reading: Reading) -> Iterator[Row]:
    return text_rows(path)


def _tagged(rows: Callable[..., Iterator[Row]], path: Path, reading: Reading) -> Iterator[Row]:
    if reading.task != "TOKEN_CLS":
        raise ValueError(f"{path}: CoNLL files are for TOKEN_CLS; got the task {reading.task}")
    wanted = reading.wanted
    columns = {
        "token_column": next(iter(wanted.texts), None),
        "tag_column": wanted.label if wanted.labelled else None,
    }
    return rows(path, wanted.labelled, **columns, notes=reading.notes)


def _parquet(path: Path, reading: Reading) -> Iterator[Row]:
    return parquet_rows(path)


@dataclass(frozen=True)
class Format:
    """How files of a kind are called and read."""

    suffixes: tuple[str, ...]
    rows: Callable[[Path, Reading], Iterator[Row]]


FORMATS: Mapping[str, Format] = {
    "csv": Format((".csv",), partial(_table, ",")),
    "tsv": Format((".tsv",), partial(_table, "\t")),
    "json": Format((".jsonl", ".ndjson", ".json"), _json),
    "conll": Format((".conll", ".iob", ".iob2", ".bio", ".bioes", ".bilou"), partial(_tagged, conll_rows)),
    "conllu": Format((".conllu",), partial(_tagged, conllu_rows)),
    "text": Format((".txt",), _text),
    "parquet": Format((".parquet",), _parquet),
}
_BY_SUFFIX = {suffix: name for name, kind in FORMATS.items() for suffix in kind.suffixes}
# What holds tagged words where words are tagged.
_CONLL_TOO = (".tsv", ".txt")
_KNOWN = f"a data file ({', '.join(_BY_SUFFIX)}), a folder of such files or of `datasets`"

Rows: TypeAlias = Callable[[], Iterator[Row]]


def format_of(path: Path, task: str, named: str | None = None) -> str:
    """The format of a file: the one that is named, else that of its suffix.

    Raises:
        ValueError: there is no format of that name, or for that suffix.
    """
    suffix = suffix_of(path)
    if named is not None:
        if named not in FORMATS:
            raise ValueError(f"format: must be one of {', '.join(FORMATS)}; got {named!r}")
        return named
    if task == "TOKEN_CLS" and suffix in _CONLL_TOO:
        return "conll"
    if suffix not in _BY_SUFFIX:
        raise ValueError(
            f"{path}: expected a file with a suffix of {', '.join(_BY_SUFFIX)}; got {suffix!r}; format (--format) says"
            " what it is"
        )
    return _BY_SUFFIX[suffix]


def is_conll(path: str, named: str | None = None) -> bool:
    """Whether a file's columns have numbers for names, or those of CoNLL-U."""
    return (named or _BY_SUFFIX.get(suffix_of(Path(path)))) in ("conll", "conllu")


def splits_in(place: str | Path, reading: Reading) -> dict[str | None, Rows]:
    """Split -> what reads its rows, of a file (whose split is None), a folder or a data set's name.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: the format is not known, or the folder has files of several.
    """
    path = Path(place)
    if path.is_file() or (not path.is_dir() and (reading.format or suffix_of(path) in _BY_SUFFIX)):
        read = FORMATS[format_of(path, reading.task, reading.format)].rows
        return {None: partial(read, path, reading)}
    if not path.is_dir():
        return {
            name: partial(hub_rows, str(place), name, rows) for name, rows in hub_splits(str(place), _KNOWN).items()
        }
    saved = saved_parts(path)
    if saved is not None:
        return {name: partial(_saved_rows, path, name, files) for name, files in saved.items()}
    suffixes = [suffix for suffix in _BY_SUFFIX]
    return {name: partial(_file_rows, files, reading) for name, files in file_parts(path, suffixes).items()}


def _file_rows(files: list[Path], reading: Reading) -> Iterator[Row]:
    kinds = [FORMATS[format_of(path, reading.task, reading.format)] for path in files]
    return chain.from_iterable(kind.rows(path, reading) for kind, path in zip(kinds, files, strict=True))


def _saved_rows(folder: Path, split: str, files: list[Path]) -> Iterator[Row]:
    shards = (
        arrow_rows(path, f"{folder}[{split}]" + (f", {path.name}" if len(files) > 1 else ""), features)
        for path in files
        for features in [saved_features(path.parent)]
    )
    return chain.from_iterable(shards)


def chosen_split(place: str | Path, splits: Mapping[str | None, Rows], split: str | None) -> Rows:
    """What reads the split that is meant.

    Raises:
        ValueError: it must be chosen, there is none of that name, or a file has none.
    """
    if None in splits:
        if split is not None:
            raise ValueError(f"split: must be None for a file ({place}); got {split!r}")
        return splits[None]
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    names = sorted(map(str, splits))
    for name in (split, usual_split(split or "")):
        if name in splits:
            return splits[name]
    raise ValueError(f"split (--split): must be one of {names} for {place}; got {split!r}")
