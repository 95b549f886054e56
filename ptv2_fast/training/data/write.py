"""Examples as files of this project's own form, which are read back and compared before they get their name."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ptv2_fast.training.data.problems import LABEL_SEPARATOR
from ptv2_fast.training.data.read import read_examples
from ptv2_fast.training.data.tags import TAG


def write_examples(
    path: Path, examples: Sequence[Mapping[str, Any]], task: str, problem_type: str | None = None
) -> None:
    """Write examples as .jsonl, .csv, .conll or .parquet, by the suffix; reading them gives the same examples.

    Raises:
        FileExistsError: the file is there already.
        ValueError: the suffix is another one, or such a file cannot hold the examples.
    """
    write = _WRITERS.get(path.suffix.lower())
    if write is None:
        raise ValueError(f"{path}: expected a file with a suffix of {', '.join(_WRITERS)}; got {path.suffix!r}")
    if path.exists():
        raise FileExistsError(f"{path} exists already; it is not overwritten")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: expected a folder to write into; there is none")
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix.lower()}")
    try:
        write(aside, examples)
        if not _reads_the_same(aside, examples, task, problem_type):
            raise ValueError(f"{path}: a {path.suffix} file cannot hold these examples; .jsonl holds all of a task")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _reads_the_same(path: Path, examples: Sequence[Mapping[str, Any]], task: str, problem_type: str | None) -> bool:
    classes = any(not TAG.fullmatch(tag) for example in examples for tag in example.get("tags", ()))
    try:
        again = read_examples(path, task, problem_type=problem_type, tag_scheme="plain" if classes else None)
    except ValueError:
        return False
    # A column that one example has, others have as None.
    return again == [{name: value for name, value in example.items() if value is not None} for example in examples]


def _write_jsonl(path: Path, examples: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in examples), encoding="utf-8")


def _write_csv(path: Path, examples: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(name for example in examples for name in example))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_cell(path, name, example.get(name, "")) for name in names] for example in examples)


def _cell(path: Path, name: str, value: Any) -> Any:
    if name == "labels":
        return LABEL_SEPARATOR.join(value)
    if isinstance(value, list | dict):
        raise ValueError(f"a .csv holds texts and numbers; {name!r} is {type(value).__name__}: write a .jsonl")
    return value


def _write_conll(path: Path, examples: Sequence[Mapping[str, Any]]) -> None:
    if not all("tags" in example for example in examples):
        raise ValueError("a .conll holds tagged words (TOKEN_CLS); write a .jsonl")
    sentences = ["".join(f"{t}\t{tag}\n" for t, tag in zip(e["tokens"], e["tags"], strict=True)) for e in examples]
    path.write_text("\n".join(sentences), encoding="utf-8")


def _write_parquet(path: Path, examples: Sequence[Mapping[str, Any]]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError as error:
        raise ValueError("Parquet is written by pyarrow, which `pip install ptv2-fast[train]` brings") from error
    parquet.write_table(pyarrow.Table.from_pylist(list(examples)), path)


_WRITERS: Mapping[str, Callable[[Path, Sequence[Mapping[str, Any]]], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".conll": _write_conll,
    ".parquet": _write_parquet,
}
