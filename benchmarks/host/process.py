"""Measures cells of the suite `host` in a process of its own: `python -m benchmarks.host.process [--tiny] [ids]`.

Prints one JSON object a line: a cell's id and what was found of each provider. One thread; process time; providers take
turns, and medians are compared within a cell.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.host import driver
from benchmarks.host.cases import HostCase, host_cases
from benchmarks.host.counts import operations, python_calls
from benchmarks.host.parts import parts
from benchmarks.host.providers import NEW_TOKENS, Call, calls_of
from benchmarks.measure import quantiles

_ROUNDS, _TINY_ROUNDS = 31, 3
# Calls in a sample: a launch is over too soon for the clock.
_LAUNCHES, _STEPS = 200, 2


def measure(case: HostCase, counts: Any, *, tiny: bool) -> dict[str, dict[str, object]]:
    """What each provider of a cell costs the host."""
    calls = calls_of(case)
    repeat = 1 if tiny else _LAUNCHES if case.kind == "launch" else _STEPS
    for call in calls.values():
        for _ in range(2):
            call()
    samples = _times(calls, _TINY_ROUNDS if tiny else _ROUNDS, repeat)
    peers = {name: {**_timed(times), **_counted(calls[name], counts)} for name, times in samples.items()}
    if case.kind == "token":
        peers = _of_one_token(peers, samples)
    elif case.kind != "launch":
        for name in peers:
            peers[name]["parts"] = parts(calls[name], 1 if tiny else 5)
    return peers


def _times(calls: dict[str, Call], rounds: int, repeat: int) -> dict[str, list[float]]:
    """Milliseconds of process time of each call, providers taking turns.

    A turn begins with a call that does not count, after which the processor's caches hold what the provider runs: a
    training loop takes the same step again and again.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.process_time_ns()
            for _ in range(repeat):
                call()
            samples[name].append((time.process_time_ns() - start) / 1e6 / repeat)
    return samples


def _timed(times: list[float]) -> dict[str, object]:
    ms, p20, p80 = quantiles(times)
    return {
        "status": "timed", "ms": max(ms, 1e-6), "p20": p20, "p80": p80, "samples": len(times), "method": "process_time",
    }  # fmt: skip


def _counted(call: Call, counts: Any) -> dict[str, object]:
    before = counts.launches
    made = operations(call)
    return {"operations": made, "launches": counts.launches - before, "python_calls": python_calls(call)}


def _of_one_token(peers: dict, samples: dict[str, list[float]]) -> dict[str, dict[str, object]]:
    """Of generations of two lengths, what one more token costs."""
    found = {}
    for name in dict.fromkeys(key.split("/")[0] for key in peers):
        short, long = f"{name}/1", f"{name}/{1 + NEW_TOKENS}"
        entry = _timed([(b - a) / NEW_TOKENS for a, b in zip(samples[short], samples[long], strict=False)])
        for what in ("operations", "launches", "python_calls"):
            entry[what] = (peers[long][what] - peers[short][what]) / NEW_TOKENS
        found[name] = entry
    return found


def main(words: list[str]) -> None:
    """Measure the cells whose ids are given, or all: those of a CPU before anything stands in for a device."""
    torch.set_num_threads(1)
    tiny = "--tiny" in words
    wanted = [word for word in words if not word.startswith("--")]
    cases = [case for case in host_cases(tiny) if not wanted or case.id in wanted]
    on_cpu = [case for case in cases if case.on_cpu]
    for case in on_cpu:
        _print(case, SimpleNamespace(launches=0), tiny=tiny)
    if len(on_cpu) < len(cases):
        counts = driver.install()
        for case in cases:
            if not case.on_cpu:
                _print(case, counts, tiny=tiny)


def _print(case: HostCase, counts: Any, *, tiny: bool) -> None:
    print(json.dumps({"id": case.id, "peers": measure(case, counts, tiny=tiny)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
