"""The device's own time of a step, without the host's: by the profiler, once a run and after everything else."""

from __future__ import annotations

import torch

from benchmarks import environment
from benchmarks.context import Context
from benchmarks.health import is_out_of_memory, reason_of
from benchmarks.step.bench import GroupBench, clean_up
from benchmarks.step.cases import Group
from benchmarks.step.clock import QUICK_STEPS, Step, warm_up
from benchmarks.step.optimized import make_step
from benchmarks.step.providers import StepProvider

PROFILED = ("ours", "ours_graph", "ours_graph_compiled", "peft", "floor", "floor_compiled")
# Building and judging a model again, and the profiler's own start.
SECONDS = 25.0
# How many kernels are listed, and how much of their names.
_DEAREST, _NAME = 30, 120


def profile_group(group: Group, context: Context, providers: list[StepProvider]) -> None:
    """Record the device's own milliseconds of a step of a group's first cell, in a cell beside that of its times."""
    case = group.first
    cell: dict[str, object] = {"id": f"profile-{case.id}", "kind": "profile", "case": case.as_dict(), "peers": {}}
    bench = None
    try:
        bench = GroupBench(Group((case,)), context, [p for p in providers if p.name in PROFILED])
        cell["peers"] = peers = bench.set_up(bench.providers, [])[case.id]
        for name, bound in bench.bound.items():
            if peers[name]["status"] == "passed":
                step = make_step(bound, bench.batches[case])
                warm_up(step, context.device, QUICK_STEPS)
                peers[name] |= device_time(step, context.device)
        cell |= {"status": "passed", "reason": ""}
    except Exception as error:
        # It is the last thing that a run does: what the run has found stands.
        cell |= {"status": "out of memory" if is_out_of_memory(error) else "failed", "reason": reason_of(error)}
    finally:
        del bench
        clean_up(context.device)
    context.result.put({**cell, "date": environment.now()})
    context.say(f"{cell['id']}: {cell['status']} {cell['reason']}")


def device_time(step: Step, device: torch.device) -> dict[str, object]:
    """What a step's kernels take by the profiler: `device_ms`, their sum (None where it saw none), and `kernels`, the
    dearest as [name, launches, milliseconds].

    The CPU's own operations are no kernels.
    """
    from torch.profiler import ProfilerActivity, profile

    on_cuda = device.type == "cuda"
    step.arm()
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as trace:
        step.run()
        if on_cuda:
            torch.cuda.synchronize(device)
    events = [event for event in trace.key_averages() if event.self_device_time_total]
    events.sort(key=lambda event: event.self_device_time_total, reverse=True)
    kernels = [[e.key[:_NAME], e.count, e.self_device_time_total / 1e3] for e in events[:_DEAREST]]
    total = sum(event.self_device_time_total for event in events)
    return {"device_ms": total / 1e3 if total else None, "kernels": kernels}
