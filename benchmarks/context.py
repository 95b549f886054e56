"""What a suite is given: where to run, until when, and the file that takes its results."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.record import ResultFile


@dataclass
class Context:
    """One run of one suite.

    Attributes:
        device: where it runs.
        tiny: a few small cells, to see that everything works.
        out: folder for everything the run writes.
        deadline: `time.monotonic()` at which the run has to be over.
        result: the run's file.
        only: shell patterns; a case counts when its id fits one of them, all when empty.
        keep_going: measure on after a red cell; the run stays red.
        tests: what the parity suite gives to pytest.
        data: what the quality suite reads.
    """

    device: torch.device
    tiny: bool
    out: Path
    deadline: float
    result: ResultFile
    only: tuple[str, ...] = ()
    keep_going: bool = False
    tests: Path = field(default_factory=lambda: Path("tests/kernels"))
    data: Path | None = None

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def chosen(self, cases: Iterable) -> list:
        """The cases that `only` names."""
        return [
            case
            for case in cases
            if not self.only or any(fnmatch.fnmatch(case.id, pattern) for pattern in self.only)
        ]

    def say(self, line: str) -> None:
        """One line for whoever watches; flushed, since a run may be cut off at any moment."""
        print(line, flush=True)
