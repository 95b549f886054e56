"""Batches whose rows have drawn lengths, as real data has: tokens per second over thirty different ones."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass, replace

import torch

from benchmarks import environment
from benchmarks.context import Context
from benchmarks.health import entry_of
from benchmarks.measure import Timing, quantiles
from benchmarks.step.batches import Batch, make_batch, make_prompts
from benchmarks.step.cases import StepCase
from benchmarks.step.clock import Step, cpu_clock, synchronize
from benchmarks.step.models import build_base
from benchmarks.step.optimized import make_step
from benchmarks.step.providers import Kit, StepProvider, step_providers

# Lengths of sentences and short paragraphs: a median of 55 tokens, one row in twenty beyond 200.
_MEDIAN, _SIGMA, _LONGEST, _SHORTEST = 55, 0.8, 512, 4
_NAMES = (
    "ours", "ours_graph", "ours_graph_compiled", "peft", "peft_compiled", "literal_sdpa", "joined_sdpa", "floor",
    "floor_compiled",
)  # fmt: skip
# A compiled step serves one shape: its batches are padded to the longest row of all of them.
_SECONDS = {"cuda": 60.0, "cpu": 30.0}


@dataclass(frozen=True)
class Stream:
    """The batches of one scenario.

    Attributes:
        case: model, rows and the prompt; N is the longest row.
        lengths: real tokens of every row of every batch.
        passes: timed passes over all batches.
    """

    case: StepCase
    lengths: tuple[tuple[int, ...], ...]
    passes: int = 5

    @property
    def id(self) -> str:
        """The cell's name."""
        case = self.case
        return f"{case.model}-B{case.B}-lognormal-P{case.P}-{case.dtype}-batches{len(self.lengths)}"

    @property
    def tokens(self) -> int:
        """Real tokens of one pass."""
        return sum(map(sum, self.lengths))


def make_stream(case: StepCase, batches: int, passes: int = 5, median: int = _MEDIAN) -> Stream:
    """Draw the lengths of a scenario; the same every time."""
    draw = random.Random(0)

    def length() -> int:
        return max(_SHORTEST, min(case.N, round(draw.lognormvariate(math.log(median), _SIGMA))))

    lengths = tuple(tuple(length() for _ in range(case.B)) for _ in range(batches))
    return Stream(replace(case, N=max(map(max, lengths))), lengths, passes)


def streams_of(context: Context) -> list[Stream]:
    """The scenario of a run's device: 30 batches of BERT-base, 6 of a tiny model."""
    if context.tiny:
        case = StepCase("tiny-bert", 3, 12, 4, dtype="fp32", peers="compiled")
        return [make_stream(case, 3, passes=2, median=6)]
    if context.device.type == "cpu":
        return [make_stream(StepCase("minilm", 8, 128, 20, dtype="fp32"), 30, passes=3)]
    return [make_stream(StepCase("bert-base", 32, _LONGEST, 20, peers="compiled"), 30)]


def run_streams(context: Context) -> str:
    """Measure the scenarios that there is time for; gives the state of the run.

    Raises:
        BrokenContext: the device is unusable.
    """
    for stream in context.chosen(streams_of(context)):
        if context.left < 10.0 and not context.tiny:
            return "out of time"
        try:
            _measure_stream(stream, context)
        except Exception as error:
            entry = entry_of(error, context.device)
            context.result.put({"id": stream.id, **entry})
            context.say(f"{stream.id}: {entry['status']} {entry['reason']}")
            return "red"
        torch._dynamo.reset()
    return "complete"


