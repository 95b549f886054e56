"""The suite `steps`: whole training steps, every provider judged first and then timed against the others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from benchmarks import environment, roofline
from benchmarks.context import Context
from benchmarks.measure import peak_bytes
from benchmarks.step_batches import Batch, make_batch, make_prompts
from benchmarks.step_cases import Group, StepCase, cpu_groups, step_groups, tiny_groups
from benchmarks.step_clock import (
    CPU_STEPS,
    QUICK_STEPS,
    StepEffort,
    device_milliseconds,
    free_memory,
    is_out_of_memory,
    reason_of,
    time_steps,
)
from benchmarks.step_forms import Bound
from benchmarks.step_models import build_base, sizes_of
from benchmarks.step_optimized import make_step
from benchmarks.step_providers import Kit, StepProvider, step_providers
from benchmarks.step_roofline import step_work
from benchmarks.step_stream import run_streams
from benchmarks.step_verify import Expected, StepJudge, forms_follow_the_reference, run_once

_RED = ("wrong", "failed")
_SPARE_SECONDS = 5.0
# What a group is expected to take before one has been measured, and the compilation of one layer likewise.
_FIRST_GROUP, _FIRST_LAYER = 25.0, 3.0
# Beside its timed steps a cell warms up, is profiled and measured for memory.
_BESIDE = 10.0
_REFERENCE_ERROR = 1e-6


def run(context: Context, providers: list[StepProvider] | None = None) -> str:
    """Measure until the cells or the time run out; gives the state of the run.

    Nothing stops it before: what fails or is wrong is a row of the record, and the run is red if it is one of ours.
    """
    providers = step_providers() if providers is None else providers
    context.result.data["calls"] = {provider.name: provider.call for provider in providers}
    red = not gate(context)
    spent: list[float] = []
    layer_seconds: list[float] = []
    for group in chosen_groups(context):
        expected = statistics.median(spent[-3:]) if spent else 0.0 if context.device.type == "cpu" else _FIRST_GROUP
        if context.left < min(expected, _FIRST_GROUP) + _SPARE_SECONDS:
            return "red" if red else "out of time"
        start = time.monotonic()
        red |= measure_group(group, context, providers, layer_seconds)
        spent.append(time.monotonic() - start)
    return _stream(context, red)


def _stream(context: Context, red: bool) -> str:
    state = run_streams(context)
    return "red" if red or state == "red" else state


def gate(context: Context) -> bool:
    """Whether what judges follows the package's literal forms, on this device, in float64."""
    try:
        errors = forms_follow_the_reference(context.device)
        status = "passed" if all(error <= _REFERENCE_ERROR for error in errors.values()) else "wrong"
        reason = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    except Exception as error:
        status, reason = "failed", reason_of(error)
    context.result.add({"id": "judge-follows-reference", "status": status, "reason": reason})
    context.say(f"judge against the literal forms in float64: {status}, {reason}")
    return status == "passed"


def groups_of(context: Context) -> list[Group]:
    """The grid of this run's device."""
    if context.tiny:
        return tiny_groups()
    return cpu_groups() if context.device.type == "cpu" else step_groups()


def chosen_groups(context: Context) -> list[Group]:
    """The groups with a cell that `--only` names, reduced to those cells."""
    groups = ((group, context.chosen(group.cases)) for group in groups_of(context))
    return [replace(group, cases=tuple(cases)) for group, cases in groups if cases]


def measure_group(group: Group, context: Context, providers: list[StepProvider], layer_seconds: list[float]) -> bool:
    """Every cell of a group; gives whether one of ours was wrong or failed."""
    bench = None
    try:
        bench = GroupBench(group, context, providers)
        entries = bench.set_up(layer_seconds)
        red = False
        for case in group.cases:
            cell = bench.measure(case, entries)
            context.result.add(cell)
            context.say(line_of(cell))
            red |= any(p.ours and cell["peers"].get(p.name, {}).get("status") in _RED for p in providers)
        return red
    except Exception as error:
        for case in group.cases:
            status = "out of memory" if is_out_of_memory(error) else "failed"
            context.result.add({"id": case.id, "case": case.as_dict(), "status": status, "reason": reason_of(error)})
            context.say(f"{case.id}: {status} {reason_of(error)}")
        return True
    finally:
        del bench
        clean_up(context.device)


