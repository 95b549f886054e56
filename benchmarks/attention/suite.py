"""The suite `kernels`: every cell of the grid, every provider judged first and then timed."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from contextlib import nullcontext

from benchmarks import environment
from benchmarks.attention import cases, roofline
from benchmarks.attention.cases import Case
from benchmarks.attention.inputs import Inputs, make_inputs
from benchmarks.attention.precompile import Compilers, code_of, compile_provider
from benchmarks.attention.provider import Call, Provider, Refusal, gradients, poison
from benchmarks.attention.providers import all_providers
from benchmarks.attention.verify import Judge, make_judge
from benchmarks.context import Context
from benchmarks.health import BrokenContext, entry_of
from benchmarks.measure import QUICK, SMALL, Effort, cell_stream, peak_bytes, time_interleaved

# Seconds the first cell of each peer set may take: it compiles.
_FIRST_CELL = {"all": 30.0, "flex": 60.0}
_SPARE_SECONDS = 5.0
# Cells whose kernels are compiled in one go, before the first of them is measured.
_AHEAD = 10
# Of the time left, what compiling them may take: something has to be left to judge and time them.
_AHEAD_SHARE = 0.6
_RED = ("wrong", "failed")


def run(context: Context, providers: list[Provider] | None = None, *, gates: bool = True, warm: bool = True) -> str:
    """Measure until the cells or the time run out; gives the state of the run.

    Args:
        context: the run.
        providers: who is compared; everyone when None.
        gates: judge ours on small shapes first; False where somebody has.
        warm: compile in parallel first; False where somebody has, since that takes processes seconds to begin.

    Raises:
        BrokenContext: the device is unusable; what was measured is in the record.
    """
    providers = all_providers() if providers is None else providers
    compilers = Compilers(context.device)
    with compilers if warm else nullcontext():
        return _measure_all(context, providers, compilers, gate_cases(context) if gates else [])


def _measure_all(context: Context, providers: list[Provider], compilers: Compilers, gates: list[Case]) -> str:
    grid = context.chosen(cases.tiny_cases() if context.tiny else cases.kernel_cases())
    compiled: set[tuple] = set()
    compile_ahead(gates + grid[:_AHEAD], context, providers, compilers, compiled)
    red, spent = not run_gates(gates, context, providers), {"all": [], "flex": []}
    if red and not context.keep_going:
        return "red"
    for place, case in enumerate(grid):
        if place and place % _AHEAD == 0:
            compile_ahead(grid[place : place + _AHEAD], context, providers, compilers, compiled)
        if place + _AHEAD >= len(grid):
            # Nothing is compiled after this: the card is left to what is timed.
            compilers.close()
        recent = spent[case.peers][-3:]
        # On a card that is there for minutes the first cell is tried in any case.
        expected = statistics.median(recent) if recent else 0.0 if context.small else _FIRST_CELL[case.peers]
        if context.left < expected + _SPARE_SECONDS:
            if case.peers == "flex" and context.left > 2 * _SPARE_SECONDS:
                continue
            return "red" if red else "out of time"
        start = time.monotonic()
        cell = _measure_or_say(case, context, providers)
        spent[case.peers].append(time.monotonic() - start)
        context.result.put(cell)
        context.say(line_of(cell))
        statuses = {p.name: cell["peers"].get(p.name, {}).get("status") for p in providers}
        red |= "peers" in cell and cell.get("status") in _RED
        red |= "wrong" in statuses.values()
        if any(p.ours and statuses[p.name] in _RED for p in providers):
            red = True
            if not context.keep_going:
                return "red"
    return "red" if red else "complete"


def _measure_or_say(case: Case, context: Context, providers: list[Provider]) -> dict[str, object]:
    """A measured cell, or one that says why it could not be measured.

    Raises:
        BrokenContext: the device is unusable; the cell is recorded as failed.
    """
    failed = {"id": case.id, "case": case.as_dict(), "peers": {}}
    try:
        return measure_cell(case, context, providers)
    except BrokenContext as error:
        context.result.put({**failed, "status": "failed", "reason": str(error)})
        raise
    except Exception as error:
        return {**failed, **entry_of(error, context.device)}


def compile_ahead(some: list[Case], context: Context, providers, compilers: Compilers, compiled: set) -> None:
    """Have our kernels of some cases compiled, each code once a run."""
    tasks = {}
    for provider, case in itertools.product(providers, some):
        key = code_of(provider.name, case)
        if provider.triton and key not in compiled and provider.refuses(case, context.device) is None:
            tasks.setdefault(key, (provider.name, case))
    compiled |= set(tasks)
    # What is not compiled by then is compiled where it is launched.
    compilers.warm(compile_provider, tasks.values(), _AHEAD_SHARE * context.left)


def gate_cases(context: Context) -> list[Case]:
    """Small odd shapes in every dtype: what has to be right before anything is timed.

    Under the interpreter the cells themselves are judged: none.
    """
    if context.device.type != "cuda":
        return []
    every = [case for dtype in ("bf16", "fp16", "fp32") for case in cases.gate_cases(dtype)]
    return [case for case in every if f"gate-{case.id}" not in context.done]


def run_gates(gates: list[Case], context: Context, providers: list[Provider]) -> bool:
    """Judge ours on small shapes; gives whether all is right.

    Raises:
        BrokenContext: the device is unusable; the gate is recorded as failed.
    """
    ours = [provider for provider in providers if provider.ours]
    green = True
    for case in gates:
        gate: dict[str, object] = {"id": f"gate-{case.id}", "case": case.as_dict()}
        try:
            with cell_stream(context.device):
                peers, _ = judge_providers(case, make_inputs(case, context.device), context, ours)
            bad = {name: entry for name, entry in peers.items() if entry["status"] in _RED}
            gate |= {"status": "wrong" if bad else "passed", "peers": peers}
        except BrokenContext as error:
            context.result.put({**gate, "status": "failed", "reason": str(error)})
            raise
        except Exception as error:
            bad = entry_of(error, context.device)
            gate |= bad
        context.result.put(gate)
        context.say(f"gate {case.id}: {gate['status']} {bad or ''}")
        green &= not bad
    return green


def measure_cell(case: Case, context: Context, providers: list[Provider]) -> dict[str, object]:
    """One cell: every provider that may serve it judged, then those that are right timed."""
    device = context.device
    with cell_stream(device):
        inputs = make_inputs(case, device)
        peers, ready = judge_providers(case, inputs, context, providers)
        effort = QUICK if context.tiny else SMALL if context.small else Effort()
        timings = time_interleaved(ready, device, effort)
        clocks = environment.clocks(device)
        peaks = {name: peak_bytes(call, device) for name, call in ready.items()}
    ceiling = context.ceiling
    for name, timing in timings.items():
        prompt_only = next(p.prompt_only for p in providers if p.name == name)
        work = roofline.work(case, prompt_only=prompt_only)
        peers[name] |= {"status": "timed", **timing.as_dict(), "peak_bytes": peaks[name]}
        peers[name]["tflops"] = work.tflops(timing.ms)
        if ceiling is not None:
            peers[name]["of_roofline"] = work.speed_of_light(ceiling) / timing.ms
    work = roofline.work(case)
    return {
        "id": case.id,
        "case": case.as_dict(),
        "tokens": case.tokens,
        "flops": work.flops,
        "bytes": work.bytes,
        "speed_of_light_ms": None if ceiling is None else work.speed_of_light(ceiling),
        "clocks": clocks,
        "date": environment.now(),
        "peers": peers,
    }


def judge_providers(
    case: Case, inputs: Inputs, context: Context, providers: list[Provider]
) -> tuple[dict[str, dict[str, object]], dict[str, object]]:
    """The record of every provider of the case, and what to time of those that are right."""
    peers, ready, judges = {}, {}, {}
    for provider in providers:
        if case.peers not in provider.peers:
            continue
        reason = provider.refuses(case, context.device)
        if reason is not None:
            peers[provider.name] = {"status": "not applicable", "reason": reason}
            continue
        if context.left < _SPARE_SECONDS:
            peers[provider.name] = {"status": "out of time", "reason": "the run's minutes were over"}
            continue
        if provider.bank not in judges:
            judges[provider.bank] = make_judge(case, inputs, bank=provider.bank)
        entry, call = _judge_one(provider, case, inputs, judges[provider.bank])
        peers[provider.name] = entry
        if call is None:
            continue
        if provider.triton and context.device.type == "cpu":
            entry |= {"status": "untimed", "reason": "interpreted: its time says nothing"}
        else:
            ready[provider.name] = _within(provider, runner(call, case))
    return peers, ready


def _judge_one(provider: Provider, case: Case, inputs: Inputs, judge: Judge) -> tuple[dict, Call | None]:
    """One provider's record, and its call if the result is right."""
    try:
        with provider.around() if provider.around is not None else nullcontext():
            call = provider.build(case, inputs)
            poison(inputs)
            out = call.forward()
            grads = gradients(call, out) if case.gradients else ()
        results = {name: x.detach() for name, x in call.common(out, grads).items()}
        del out, grads
        verdict = judge.verdict(results)
    except Refusal as error:
        return {"status": "refused", "reason": str(error)}, None
    except Exception as error:
        entry = entry_of(error, inputs.q.device)
        # A peer may refuse a shape in its own words; of ours every error is a failure.
        if entry["status"] == "failed" and not provider.ours:
            entry["status"] = "refused"
        return entry, None
    entry = {
        "status": "wrong" if verdict.wrong else "passed",
        "errors": {name: x if math.isfinite(x) else None for name, x in verdict.errors.items()},
        "allowed": verdict.allowed,
    }
    if verdict.wrong:
        entry["reason"] = verdict.reason
        return entry, None
    return entry, call


def _within(provider: Provider, run):
    """A call inside the context that its provider asks for; the call itself where it asks for none."""
    if provider.around is None:
        return run

    def inside():
        with provider.around():
            return run()

    return inside


def runner(call: Call, case: Case):
    """What the clock stands around: the forward pass, the backward pass, or both."""
    if case.direction == "forward":
        return call.forward
    if case.direction == "training":
        return lambda: gradients(call, call.forward())
    out = call.forward()
    return lambda: gradients(call, out, retain=True)


def line_of(cell: dict[str, object]) -> str:
    """One cell on one line: ours, the fastest peer, and who was wrong."""
    timed = {name: entry["ms"] for name, entry in cell["peers"].items() if entry["status"] == "timed"}
    shown = [f"{name} {ms:.4g} ms" for name, ms in sorted(timed.items(), key=lambda pair: pair[1])[:4]]
    bad = [
        f"{name} {entry['status']}: {entry.get('reason', '')}"
        for name, entry in cell["peers"].items()
        if entry["status"] in ("wrong", "failed", "refused", "out of memory")
    ]
    return f"{cell['id']}: {', '.join(shown) or 'nothing timed'}" + "".join(f"\n    {x}" for x in bad)
