"""How long calls take: interleaved, medians with p20 and p80, device time without the host's."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch

from benchmarks.health import reason_of
from ptv2_fast.step.capture import recording

# Below this a launch from Python takes about as long as the kernel.
GRAPH_BELOW_MS = 0.1
# A host that needs this share of the device's time to issue a call may be what is measured.
HOST_SHARE = 0.7
# One graph holds enough calls to hide the launch of the graph itself.
_GRAPH_MS = 0.5
_GRAPH_CALLS = 20
# Twice the level-2 cache of the largest current card.
_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
        ms, p20, p80: median and quantiles over `samples`.
        method: "events" (CUDA events, level-2 cache flushed before), "graph" (replay of a CUDA graph
            of several calls, cache warm) or "perf_counter" (CPU).
        eager_ms: median with the host's launches, where `ms` is a replay.
        host_ms: what the host needs to issue one call.
        note: why the method is not the one the cell's others have; empty otherwise.
    """

    ms: float
    p20: float
    p80: float
    samples: int
    method: str
    eager_ms: float | None = None
    host_ms: float | None = None
    note: str = ""

    def as_dict(self) -> dict[str, object]:
        """The timing as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Effort:
    """How much to measure: time for each call and bounds on its samples."""

    milliseconds: float = 40.0
    least: int = 15
    most: int = 100
    warmup: int = 3


# On a machine that is there for minutes.
SMALL = Effort(milliseconds=20.0, least=10, most=40)
QUICK = Effort(milliseconds=2.0, least=3, most=5, warmup=1)


def cell_stream(device: torch.device):
    """A context whose CUDA work is all on one side stream, so that a backward pass can be captured."""
    if device.type != "cuda":
        return nullcontext()
    stream = _side_stream(torch.cuda.current_device() if device.index is None else device.index)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    """One stream for all cells: freed memory is kept for the stream it was used on."""
    return torch.cuda.Stream(index)


def time_interleaved(
    calls: Mapping[str, Callable[[], object]], device: torch.device, effort: Effort | None = None
) -> dict[str, Timing]:
    """Time calls against each other, in rounds A B C A B C.

    On CUDA every call of the cell is timed by graph replay when the fastest takes less than
    `GRAPH_BELOW_MS`, or when the host needs `HOST_SHARE` of the device's time to issue one of them.

    Args:
        calls: name -> what to time; run inside `cell_stream` when it may be captured.
        device: where the calls run.
        effort: samples and warm-up; a full measurement when None.
    """
    effort = effort or Effort()
    if not calls:
        return {}
    if device.type != "cuda":
        return _time_on_cpu(calls, effort)
    return _time_on_cuda(calls, device, effort)


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """Median, p20 and p80."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]


def _count(estimate_ms: float, effort: Effort) -> int:
    wanted = math.ceil(effort.milliseconds / max(estimate_ms, 1e-6))
    return max(effort.least, min(effort.most, wanted))


def _rounds(calls: Mapping, counts: Mapping[str, int], sample: Callable) -> dict[str, list]:
    """Sample every call in turn until each has its count."""
    samples: dict[str, list] = {name: [] for name in calls}
    for turn in range(max(counts.values())):
        for name, call in calls.items():
            if turn < counts[name]:
                samples[name].append(sample(call))
    return samples


def _time_on_cpu(calls, effort) -> dict[str, Timing]:
    def sample(call) -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    estimates = {}
    for name, call in calls.items():
        for _ in range(effort.warmup):
            call()
        estimates[name] = sample(call)
    samples = _rounds(calls, {name: _count(ms, effort) for name, ms in estimates.items()}, sample)
    return {
        name: Timing(*quantiles(times), samples=len(times), method="perf_counter") for name, times in samples.items()
    }


def _time_on_cuda(calls, device, effort) -> dict[str, Timing]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    host, estimates = {}, {}
    for name, call in calls.items():
        for _ in range(effort.warmup):
            call()
        host[name], estimates[name] = _estimate(call)
    events = _time_by_events(calls, estimates, effort, flush)
    fastest = min(timing.ms for timing in events.values())
    host_bound = any(host[name] > HOST_SHARE * events[name].ms for name in calls)
    timings = {name: _with(timing, host_ms=host[name]) for name, timing in events.items()}
    if fastest >= GRAPH_BELOW_MS and not host_bound:
        return timings
    for name, timing in _time_by_graphs(calls, events, effort).items():
        if isinstance(timing, str):
            timings[name] = _with(timings[name], note=f"not captured: {timing}")
        else:
            timings[name] = _with(timing, host_ms=host[name], eager_ms=events[name].ms)
    return timings


def _with(timing: Timing, **changes) -> Timing:
    return Timing(**{**asdict(timing), **changes})


def _estimate(call) -> tuple[float, float]:
    """(host, device) milliseconds of one call, from a few without synchronisation."""
    repeats = 5
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    host = 1e3 * (time.perf_counter() - begin)
    torch.cuda.synchronize()
    return host / repeats, start.elapsed_time(end) / repeats


def _time_by_events(calls, estimates, effort, flush) -> dict[str, Timing]:
    def sample(call):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        return start, end

    pairs = _rounds(calls, {name: _count(ms, effort) for name, ms in estimates.items()}, sample)
    torch.cuda.synchronize()
    timings = {}
    for name, recorded in pairs.items():
        times = [start.elapsed_time(end) for start, end in recorded]
        timings[name] = Timing(*quantiles(times), samples=len(times), method="events")
    return timings


def _time_by_graphs(calls, events, effort) -> dict[str, Timing | str]:
    """Replays of one graph for each call; a string says why a call could not be captured."""
    graphs, sizes, failed = {}, {}, {}
    for name, call in calls.items():
        sizes[name] = max(1, min(_GRAPH_CALLS, math.ceil(_GRAPH_MS / events[name].ms)))
        try:
            graphs[name] = capture(call, sizes[name])
        except Exception as error:  # A peer may refuse in its own words.
            torch.cuda.synchronize()
            failed[name] = reason_of(error)
    counts = {name: _count(sizes[name] * events[name].ms, effort) for name in graphs}

    def sample(graph):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        return start, end

    for graph in graphs.values():
        graph.replay()
    pairs = _rounds(graphs, counts, sample) if graphs else {}
    torch.cuda.synchronize()
    timings: dict[str, Timing | str] = dict(failed)
    for name, recorded in pairs.items():
        times = [start.elapsed_time(end) / sizes[name] for start, end in recorded]
        timings[name] = Timing(*quantiles(times), samples=len(times), method="graph")
    return timings


def capture(call: Callable[[], object], repeats: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `repeats` calls on the current stream, which must not be the default one.

    The call must have run before, so that everything is compiled and loaded.
    """
    graph, pool, current = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
    with recording(graph, pool, current, current):
        for _ in range(repeats):
            call()
    return graph


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Device memory that a call needs beyond what is there before it; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
