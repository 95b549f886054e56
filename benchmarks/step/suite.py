"""The suite `steps`: whole training steps, every provider judged first and then timed against the others."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

from benchmarks.attention.precompile import warm_all
from benchmarks.context import Context
from benchmarks.health import BrokenContext, entry_of
from benchmarks.step.bench import SPARE_SECONDS, GroupBench, clean_up
from benchmarks.step.cases import Group, cpu_groups, step_groups, tiny_groups
from benchmarks.step.precompile import compile_step
from benchmarks.step.profile import SECONDS as PROFILE_SECONDS
from benchmarks.step.profile import profile_group
from benchmarks.step.providers import StepProvider, step_providers
from benchmarks.step.stream import run_streams
from benchmarks.step.verify import forms_follow_the_reference

_RED = ("wrong", "failed")
# What a group is expected to take before one has been measured.
_FIRST_GROUP = 25.0
# What is worth beginning a group for in a short run: its cells are written before anything is compiled.
_SMALL_GROUP = 8.0
_REFERENCE_ERROR = 1e-6


def run(
    context: Context, providers: list[StepProvider] | None = None, *, warm: bool = True, profiled: bool = True
) -> str:
    """Measure until the cells or the time run out; gives the state of the run.

    Nothing stops it before: what fails or is wrong is a row of the record, and the run is red if it is one of ours.
    In each group everything that is not compiled is timed first and stands in the record; then one compiled provider
    after the other is set up, timed in the same rounds as ours, and written in.

    Args:
        providers: who takes part; everyone when None.
        warm: compile our kernels in parallel first; False where somebody has.
        profiled: end with the profiler.

    Raises:
        BrokenContext: the device is unusable; what was measured is in the record.
    """
    providers = step_providers() if providers is None else providers
    providers = [p for p in providers if context.every_peer or not p.extra]
    context.result.data["calls"] = {provider.name: provider.call for provider in providers}
    red = not gate(context)
    spent: list[float] = []
    layer_seconds: list[float] = []
    groups = chosen_groups(context)
    if warm:
        warm_all(context, compile_step, [case for group in groups for case in group.cases])
    for group in groups:
        # On a card that is there for minutes the first group is tried in any case, and writes cells as it goes.
        unknown = 0.0 if context.small or context.device.type == "cpu" else _FIRST_GROUP
        expected = statistics.median(spent[-3:]) if spent else unknown
        most = _SMALL_GROUP if context.small else _FIRST_GROUP
        if context.left < min(expected, most) + SPARE_SECONDS:
            return "red" if red else "out of time"
        start = time.monotonic()
        red |= measure_group(group, context, providers, layer_seconds)
        spent.append(time.monotonic() - start)
    state = run_streams(context)
    if groups and profiled and (context.tiny or context.left > PROFILE_SECONDS):
        profile_group(groups[0], context, providers)
    return "red" if red or state == "red" else state


def profile(context: Context, providers: list[StepProvider]) -> None:
    """The profiler alone, on the first cell of each group that `--only` names."""
    for group in chosen_groups(context):
        if context.left > 0:
            profile_group(group, context, providers)


def gate(context: Context) -> bool:
    """Whether what judges follows the package's literal forms, on this device, in float64."""
    try:
        errors = forms_follow_the_reference(context.device)
        status = "passed" if all(error <= _REFERENCE_ERROR for error in errors.values()) else "wrong"
        reason = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    except Exception as error:
        status, reason = entry_of(error, context.device).values()
    context.result.put({"id": "judge-follows-reference", "status": status, "reason": reason})
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
    """Every cell of a group; gives whether one of ours was wrong or failed.

    Raises:
        BrokenContext: the device is unusable; the cells that do not stand yet are recorded as failed.
    """
    bench = None
    cells: dict[str, dict] = {}
    try:
        bench = GroupBench(group, context, providers)
        entries = bench.set_up([p for p in bench.providers if not p.compiles], layer_seconds)
        for case in group.cases:
            cells[case.id] = bench.measure(case, entries[case.id])
            context.result.put(cells[case.id])
            context.say(line_of(cells[case.id]))
        for provider in bench.providers:
            if provider.compiles:
                late = bench.set_up([provider], layer_seconds)
                for case in group.cases:
                    bench.measure_late(case, cells[case.id], provider.name, late[case.id][provider.name])
                    context.result.put(cells[case.id])
                    context.say(line_of(cells[case.id], (provider.name,)))
                if not provider.ours:
                    bench.release(provider.name)
        ours = [provider.name for provider in providers if provider.ours]
        return any(cell["peers"].get(name, {}).get("status") in _RED for name in ours for cell in cells.values())
    except BrokenContext as error:
        _fail(group, context, cells, {"status": "failed", "reason": str(error)})
        raise
    except Exception as error:
        _fail(group, context, cells, entry_of(error, context.device))
        return True
    finally:
        del bench
        clean_up(context.device)


def _fail(group: Group, context: Context, cells: dict[str, dict], entry: dict[str, str]) -> None:
    for case in group.cases:
        if case.id not in cells:
            context.result.put({"id": case.id, "case": case.as_dict(), **entry})
            context.say(f"{case.id}: {entry['status']} {entry['reason']}")


def line_of(cell: dict[str, object], names: tuple[str, ...] = ()) -> str:
    """One cell on some lines: who was fastest, and who was not timed; of `names` alone where some are given."""
    peers = {name: entry for name, entry in cell["peers"].items() if not names or name in names}
    timed = {name: entry["ms"] for name, entry in peers.items() if entry["status"] == "timed"}
    shown = [f"{name} {ms:.4g}" for name, ms in sorted(timed.items(), key=lambda pair: pair[1])]
    bad = [
        f"{name} {entry['status']}: {entry.get('reason', '')}"
        for name, entry in peers.items()
        if entry["status"] not in ("timed", "not applicable")
    ]
    return f"{cell['id']} (ms): {', '.join(shown) or 'nothing timed'}" + "".join(f"\n    {x}" for x in bad)
