"""How long whole steps take: interleaved A B C A B C, one event pair or stopwatch around each."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks.health import entry_of
from benchmarks.measure import Timing, quantiles


@dataclass(frozen=True)
class StepEffort:
    """How much to measure.

    Attributes:
        seconds: for the timed steps of all providers of a cell together.
        least, most: bounds on the samples of each.
        warmups: steps before the first timed one, fewer where they would take longer than `warm_seconds`.
        warm_seconds: for the warm-ups of one provider.
    """

    seconds: float = 12.0
    least: int = 7
    most: int = 50
    warmups: int = 20
    warm_seconds: float = 1.0


# On a machine that is there for minutes.
SMALL_STEPS = StepEffort(seconds=3.0, least=7, most=50, warmups=5, warm_seconds=0.5)
QUICK_STEPS = StepEffort(seconds=0.0, least=2, most=2, warmups=1, warm_seconds=0.0)
# One core and little hurry: quantiles need samples, and neighbours on the machine come and go.
CPU_STEPS = StepEffort(seconds=120.0, least=7, most=40, warmups=2, warm_seconds=2.0)


@dataclass(frozen=True)
class Step:
    """What the clock stands around.

    Attributes:
        run: one step.
        arm: called before, outside the timing.
    """

    run: Callable[[], object]
    arm: Callable[[], None]


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Give freed memory back to the device, what a caught error still held among it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def warm_up(step: Step, device: torch.device, effort: StepEffort) -> float:
    """Run a step until it is warm; gives the milliseconds of the last one."""
    start = time.perf_counter()
    for _ in range(effort.warmups):
        begin = time.perf_counter()
        step.arm()
        step.run()
        synchronize(device)
        last = time.perf_counter() - begin
        if time.perf_counter() - start > effort.warm_seconds:
            break
    return 1e3 * last


def time_steps(
    steps: Mapping[str, Step], device: torch.device, effort: StepEffort, *, seconds_left: float
) -> tuple[dict[str, Timing], dict[str, dict[str, str]]]:
    """Warm every step up and time them in rounds.

    A step that raises is left out of the rounds that follow.

    Returns:
        the timings, and the record of a step that has none.

    Raises:
        BrokenContext: a step left the device unusable.
    """
    failed: dict[str, dict[str, str]] = {}
    estimates: dict[str, float] = {}
    for name, step in steps.items():
        try:
            estimates[name] = warm_up(step, device, effort)
        except Exception as error:
            failed[name] = entry_of(error, device)
            free_memory(device)
    ready = {name: step for name, step in steps.items() if name in estimates}
    round_seconds = max(sum(estimates.values()) / 1e3, 1e-6)
    budget = min(effort.seconds, max(0.0, seconds_left))
    rounds = max(effort.least, min(effort.most, int(budget / round_seconds)))
    samples: dict[str, list[float]] = {name: [] for name in ready}
    deadline = time.monotonic() + max(0.0, seconds_left)
    # Collections inside a step would be somebody's time, and at random.
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            if turn >= 3 and time.monotonic() > deadline:
                break
            for name in list(ready):
                try:
                    samples[name].append(_sample(ready[name], device))
                except Exception as error:
                    failed[name] = entry_of(error, device)
                    del ready[name]
    finally:
        gc.enable()
    method = "events" if device.type == "cuda" else cpu_clock()[0]
    timings = {name: Timing(*quantiles(samples[name]), samples=len(samples[name]), method=method) for name in ready}
    return timings, failed


def _sample(step: Step, device: torch.device) -> float:
    """Milliseconds of one step, from an idle device to its last result."""
    step.arm()
    if device.type != "cuda":
        _, now = cpu_clock()
        start = now()
        step.run()
        return 1e3 * (now() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step.run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def cpu_clock() -> tuple[str, Callable[[], float]]:
    """What measures a step on the CPU: its name, and seconds by it.

    With one thread the time that this process was given, which neighbours on the machine do not lengthen; with several
    the time that passed.
    """
    return ("process_time", time.process_time) if torch.get_num_threads() == 1 else ("perf_counter", time.perf_counter)
