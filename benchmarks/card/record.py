"""The record of a run: `card.json`, whole on disk after each result; `card.log`; and `failures.txt`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks import report
from benchmarks.record import SCHEMA, write_json

_RED = ("wrong", "failed")
# The phase that has to be green before anything is timed.
_GATES = "gates"


class CardRecord:
    """What one run has found.

    Args:
        out: the folder; it is created.
        plan: name of the plan.
        command: the command line.
        environment: what is known of the machine and the code before the first phase.
    """

    def __init__(self, out: Path, plan: str, command: list[str], environment: dict[str, object]):
        out.mkdir(parents=True, exist_ok=True)
        self._path, self.log_path, self._failures = out / "card.json", out / "card.log", out / "failures.txt"
        self._begin = time.monotonic()
        self.data: dict[str, object] = {
            "schema": SCHEMA, "suite": "card", "plan": plan, "state": "running", "command": command,
            "environment": environment, "phases": [], "failures": [], "rest": {}, "cells": [],
        }  # fmt: skip
        self.log_path.write_text("")
        self._failures.write_text("")
        self.write()

    @property
    def gates_are_red(self) -> bool:
        """Whether a check of the gates was wrong or failed, or they came to no verdict, as where they were left out.

        Gates that were cut short are green where all they judged was right: what is timed is judged again before.
        """
        gates = next((phase for phase in self.data["phases"] if phase["name"] == _GATES), None)
        if gates is None or gates["state"] == "running":
            return False
        statuses = {cell.get("status") for cell in self.data["cells"] if cell["phase"] == _GATES}
        if statuses & set(_RED):
            return True
        return gates["state"] != "complete" and not (gates["state"] == "out of time" and "passed" in statuses)

    def done(self, phase: str) -> list[str]:
        """The cells that a phase has recorded, whatever they are."""
        return [cell["id"] for cell in self.data["cells"] if cell["phase"] == phase]

    def phase(self, name: str, **facts: object) -> None:
        """Write what is known of a phase; a line in the log and on the terminal for each change of its state."""
        phase = next((one for one in self.data["phases"] if one["name"] == name), None)
        if phase is None:
            phase = {"name": name}
            self.data["phases"].append(phase)
        phase.update({key: value for key, value in facts.items() if value is not None})
        self.write()
        took = f" after {phase['seconds']} s" if "seconds" in phase and phase["state"] != "running" else ""
        self.say(f"phase {name}: {phase['state']}{took} {phase.get('reason', '')}".rstrip())
        if phase["state"] == "failed":
            self.fail(f"phase {name}: {phase.get('reason', '')}")
        elif name == _GATES and phase["state"] in ("out of time", "skipped") and self.gates_are_red:
            # What nobody judged is as good as wrong: nothing is timed behind it.
            self.fail(f"phase {name}: {phase['state']} {phase.get('reason', '')}".rstrip())

    def environment(self, facts: Mapping[str, object]) -> None:
        """What the first phase found out of the machine; what was known before stands where it knows nothing."""
        known = {name: value for name, value in facts.items() if value is not None or name not in self._environment}
        self._environment.update(known | {"commit": self._environment["commit"]})
        self.write()

    @property
    def _environment(self) -> dict[str, object]:
        return self.data["environment"]

    def cell(self, suite: str, phase: str, cell: Mapping[str, object]) -> None:
        """Write a cell of a suite in place of the one with its id, or behind the others."""
        new = {**cell, "suite": suite, "phase": phase}
        cells = self.data["cells"]
        place = next((i for i, old in enumerate(cells) if (old["suite"], old["id"]) == (suite, cell["id"])), None)
        if place is None:
            cells.append(new)
        else:
            cells[place] = new
        self.write()
        for what in failures_of(new):
            self.fail(f"{phase}: {what}")

    def rest(self, suite: str, rest: Mapping[str, object]) -> None:
        """What a suite's record has beside cells: the calls of its providers, winners of tuning."""
        self.data["rest"] = _joined(self.data["rest"], {suite: rest})
        self.write()

    def fail(self, line: str) -> None:
        """One line in the list of failures, once."""
        if line not in self.data["failures"]:
            self.data["failures"].append(line)
            self._failures.write_text("".join(f"{one}\n" for one in self.data["failures"]))
            self.write()

    def say(self, line: str) -> None:
        """One line on the terminal and in the log."""
        print(line, flush=True)
        self.log(line)

    def log(self, line: str, text: bytes = b"") -> None:
        """One line in the log, with the time, and a text behind it."""
        with open(self.log_path, "ab") as file:
            file.write(f"[{time.monotonic() - self._begin:6.1f}] {line}\n".encode() + text + (b"\n" if text else b""))

    def state(self, *, out_of_time: bool) -> str:
        """What the run is: red where anything is, else out of time where a phase was cut or left out for that."""
        # What runs beside fills caches: it is cut short by what it does it for.
        states = {phase["state"] for phase in self.data["phases"] if not phase.get("beside")}
        red = any(True for cell in self.data["cells"] for _ in failures_of(cell))
        if red or self.gates_are_red or states & {"red", "failed"}:
            return "red"
        late = any(phase["state"] == "skipped" and "too late" in phase["reason"] for phase in self.data["phases"])
        return "out of time" if out_of_time or late or "out of time" in states else "complete"

    def close(self, state: str, **facts: object) -> str:
        """Close the run; gives the table that stands last on the terminal."""
        self.data |= {"state": state, **facts}
        self.write()
        return "\n".join(filter(None, map(report.summary, report.parts(self.data))))

    def write(self) -> None:
        """Replace the file by the present contents."""
        write_json(self._path, self.data)


def found_in(data: Mapping) -> dict[str, object]:
    """What later phases, of this call or the next, need to know: winners of tuning, and failed tests by name."""
    # "native: failed test PATH::NAME: why"
    lines = [line.split(" failed test ")[1] for line in data["failures"] if " failed test " in line]
    return {
        "winners": data["rest"].get("tune", {}).get("winners", {}),
        "failed_tests": [line.split(": ")[0] for line in lines],
    }


def _joined(old: object, new: object) -> object:
    """What two attempts at a phase recorded: of the same thing what came last, of tables the rows of both."""
    if not isinstance(old, dict) or not isinstance(new, Mapping):
        return new
    return {**old, **{name: _joined(old.get(name), value) for name, value in new.items()}}


def failures_of(cell: Mapping[str, object]) -> list[str]:
    """What is red in a cell: itself, and providers of ours."""
    found = []
    if cell.get("status") in _RED:
        found.append(f"{cell['id']}: {cell['status']} {cell.get('reason') or ''}".rstrip())
    for name, entry in cell.get("peers", {}).items():
        if name.startswith("ours") and entry.get("status") in _RED:
            found.append(f"{cell['id']}: {name} {entry['status']} {entry.get('reason') or ''}".rstrip())
    return found
