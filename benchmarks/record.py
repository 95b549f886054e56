"""The result file: one JSON a run, whole on disk after every cell."""

from __future__ import annotations

import json
from pathlib import Path

from ptv2_fast.storage.files import write_whole

SCHEMA = 1
# "running" is what a killed run leaves behind.
STATES = ("running", "complete", "out of time", "red")
# What became of a provider or a check in a cell.
STATUSES = (
    "timed", "passed", "untimed", "not applicable", "wrong", "failed", "refused", "out of memory", "out of time",
)  # fmt: skip


class Results:
    """What a suite writes to: cells, and whatever else its record holds.

    Attributes:
        data: the whole record; "cells" is what has been measured or checked.
    """

    def __init__(self, data: dict[str, object]):
        self.data: dict[str, object] = {**data, "cells": []}

    @property
    def cells(self) -> list[dict[str, object]]:
        """What has been measured or checked."""
        return self.data["cells"]

    def put(self, cell: dict[str, object]) -> None:
        """Write a cell in place of the one with its id, or append it: cells grow while their peers are measured."""
        place = next((i for i, old in enumerate(self.cells) if old["id"] == cell["id"]), None)
        if place is None:
            self.cells.append(cell)
        else:
            self.cells[place] = cell
        self.changed(cell)

    def fail(self, line: str) -> None:
        """One failure in words, at once: what a cell would say only when it is whole."""
        self.data.setdefault("failures", []).append(line)

    def changed(self, cell: dict[str, object]) -> None:
        """A cell is new or another one than before."""


class ResultFile(Results):
    """One run's results, rewritten in one step at every change.

    Args:
        path: the file; its folder is created.
        suite: name of the suite.
        command: the command line.
        environment: `benchmarks.environment.describe`.
    """

    def __init__(self, path: Path, suite: str, command: list[str], environment: dict[str, object]):
        super().__init__(
            {"schema": SCHEMA, "suite": suite, "state": "running", "command": command, "environment": environment}
        )
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def fail(self, line: str) -> None:
        """Write the failure into the file."""
        super().fail(line)
        self.write()

    def changed(self, cell: dict[str, object]) -> None:
        """Write the file."""
        self.write()

    def finish(self, state: str, **facts: object) -> None:
        """Close the run."""
        if state not in STATES:
            raise ValueError(f"state must be one of {STATES}; got {state!r}")
        self.data |= {"state": state, **facts}
        self.write()

    def write(self) -> None:
        """Replace the file by the present contents, or leave the old one whole."""
        write_json(self.path, self.data)


def write_json(path: Path, data: object) -> None:
    """Write JSON so that a reader sees the old file or the complete new one, nothing between."""
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_schema(data: dict) -> None:
    """Raise ValueError unless `data` is a result file of this schema."""
    if data.get("schema") != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}; got {data.get('schema')!r}")
    kinds = {"suite": str, "state": str, "command": list, "environment": dict, "cells": list}
    for key, kind in kinds.items():
        if not isinstance(data.get(key), kind):
            raise ValueError(f"{key} must be a {kind.__name__}; got {data.get(key)!r}")
    if data["state"] not in STATES:
        raise ValueError(f"state must be one of {STATES}; got {data['state']!r}")
    for cell in data["cells"]:
        if not isinstance(cell.get("id"), str):
            raise ValueError(f"a cell's id must be a string; got {cell.get('id')!r}")
        for entry in [*cell.get("peers", {}).values(), *([cell] if "status" in cell else [])]:
            if entry.get("status") not in STATUSES:
                raise ValueError(f"status must be one of {STATUSES}; got {entry.get('status')!r}")
            if entry["status"] == "timed" and not entry.get("ms", 0) > 0:
                raise ValueError(f"ms must be positive where status is timed; got {entry.get('ms')!r}")
