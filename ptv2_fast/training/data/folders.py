"""Folders: the splits of what `datasets.save_to_disk` wrote, and of data files whose names say which split they are."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ptv2_fast.training.data.rows import suffix_of

# How files and folders are called that hold a split.
_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "devel": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_ORDER = tuple(dict.fromkeys(_SPLITS.values()))
# Files that stand beside data and are none.
_ABOUT = ("readme", "license", "dataset_info", "dataset_dict", "state")


def usual_split(name: str) -> str:
    """The usual name of a split: "validation" for "dev"."""
    return _SPLITS.get(name.lower(), name)


def saved_parts(folder: Path) -> dict[str, list[Path]] | None:
    """Split -> the Arrow files of a folder that `datasets.save_to_disk` wrote; None where it did not.

    Raises:
        ValueError: what describes the folder is damaged.
    """
    if (folder / "dataset_dict.json").is_file():
        names = _object(folder / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{folder / 'dataset_dict.json'}: expected the names of splits; got {names!r}")
        return {name: _shards(folder / name)[1] for name in names}
    if not (folder / "state.json").is_file():
        return None
    split, files = _shards(folder)
    return {split or "all": files}


def saved_features(folder: Path) -> dict[str, Any]:
    """The columns that `datasets` has described beside its Arrow files."""
    path = folder / "dataset_info.json"
    features = _object(path).get("features") if path.is_file() else None
    return features if isinstance(features, dict) else {}


def _shards(folder: Path) -> tuple[str | None, list[Path]]:
    state = _object(folder / "state.json")
    files = state.get("_data_files")
    names = [one.get("filename") for one in files if isinstance(one, dict)] if isinstance(files, list) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{folder / 'state.json'}: expected the names of Arrow files; got {files!r}")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ValueError(
            f"{folder / 'state.json'}: expected rows as they stand; an older `datasets` has kept which of them count:"
            " load and save the folder anew (load_from_disk, flatten_indices, save_to_disk)"
        )
    split = state.get("_split")
    return split if isinstance(split, str) else None, [folder / str(name) for name in names]


def _object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object of `datasets`; {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object of `datasets`; got {type(values).__name__}")
    return values


def file_parts(folder: Path, suffixes: Collection[str]) -> dict[str, list[Path]]:
    """Split -> data files of a folder and the folders in it, of one format.

    A file belongs to the split that its name, or that of a folder that it is in, has as a word: `train.csv`,
    `data/test-00000-of-00002.parquet`, `dev/part1.jsonl`. Without such names all files are "train".

    Args:
        suffixes: of data files.

    Raises:
        FileNotFoundError: there is no data file.
        ValueError: files are of several formats, or some name a split and others do not.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _is_data(path.relative_to(folder)))
    files = [path for path in files if suffix_of(path) in suffixes]
    if not files:
        raise FileNotFoundError(
            f"{folder}: expected data files ({', '.join(sorted(suffixes))}) in the folder; got none"
        )
    found = sorted({_kind(path) for path in files})
    if len(found) > 1:
        raise ValueError(f"{folder}: expected data files of one format in the folder; got {', '.join(found)}")
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    unnamed = splits.get("", [])
    if unnamed and len(splits) > 1:
        some = ", ".join(path.name for path in unnamed[:3])
        raise ValueError(
            f"{folder}: expected train, dev or test in the name of every data file, or of none; {some} has no such name"
        )
    return {"train": unnamed} if unnamed else dict(sorted(splits.items(), key=lambda part: _ORDER.index(part[0])))


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith((".", "__")) for part in path.parts)
    return not hidden and not path.name.lower().startswith(_ABOUT)


def _kind(path: Path) -> str:
    """Suffixes that are one format."""
    suffix = suffix_of(path)
    return ".jsonl" if suffix in (".json", ".ndjson") else suffix


def _split_of(path: Path) -> str:
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), "")
