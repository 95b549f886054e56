"""One group of cells on one model: its providers built, judged on every batch, and timed against each other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from benchmarks import environment
from benchmarks.context import Context
from benchmarks.goals import best_of_ours
from benchmarks.health import answers, entry_of
from benchmarks.measure import Timing, peak_bytes
from benchmarks.step.batches import Batch, make_batch, make_prompts
from benchmarks.step.cases import Group, StepCase
from benchmarks.step.clock import CPU_STEPS, QUICK_STEPS, SMALL_STEPS, Step, StepEffort, free_memory, time_steps
from benchmarks.step.forms import Bound
from benchmarks.step.models import build_base, sizes_of
from benchmarks.step.optimized import make_step
from benchmarks.step.providers import Kit, StepProvider
from benchmarks.step.roofline import step_work
from benchmarks.step.verify import Expected, StepJudge, run_once

SPARE_SECONDS = 5.0
# What compiling one layer is expected to take before one has been measured; a short run has compiled ahead.
_FIRST_LAYER, _SMALL_FIRST_LAYER = 3.0, 0.5
# Beside its timed steps a cell warms up and is measured for memory.
_BESIDE = 5.0

Entries = dict[str, dict[str, object]]


class GroupBench:
    """One group's model, batches and providers.

    Args:
        group: the cells; one model and one set of providers serve them all.
    """

    def __init__(self, group: Group, context: Context, providers: Sequence[StepProvider]):
        case = group.first
        self.context, self.group = context, group
        self.base = build_base(case.model, context.device, case.torch_dtype, dropout=case.dropout)
        self.prompts = make_prompts(self.base, case.P)
        self.kit = Kit(self.base, self.prompts, case, tiny=context.tiny)
        self.judge = StepJudge(self.base, self.prompts)
        self.batches = {c: make_batch(self.base, c.lengths, causal=c.causal, width=c.N) for c in group.cases}
        self.providers = [p for p in providers if case.peers in p.peers]
        self.bound: dict[str, Bound] = {}
        self._expected: dict[tuple[str, StepCase], Expected] = {}
        self._steps: dict[tuple[str, StepCase], Step] = {}

    def set_up(self, providers: Sequence[StepProvider], layer_seconds: list[float]) -> dict[str, Entries]:
        """Build providers and judge them on every batch; gives case id -> provider -> record.

        Args:
            layer_seconds: what compilations of this run took for each layer; this group's are appended.

        Raises:
            BrokenContext: one of them left the device unusable.
        """
        entries: dict[str, Entries] = {case.id: {} for case in self.group.cases}
        self._expect()
        for provider in providers:
            records = self._set_up_one(provider, layer_seconds)
            for case in self.group.cases:
                entries[case.id][provider.name] = records[case]
        return entries

    def _expect(self) -> None:
        """Find what each form must give, once; the judge's copy of the model is gone before anything is built."""
        if self._expected:
            return
        wanted = [
            (form, case) for form in sorted({provider.form for provider in self.providers}) for case in self.batches
        ]  # fmt: skip
        with no_dropout(self.base):
            for form, case in wanted:
                self.judge.exactly(form, self.batches[case])
            # A whole batch in the model's own dtype does not fit beside a large model's copy in float32.
            self.judge.close()
            free_memory(self.context.device)
            self._expected = {(form, case): self.judge.expected(form, self.batches[case]) for form, case in wanted}
        self.judge.close()
        free_memory(self.context.device)

    def _set_up_one(self, provider: StepProvider, layer_seconds: list[float]) -> dict[StepCase, dict]:
        reason = provider.refuses(self.group.first, self.context.device)
        if reason is not None:
            return {case: {"status": "not applicable", "reason": reason} for case in self.batches}
        if self.context.left < self._seconds_needed(provider, layer_seconds) + SPARE_SECONDS:
            return {case: {"status": "out of time", "reason": "the run's minutes were over"} for case in self.batches}
        start = time.monotonic()
        records: dict[StepCase, dict] = {}
        try:
            if provider.compiles:
                torch._dynamo.utils.counters.clear()
            bound = provider.build(self.kit)
            # Ours share one model: a compiled one is judged when the others have been timed.
            self.kit.restart()
            for case, batch in self.batches.items():
                records[case] = self._judge(bound, batch, self._expected[provider.form, case])
            if self.group.first.dropout:
                bound.forget()
                self._settle(bound)
            self.bound[provider.name] = bound
        except Exception as error:
            failed = entry_of(error, self.context.device)
            for case in self.batches:
                records.setdefault(case, dict(failed))
            free_memory(self.context.device)
        seconds = time.monotonic() - start
        facts: dict[str, object] = {"setup_seconds": round(seconds, 1)}
        if provider.compiles:
            layer_seconds.append(seconds / sizes_of(self.base).num_layers)
            facts["compiled"] = whole_graph(len(self.batches))
        return {case: {**record, **facts} for case, record in records.items()}

    def _seconds_needed(self, provider: StepProvider, layer_seconds: list[float]) -> float:
        """What setting a provider up may take, and the cells after it: a compilation is no use untimed."""
        if not provider.compiles or self.context.tiny:
            return 0.0
        layer = max(layer_seconds[-4:], default=_SMALL_FIRST_LAYER if self.context.small else _FIRST_LAYER)
        timing = len(self.batches) * (effort_of(self.context).seconds + _BESIDE)
        return layer * sizes_of(self.base).num_layers + timing

    def _settle(self, bound: Bound) -> None:
        """Record anew what was forgotten, before the clock is there."""
        for batch in self.batches.values():
            arguments = bound.prepare(batch)
            for _ in range(bound.settle):
                run_once(bound, arguments)

    def _judge(self, bound: Bound, batch: Batch, expected: Expected) -> dict:
        arguments = bound.prepare(batch)
        with no_dropout(bound.model):
            for _ in range(bound.settle):
                loss, gradient = run_once(bound, arguments)
        return expected.entry(loss, gradient)

    def measure(self, case: StepCase, entries: Entries) -> dict[str, object]:
        """Time every provider that is right on a cell; gives the cell.

        Raises:
            BrokenContext: a step left the device unusable.
        """
        ready = [name for name, entry in entries.items() if entry["status"] == "passed" and name in self.bound]
        for name, timing in self._time(case, ready, entries).items():
            entries[name] |= {"status": "timed", **self._facts(case, name, timing)}
        work, ceiling = step_work(case, self.base), self.context.ceiling
        return {
            "id": case.id,
            "case": case.as_dict(),
            "tokens": sum(case.lengths),
            "flops": work.flops,
            "bytes": work.bytes,
            "speed_of_light_ms": None if ceiling is None else work.speed_of_light(ceiling),
            "clocks": environment.clocks(self.context.device),
            "date": environment.now(),
            "peers": entries,
        }

    def measure_late(self, case: StepCase, cell: dict, name: str, entry: dict[str, object]) -> None:
        """Time one more provider on a cell that stands already, in the same rounds as ours, and write it in.

        What ours took in those rounds stands in its record as `beside`: ratios are taken within rounds.
        """
        peers = cell["peers"]
        peers[name] = entry
        if entry["status"] != "passed" or name not in self.bound:
            return
        beside = dict.fromkeys(own for own in (best_of_ours(cell), "ours") if own in self.bound and own != name)
        timings = self._time(case, [*beside, name], peers)
        timing = timings.pop(name, None)
        if timing is not None:
            entry |= {"status": "timed", **self._facts(case, name, timing)}
            entry["beside"] = {own: other.ms for own, other in timings.items()}

    def _time(self, case: StepCase, names: Sequence[str], entries: Entries) -> dict[str, Timing]:
        """Timings of providers that take turns; why one has none is written into its record."""
        steps = {name: self._step(case, name) for name in names}
        effort, left = effort_of(self.context), self.context.left - SPARE_SECONDS
        timings, failed = time_steps(steps, self.context.device, effort, seconds_left=left)
        for name, record in failed.items():
            entries[name] |= record
        return timings

    def _step(self, case: StepCase, name: str) -> Step:
        """A provider's whole step on a cell's batch; one object, whose optimizer has its state once it is warm."""
        key = (name, case)
        if key not in self._steps:
            self._steps[key] = make_step(self.bound[name], self.batches[case])
        return self._steps[key]

    def release(self, name: str) -> None:
        """Forget a provider: what it compiled and recorded holds memory that others need."""
        self.bound.pop(name, None)
        self._steps = {key: step for key, step in self._steps.items() if key[0] != name}
        free_memory(self.context.device)

    def _facts(self, case: StepCase, name: str, timing: Timing) -> dict[str, object]:
        """What a timing means: tokens, useful work, memory."""
        device, ceiling = self.context.device, self.context.ceiling
        form = next(provider.form for provider in self.providers if provider.name == name)
        work = step_work(case, self.base, prompt=form != "plain")
        step = self._step(case, name)
        step.arm()
        facts: dict[str, object] = {
            **timing.as_dict(),
            "tokens_per_second": 1e3 * sum(case.lengths) / timing.ms,
            "tflops": work.tflops(timing.ms),
            "peak_bytes": peak_bytes(step.run, device),
            **self.bound[name].facts(),
        }
        if ceiling is not None:
            facts["of_roofline"] = work.speed_of_light(ceiling) / timing.ms
        if facts.get("captured") == 0 and device.type == "cuda":
            self.context.result.fail(f"{case.id}: {name} ran eagerly, nothing was captured; the log says why")
        return facts


