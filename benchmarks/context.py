"""What a suite is given: where to run, until when, and the file that takes its results."""

from __future__ import annotations

import fnmatch
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.ceilings import Ceiling
from benchmarks.record import Results


@dataclass
class Context:
    """One run of one suite.

    Attributes:
        device: where it runs.
        tiny: a few small cells, to see that everything works.
        out: folder for everything the run writes.
        deadline: `time.monotonic()` at which the run has to be over.
        result: what the run writes to.
        only: shell patterns; a case counts when its id fits one of them, all when empty.
        keep_going: measure on after a red cell; the run stays red.
        tests: what the parity suite gives to pytest.
        first_tests: names of tests that it gives before these.
        data: what the quality suite reads.
        small: less effort for each cell: more cells in the same time.
        every_peer: also the compiled peers that no goal compares with.
        ceiling: what the device was measured to reach; None where nobody measured it.
        done: ids of cells that an earlier try of this run has finished.
    """

    device: torch.device
    tiny: bool
    out: Path
    deadline: float
    result: Results
    only: tuple[str, ...] = ()
    keep_going: bool = False
    tests: Path = field(default_factory=lambda: Path("tests/kernels"))
    data: Path | None = None
    first_tests: tuple[str, ...] = ()
    small: bool = False
    every_peer: bool = False
    ceiling: Ceiling | None = None
    done: frozenset[str] = frozenset()

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def chosen(self, cases: Iterable) -> list:
        """The cases that `only` names and that are not done yet."""
        return [case for case in cases if self.wants(case.id)]

    def wants(self, name: str) -> bool:
        """Whether `only` names a cell or check, and it is not done yet."""
        if name in self.done:
            return False
        return not self.only or any(fnmatch.fnmatch(name, pattern) for pattern in self.only)

    @property
    def memory(self) -> int:
        """Bytes that the device has in all; the machine's own on the CPU, where nothing large is tried."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def say(self, line: str) -> None:
        """One line for whoever watches; flushed, since a run may be cut off at any moment."""
        print(line, flush=True)
