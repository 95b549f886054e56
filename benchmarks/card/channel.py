"""How a phase tells its parent what it finds: one JSON line for each thing, in a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from benchmarks.record import Results


class Lines(Results):
    """What a phase's suite writes to; every changed cell goes to the parent at once.

    Args:
        path: the file.
        suite: whose cells they are.
    """

    def __init__(self, path: Path, suite: str):
        super().__init__({})
        self._file = open(path, "a")
        self._suite = suite

    def changed(self, cell: dict[str, object]) -> None:
        """Send a cell."""
        self.send(cell=cell, suite=self._suite)

    def fail(self, line: str) -> None:
        """Send a failure."""
        self.send(fail=line)

    def send(self, **line: object) -> None:
        """Send one line; what has NaN in it is no JSON and is refused."""
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def end(self, state: str, reason: str = "") -> None:
        """The last line: what became of the phase, and what else its suite recorded."""
        rest = {name: value for name, value in self.data.items() if name != "cells"}
        self.send(end=state, reason=reason, rest=rest, suite=self._suite)


class Heard:
    """The lines of a phase, read as they come; half a line waits for its other half.

    Args:
        path: the file, which need not exist yet.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file: TextIO | None = None
        self._rest = ""

    def __iter__(self) -> Iterator[dict]:
        """What is new since the last time."""
        if self._file is None:
            if not self._path.exists():
                return
            self._file = open(self._path)
        *whole, self._rest = (self._rest + self._file.read()).split("\n")
        for text in whole:
            yield json.loads(text)