def effort_of(context: Context) -> StepEffort:
    """How much this run measures of a cell."""
    if context.tiny:
        return QUICK_STEPS
    if context.device.type == "cpu":
        return CPU_STEPS
    return SMALL_STEPS if context.small else StepEffort()


@contextmanager
def no_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Within this context a model, and every twin made of it, drops nothing: random masks cannot be compared."""
    before = [(module, module.p) for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    for module, _ in before:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in before:
            module.p = p


def whole_graph(batches: int) -> dict[str, object]:
    """What Dynamo counted since its counters were cleared: whether each batch's step is one graph without a break."""
    counters = torch._dynamo.utils.counters
    breaks = sum(counters["graph_break"].values())
    graphs = counters["stats"].get("unique_graphs", 0)
    skips = counters["inductor"].get("cudagraph_skips", 0)
    whole = breaks == 0 and 0 < graphs <= batches and skips == 0
    return {"graph_breaks": breaks, "unique_graphs": graphs, "cudagraph_skips": skips, "whole": whole}


def clean_up(device: torch.device) -> None:
    """Forget a group's models and everything that was compiled for them; nothing where the device does not answer."""
    if not answers(device):
        # What destroys a graph or an event raises there, in the place of the error that broke it.
        return
    torch._dynamo.reset()
    free_memory(device)
