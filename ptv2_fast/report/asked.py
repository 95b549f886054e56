"""What a report is asked for, checked before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptv2_fast.storage.names import WEIGHTS_NAME

# By this a page is known as one of ours, which another one may replace.
GENERATOR = "ptv2-fast report"
# What a search calls the folder of its best run, and the table of all.
BEST, TRIALS = "best", "trials.md"
_PROTECTED = 1024  # characters in which a page says what it is


@dataclass(frozen=True)
class Asked:
    """A report's runs and where it goes.

    Attributes:
        folders: each with one adapter.
        names: what the page calls them, all different.
        tables: of each run that a search chose the table of its trials, else None.
        output: the page.
        data: labelled data to score the runs on; None means each run's own development data.
        examples: the most rows that a list of the page shows.
        device: where the models run; None means the CPU.
    """

    folders: tuple[Path, ...]
    names: tuple[str, ...]
    tables: tuple[Path | None, ...]
    output: Path
    data: str | None
    examples: int
    device: Any = None


def asked(
    runs: Sequence[str | Path], output: str | Path, *, data: str | Path | None = None, examples: int = 20
) -> Asked:
    """What is asked for, with every folder and file that it names looked at; nothing is written.

    Args:
        runs: folders of `ptv2-fast train`, or of `ptv2-fast search`, of which the best run is meant.

    Raises:
        FileNotFoundError: a run or the data is not there.
        ValueError: a folder holds no finished run, one is named twice, the page cannot be where it shall be, or
            `examples` is no positive number.
    """
    if not runs:
        raise ValueError("runs must name at least one folder of a finished run; got none")
    if not isinstance(examples, int) or isinstance(examples, bool) or examples < 1:
        raise ValueError(f"examples must be a positive integer; got {examples!r}")
    folders = tuple(_run_in(Path(run)) for run in runs)
    real = [folder.resolve() for folder in folders]
    twice = next((run for index, run in enumerate(folders) if real[index] in real[:index]), None)
    if twice is not None:
        raise ValueError(f"runs must differ; {twice} is named twice")
    page = Path(output)
    _check_page(page)
    # A name of the hub has no suffix.
    if data is not None and Path(data).suffix and not Path(data).exists():
        raise FileNotFoundError(f"{data}: expected a data file; there is none")
    tables = tuple(_table_beside(folder, Path(run)) for folder, run in zip(folders, runs, strict=True))
    return Asked(folders, _names(runs), tables, page, None if data is None else str(data), examples)


def _run_in(folder: Path) -> Path:
    """The folder of a run: this one, or that of a search's best run."""
    if not folder.exists():
        raise FileNotFoundError(f"run folder {folder} does not exist")
    if not folder.is_dir():
        raise ValueError(f"runs must be folders of finished runs; {folder} is a file")
    for place in (folder, folder / BEST):
        if (place / WEIGHTS_NAME).is_file():
            return place
    below = sorted(
        path.parent.name for path in folder.glob(f"*/{WEIGHTS_NAME}") if not path.parent.name.startswith(".")
    )
    if below:
        raise ValueError(f"{folder} holds several runs; name their folders: {', '.join(below)}")
    raise ValueError(f"{folder} holds no finished run ({WEIGHTS_NAME}): `ptv2-fast train` or `search` leaves one")


def _table_beside(folder: Path, given: Path) -> Path | None:
    table = given / TRIALS
    return table if folder != given and table.is_file() else None


def _names(runs: Sequence[str | Path]) -> tuple[str, ...]:
    """The last parts of the folders' paths, as many as tell them apart."""
    parts = [Path(run).resolve().parts for run in runs]
    longest = max(map(len, parts))
    names = (tuple("/".join(path[-count:]) for path in parts) for count in range(1, longest + 1))
    return next(found for found in names if len(set(found)) == len(found))


def _check_page(path: Path) -> None:
    """Refuse a path where no page can be, or where something else is."""
    if path.is_dir():
        raise ValueError(f"output must name a file; {path} is a folder")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"output must name a file in a folder; {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"output must name a file in a folder to write to; {above} is read-only")
    if path.exists() and GENERATOR not in _beginning(path):
        raise ValueError(f"output must be free or an earlier report; {path} is something else and is not overwritten")


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_PROTECTED).decode("utf-8", "replace")
