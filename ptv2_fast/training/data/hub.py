"""Data sets by name, which `datasets` finds on the hub or in its cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ptv2_fast.training.data.features import class_names, named
from ptv2_fast.training.data.rows import Row

# user/name:config; whatever else is meant as a path.
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:.*)?")


def hub_splits(name: str, known: str) -> dict[str, Any]:
    """Split -> rows of the data set `name[:config]`, as `datasets` has them.

    Args:
        known: what else could have been given, for the message.

    Raises:
        FileNotFoundError: it cannot be found or loaded.
    """
    if not _NAME.fullmatch(name):
        raise FileNotFoundError(f"{name}: expected {known}; there is none")
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: expected {known}; there is none, and the name of a data set needs `pip install ptv2-fast[train]`"
        ) from error
    try:
        repository, _, configuration = name.partition(":")
        loaded = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # its loaders raise what they like; the message is theirs
        raise FileNotFoundError(
            f"{name}: expected {known} or the name of a data set; it could not be loaded: {error}"
        ) from error
    return {str(split): rows for split, rows in loaded.items()}


def hub_rows(name: str, split: str, rows: Any) -> Iterator[Row]:
    """Rows of a split; class numbers become the names that the data set declares."""
    names = class_names(rows.features.to_dict())
    for index, values in enumerate(rows):
        yield Row(f"{name}[{split}], row {index}", named(values, names))
