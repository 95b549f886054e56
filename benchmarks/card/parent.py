"""The clock of a run: starts each phase of a plan in its time, ends it in its time, and keeps the one record.

It never touches the device itself: what a phase breaks is broken in that phase's process.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.card.channel import Heard
from benchmarks.card.order import BROKEN, Order
from benchmarks.card.plans import GREEN, RED, Phase, Plan
from benchmarks.card.record import CardRecord, found_in

_POLL_SECONDS = 0.05
# What a phase has to end by itself after its seconds, before it is ended.
_GRACE = 1.0
# What is kept of a tool's own output in the log.
_TAIL_BYTES = 100_000
_MOST_ATTEMPTS = 2
# Kept free at the end of a run to write and print.
_CLOSING = 3.0


@dataclass
class Running:
    """A phase whose process lives.

    Attributes:
        process: the process, first of a group of its own.
        until: when it is ended, by the run's clock.
        end: what it said at its end; None until then.
        stopped_at: since when it waits for something that is timed; None while it runs.
    """

    phase: Phase
    process: multiprocessing.process.BaseProcess
    heard: Heard
    scratch: Path
    started: float
    until: float
    attempt: int
    end: dict | None = None
    stopped_at: float | None = None

    @property
    def stopped(self) -> bool:
        """Whether it waits for something that is timed."""
        return self.stopped_at is not None


class Parent:
    """Runs one plan.

    Args:
        plan: what to do, in seconds of this run.
        device, tiny, fault: as on the command line.
        record: takes what is found.
        before: what an earlier call found that this one needs.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        device: str,
        tiny: bool,
        fault: str | None,
        record: CardRecord,
        before: Mapping[str, object] | None = None,
    ):
        self._plan, self._device, self._tiny, self._fault = plan, device, tiny, fault
        self._record = record
        self._before: dict[str, object] = dict(before or {})
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["benchmarks.card.child"])
        self._begin = time.monotonic()
        self._beside: list[Running] = []
        self._ceiling: dict[str, float] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="card-"))

    @property
    def _now(self) -> float:
        """Seconds since the start of the run."""
        return time.monotonic() - self._begin

    def run(self) -> str:
        """Every phase in its turn; gives the state of the run."""
        end = self._plan.seconds - _CLOSING
        try:
            for phase in self._plan.phases:
                reason = self._why_not(phase, end)
                if reason is not None:
                    self._record.phase(phase.name, state="skipped", reason=reason)
                    continue
                red = self._record.gates_are_red
                self._run_phase(phase, min(end, self._plan.red_seconds) if red else end)
            return self._record.state(out_of_time=self._now > end)
        finally:
            for running in self._beside:
                self._finish(running)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _why_not(self, phase: Phase, end: float) -> str | None:
        """Why a phase is not begun; None where it is."""
        red = self._record.gates_are_red
        if phase.when == GREEN and red:
            return "the gates are not green: nothing is timed"
        if phase.when == RED and not red:
            return "the gates are green: nothing to look for"
        if red and self._now > self._plan.red_seconds:
            return "the gates are not green: the rest of the minutes are kept for the fix"
        if self._now > min(phase.latest, end):
            return f"too late: {self._now:.0f} s into the run, to be begun by {min(phase.latest, end):.0f} s"
        return None

    def _run_phase(self, phase: Phase, end: float) -> None:
        if all(one.timed for one in self._plan.phases[self._plan.phases.index(phase) :]):
            # Nothing would let it go on any more, and stopped it would hold memory of the device.
            while self._beside:
                self._finish(self._beside.pop())
        elif phase.timed:
            self._hold()
        else:
            self._go_on()
        running = self._begin_phase(phase, end, attempt=0)
        if phase.beside:
            self._beside.append(running)
            return
        while True:
            try:
                self._wait(running)
            finally:
                status = self._finish(running)
            again = running.attempt + 1
            if status != BROKEN or again >= _MOST_ATTEMPTS or self._now > end:
                return
            self._record.log(f"{phase.name}: a fresh process goes on behind what is done")
            running = self._begin_phase(phase, end, attempt=again)

    def _begin_phase(self, phase: Phase, end: float, attempt: int) -> Running:
        limit = min(phase.limit, end - self._now)
        scratch = Path(tempfile.mkdtemp(prefix=f"{phase.name}-", dir=self._folder))
        order = Order(
            phase=phase.name, work=phase.work,
            arguments={**phase.arguments, **(phase.tiny if self._tiny else {})},
            device=self._device, tiny=self._tiny, fault=self._fault, seconds=limit, lines=str(scratch / "lines"),
            log=str(self._record.log_path), scratch=str(scratch), ceiling=self._ceiling,
            done=self._record.done(phase.name) if attempt else [], attempt=attempt, before=self._before,
        )  # fmt: skip
        self._record.phase(phase.name, state="running", start=round(self._now, 1), limit=round(limit, 1))
        # No daemon: those may start no processes, and compiling in parallel takes some.
        process = self._processes.Process(target=_start, args=(order.text(),))
        process.start()
        now = self._now
        return Running(phase, process, Heard(scratch / "lines"), scratch, now, now + limit, attempt)

    def _wait(self, running: Running) -> None:
        """Until a phase is over or its time is."""
        while running.process.is_alive() and self._now < running.until + _GRACE:
            self._listen()
            self._hear(running)
            time.sleep(_POLL_SECONDS)

    def _listen(self) -> None:
        """What runs beside: read it, end what is over its time, forget what is done."""
        for running in list(self._beside):
            self._hear(running)
            if not running.process.is_alive() or (self._now > running.until and not running.stopped):
                self._finish(running)
                self._beside.remove(running)

    def _hear(self, running: Running) -> None:
        for line in running.heard:
            if "facts" in line:
                self._ceiling = line["facts"].get("ceiling")
                self._record.environment(line["facts"])
            elif "cell" in line:
                self._record.cell(line["suite"], running.phase.name, line["cell"])
            elif "fail" in line:
                self._record.fail(f"{running.phase.name}: {line['fail']}")
            elif "end" in line:
                running.end = line
                self._record.rest(line["suite"], line["rest"])
                self._before |= {name: value for name, value in found_in(self._record.data).items() if value}

    def _finish(self, running: Running) -> int | None:
        """End a phase's process and all it started, and write what became of the phase; gives the exit status."""
        late = running.process.is_alive()
        _signal(running.process.pid, signal.SIGKILL)
        running.process.join(5)
        self._hear(running)
        if running.end is not None:
            state, reason = running.end["end"], running.end["reason"]
        elif late:
            state, reason = "out of time", f"ended after {self._now - running.started:.0f} s"
        else:
            state, reason = "failed", f"its process ended with status {running.process.exitcode}"
        for log in sorted(running.scratch.glob("*.log")):
            self._record.log(f"--- {running.phase.name}: {log.name}", log.read_bytes()[-_TAIL_BYTES:])
        seconds = round(self._now - running.started, 1)
        health = None if running.phase.beside else self._health()
        self._record.phase(
            running.phase.name, state=state, reason=reason, seconds=seconds, health=health, beside=running.phase.beside
        )
        return running.process.exitcode

    def _health(self) -> dict[str, object] | None:
        """The card's memory, clocks and temperature as nvidia-smi sees them; None without it."""
        if self._device != "cuda" or shutil.which("nvidia-smi") is None:
            return None
        fields = "memory.used,clocks.sm,temperature.gpu,power.draw"
        with suppress(OSError, subprocess.SubprocessError):
            command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=5)
            return dict(zip(fields.split(","), done.stdout.strip().split("\n")[0].split(", "), strict=False))
        return {"nvidia-smi": "did not answer"}

    def _hold(self) -> None:
        """Stop what runs beside: what is timed is alone."""
        for running in self._beside:
            if not running.stopped and running.process.is_alive():
                running.stopped_at = self._now
                _signal(running.process.pid, signal.SIGSTOP)

    def _go_on(self) -> None:
        for running in self._beside:
            if running.stopped_at is not None:
                # The time that it waited is not its own.
                running.until += self._now - running.stopped_at
                running.stopped_at = None
                _signal(running.process.pid, signal.SIGCONT)


def _signal(pid: int | None, number: int) -> None:
    """Signal the group that a process leads, which may outlive it; the process alone before it leads one."""
    if pid is None:
        return
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _start(text: str) -> None:
    """Do what an order says; runs in the phase's own process, which never comes back from here."""
    from benchmarks.card import child

    child.main(text)
