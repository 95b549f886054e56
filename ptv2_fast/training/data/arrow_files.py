"""Parquet, and the Arrow files of `datasets.save_to_disk`: columns with types, and names of class numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptv2_fast.training.data.features import class_names, named
from ptv2_fast.training.data.rows import Row


def parquet_rows(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file; class numbers become the names that `datasets` has written into it.

    Raises:
        ValueError: it is no whole Parquet file.
    """
    pyarrow = _pyarrow(path)
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _rows(str(path), file.schema_arrow, file.iter_batches())
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: expected a whole Parquet file; {error}") from error


def arrow_rows(path: Path, where: str, features: dict[str, Any]) -> Iterator[Row]:
    """Rows of an Arrow file, a stream as `datasets` writes it.

    Args:
        where: names the rows, which are counted from 0.
        features: what else is known of the columns, as `class_names` reads it.

    Raises:
        ValueError: it is no whole Arrow file.
    """
    pyarrow = _pyarrow(path)
    try:
        with pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
            yield from _rows(where, stream.schema, stream, features)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: expected a whole Arrow file; {error}") from error


def _pyarrow(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a data file; there is none")
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path}: Parquet and Arrow are read by pyarrow, which `pip install ptv2-fast[train]` brings"
        ) from error
    return pyarrow


def _rows(where: str, schema: Any, batches: Any, features: dict[str, Any] | None = None) -> Iterator[Row]:
    names = class_names({**(features or {}), **_declared(schema)})
    index = 0
    for batch in batches:
        for values in batch.to_pylist():
            yield Row(f"{where}, row {index}", named(values, names))
            index += 1


def _declared(schema: Any) -> dict[str, Any]:
    """The features that `datasets` has written into a file; none where somebody else wrote it."""
    written = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(written)["info"]["features"] if written is not None else {}
    except (ValueError, LookupError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}
