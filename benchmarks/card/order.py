"""What the parent of a run tells the process of a phase."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

# Exit status of a phase after which the device does not answer in its process: another process may go on.
BROKEN = 3


@dataclass(frozen=True)
class Order:
    """What a phase's process is told; all of it JSON.

    Attributes:
        phase, work, arguments: of the plan.
        device, tiny, fault: of the command line.
        seconds: until it is stopped.
        lines: the file for what it finds.
        log: the file that its output is appended to.
        scratch: folder for what its tools write.
        ceiling: what the device was measured to reach, once it was.
        done: cells that an earlier attempt finished.
        attempt: how many there were before.
        before: what earlier phases found that later ones need: winners of tuning, names of failed tests.
    """

    phase: str
    work: str
    arguments: dict[str, object]
    device: str
    tiny: bool
    fault: str | None
    seconds: float
    lines: str
    log: str
    scratch: str
    ceiling: dict[str, float] | None
    done: list[str]
    attempt: int
    before: dict[str, object]

    def text(self) -> str:
        """The order as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> Order:
        """The order that a text says."""
        return cls(**json.loads(text))