class GroupBench:
    """One group's model, batches and providers.

    Args:
        group: the cells; one model and one set of providers serve them all.
    """

    def __init__(self, group: Group, context: Context, providers: list[StepProvider]):
        case = group.first
        self.context, self.group = context, group
        self.base = build_base(case.model, context.device, case.torch_dtype, dropout=case.dropout)
        self.prompts = make_prompts(self.base, case.P)
        self.kit = Kit(self.base, self.prompts, case, tiny=context.tiny)
        self.judge = StepJudge(self.base, self.prompts)
        self.batches = {c: make_batch(self.base, c.lengths, causal=c.causal, width=c.N) for c in group.cases}
        self.providers = [p for p in providers if case.peers in p.peers]
        self.bound: dict[str, Bound] = {}

    def set_up(self, layer_seconds: list[float]) -> dict[str, dict[str, dict]]:
        """Build every provider and judge it on every batch; gives case id -> provider -> record.

        Args:
            layer_seconds: what compilations of this run took for each layer; this group's are appended.
        """
        entries: dict[str, dict[str, dict]] = {case.id: {} for case in self.group.cases}
        expected = self._expected()
        for provider in self.providers:
            records = self._set_up_one(provider, expected, layer_seconds)
            for case in self.group.cases:
                entries[case.id][provider.name] = records[case]
        return entries

    def _expected(self) -> dict[tuple[str, StepCase], Expected]:
        """What each form must give; the judge's copy of the model is gone before anything else is built."""
        forms = {provider.form for provider in self.providers}
        with no_dropout(self.base):
            found = {
                (form, case): self.judge.expected(form, batch)
                for form in sorted(forms)
                for case, batch in self.batches.items()
            }
        self.judge.close()
        free_memory(self.context.device)
        return found

    def _set_up_one(self, provider: StepProvider, expected, layer_seconds: list[float]) -> dict[StepCase, dict]:
        reason = provider.refuses(self.group.first, self.context.device)
        if reason is not None:
            return {case: {"status": "not applicable", "reason": reason} for case in self.batches}
        if self.context.left < self._seconds_needed(provider, layer_seconds) + _SPARE_SECONDS:
            return {case: {"status": "out of time", "reason": "the run's minutes were over"} for case in self.batches}
        start = time.monotonic()
        records = {}
        try:
            if provider.compiles:
                torch._dynamo.utils.counters.clear()
            bound = provider.build(self.kit)
            for case, batch in self.batches.items():
                records[case] = self._judge(bound, batch, expected[provider.form, case])
            self.bound[provider.name] = bound
        except Exception as error:
            status = "out of memory" if is_out_of_memory(error) else "failed"
            for case in self.batches:
                records.setdefault(case, {"status": status, "reason": reason_of(error)})
            free_memory(self.context.device)
        seconds = time.monotonic() - start
        facts = {"setup_seconds": round(seconds, 1)}
        if provider.compiles:
            layer_seconds.append(seconds / sizes_of(self.base).num_layers)
            facts["compiled"] = whole_graph(len(self.batches))
        return {case: {**record, **facts} for case, record in records.items()}

    def _seconds_needed(self, provider: StepProvider, layer_seconds: list[float]) -> float:
        """What setting a provider up may take, and the cells after it: a compilation is no use untimed."""
        if not provider.compiles or self.context.tiny:
            return 0.0
        layer = max(layer_seconds[-4:], default=_FIRST_LAYER)
        timing = len(self.batches) * (effort_of(self.context).seconds + _BESIDE)
        return layer * sizes_of(self.base).num_layers + timing

    def _judge(self, bound: Bound, batch: Batch, expected: Expected) -> dict:
        arguments = bound.prepare(batch)
        with no_dropout(bound.model):
            for _ in range(bound.settle):
                loss, gradient = run_once(bound, arguments)
        return expected.entry(loss, gradient)

    def measure(self, case: StepCase, entries: dict[str, dict[str, dict]]) -> dict[str, object]:
        """Time every provider that is right on a cell, and complete its record."""
        context, device = self.context, self.context.device
        peers = entries[case.id]
        steps = {
            name: make_step(self.bound[name], self.batches[case])
            for name, entry in peers.items()
            if entry["status"] == "passed" and name in self.bound
        }
        effort = effort_of(context)
        timings, failed = time_steps(steps, device, effort, seconds_left=context.left - _SPARE_SECONDS)
        for name, reason in failed.items():
            status = "out of memory" if "out of memory" in reason.lower() else "failed"
            peers[name] |= {"status": status, "reason": reason}
        clocks = environment.clocks(device)
        work, plain = step_work(case, self.base), step_work(case, self.base, prompt=False)
        ceiling = roofline.ceiling_of(torch.cuda.get_device_name(device) if device.type == "cuda" else None)
        tokens = sum(case.lengths)
        forms = {provider.name: provider.form for provider in self.providers}
        for name, timing in timings.items():
            useful = plain if forms[name] == "plain" else work
            peers[name] |= {"status": "timed", **timing.as_dict(), "tokens_per_second": 1e3 * tokens / timing.ms}
            peers[name] |= {"tflops": useful.tflops(timing.ms), "device_ms": device_milliseconds(steps[name], device)}
            steps[name].arm()
            peers[name]["peak_bytes"] = peak_bytes(steps[name].run, device)
            if ceiling is not None:
                peers[name]["of_roofline"] = useful.speed_of_light(ceiling) / timing.ms
        return {
            "id": case.id,
            "case": case.as_dict(),
            "tokens": tokens,
            "flops": work.flops,
            "bytes": work.bytes,
            "speed_of_light_ms": None if ceiling is None else work.speed_of_light(ceiling),
            "clocks": clocks,
            "date": environment.now(),
            "peers": peers,
        }


def effort_of(context: Context) -> StepEffort:
    """How much this run measures of a cell."""
    if context.tiny:
        return QUICK_STEPS
    return CPU_STEPS if context.device.type == "cpu" else StepEffort()


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
    """Forget a group's models and everything that was compiled for them."""
    torch._dynamo.reset()
    free_memory(device)


def line_of(cell: dict[str, object]) -> str:
    """One cell on some lines: who was fastest, and who was not timed."""
    timed = {name: entry["ms"] for name, entry in cell["peers"].items() if entry["status"] == "timed"}
    shown = [f"{name} {ms:.4g}" for name, ms in sorted(timed.items(), key=lambda pair: pair[1])]
    bad = [
        f"{name} {entry['status']}: {entry.get('reason', '')}"
        for name, entry in cell["peers"].items()
        if entry["status"] not in ("timed", "not applicable")
    ]
    return f"{cell['id']} (ms): {', '.join(shown) or 'nothing timed'}" + "".join(f"\n    {x}" for x in bad)