def _measure_stream(stream: Stream, context: Context) -> None:
    """Write a scenario's cell: what is not compiled first, then one compiled provider after the other beside ours."""
    case, device = stream.case, context.device
    base = build_base(case.model, device, case.torch_dtype)
    kit = Kit(base, make_prompts(base, case.P), case, tiny=context.tiny)
    everyone = [p for p in step_providers() if p.name in _NAMES and case.peers in p.peers]
    padded = sum(max(lengths) * len(lengths) for lengths in stream.lengths)
    cell: dict[str, object] = {
        "id": stream.id,
        "kind": "stream",
        "case": {**case.as_dict(), "padding": 1 - stream.tokens / padded},
        "tokens": stream.tokens,
        "lengths": [list(lengths) for lengths in stream.lengths],
        "date": environment.now(),
    }
    peers: dict[str, dict] = {}
    ready = {p.name: steps for p in everyone if not p.compiles and (steps := _set_up(p, kit, stream, context, peers))}
    _write_timings(stream, _time(ready, stream, context), peers, device)
    context.result.put({**cell, "peers": peers})
    context.say(_line_of({**cell, "peers": peers}))
    for provider in everyone:
        steps = _set_up(provider, kit, stream, context, peers) if provider.compiles else None
        if steps is None:
            continue
        own = {name: ready[name] for name in ("ours_graph", "ours") if name in ready}
        times = _time({**own, provider.name: steps}, stream, context)
        _write_timings(stream, {provider.name: times.pop(provider.name)}, peers, device)
        peers[provider.name]["beside"] = {name: quantiles(samples)[0] for name, samples in times.items()}
        context.result.put({**cell, "peers": peers})
        context.say(_line_of({**cell, "peers": peers}))


def _set_up(provider: StepProvider, kit: Kit, stream: Stream, context: Context, peers: dict) -> list[Step] | None:
    """A provider's step on every batch, warm; None, and why in its record, where it has none."""
    case, device = stream.case, context.device
    reason = provider.refuses(case, device)
    if reason is not None:
        peers[provider.name] = {"status": "not applicable", "reason": reason}
        return None
    if context.left < (60.0 if provider.compiles and not context.tiny else 5.0):
        peers[provider.name] = {"status": "out of time", "reason": "the run's minutes were over"}
        return None
    try:
        bound = provider.build(kit)
        # A compiled whole step serves one shape; ours packs, whatever the shape.
        batches = _batches(stream, kit.base, fixed=provider.compiles and not provider.ours)
        steps = [make_step(bound, batch) for batch in batches]
        # Warm up: graphs are recorded.
        for _ in range(bound.settle):
            _pass(steps, device)
    except Exception as error:
        peers[provider.name] = entry_of(error, device)
        return None
    padded = sum(batch.input_ids.numel() for batch in batches)
    peers[provider.name] = {"status": "passed", "padded_tokens": padded, **bound.facts()}
    return steps


def _time(passes: dict[str, list[Step]], stream: Stream, context: Context) -> dict[str, list[float]]:
    """Milliseconds of passes over all batches, providers taking turns."""
    samples: dict[str, list[float]] = {name: [] for name in passes}
    deadline = time.monotonic() + min(_SECONDS[context.device.type], max(0.0, context.left - 5.0))
    for turn in range(stream.passes):
        if turn and time.monotonic() > deadline:
            break
        for name, steps in passes.items():
            samples[name].append(_pass(steps, context.device))
    return samples


def _write_timings(
    stream: Stream, samples: dict[str, list[float]], peers: dict[str, dict], device: torch.device
) -> None:
    for name, times in samples.items():
        timing = Timing(*quantiles(times), samples=len(times), method=_clock(device)[0])
        peers[name] |= {"status": "timed", **timing.as_dict(), "tokens_per_second": 1e3 * stream.tokens / timing.ms}


def _batches(stream: Stream, base, *, fixed: bool) -> list[Batch]:
    """Each batch as wide as its own longest row, or all as wide as the longest of all."""
    width = stream.case.N if fixed else None
    return [make_batch(base, lengths, causal=stream.case.causal, width=width) for lengths in stream.lengths]


def _pass(steps: list[Step], device: torch.device) -> float:
    """Milliseconds of one step on every batch."""
    now = _clock(device)[1]
    synchronize(device)
    start = now()
    for step in steps:
        step.arm()
        step.run()
    synchronize(device)
    return 1e3 * (now() - start)


def _clock(device: torch.device):
    return ("perf_counter", time.perf_counter) if device.type == "cuda" else cpu_clock()


def _line_of(cell: dict) -> str:
    rates = {n: e["tokens_per_second"] for n, e in cell["peers"].items() if e["status"] == "timed"}
    shown = ", ".join(f"{name} {rate:,.0f}" for name, rate in sorted(rates.items(), key=lambda pair: -pair[1]))
    return f"{cell['id']} (real tokens/s): {shown}"
