"""The suite `memory`: what a training step holds, against the literal form, PEFT and the model without prompts."""

from __future__ import annotations

import os

import torch

from benchmarks import environment
from benchmarks.attention.precompile import warm_all
from benchmarks.context import Context
from benchmarks.health import entry_of
from benchmarks.step.audit import JoinedShapes, forbidden_among, inside_attention
from benchmarks.step.batches import make_batch, make_prompts
from benchmarks.step.bench import GroupBench, clean_up
from benchmarks.step.cases import MEMORY_CELLS, Group, StepCase, audited_case, cpu_groups, memory_groups, tiny_groups
from benchmarks.step.clock import free_memory, synchronize
from benchmarks.step.forms import Bound
from benchmarks.step.live_bytes import measure_memory
from benchmarks.step.models import build_base
from benchmarks.step.optimized import LEARNING_RATE
from benchmarks.step.precompile import compile_step
from benchmarks.step.providers import Kit, StepProvider, step_providers
from benchmarks.step.verify import clear_gradients

_RED = ("wrong", "failed")
_SPARE_SECONDS = 5.0
_AUDITED = ("ours", "ours_1_unpad", "literal_sdpa")


def run(
    context: Context, providers: list[StepProvider] | None = None, *, warm: bool = True, operations: bool = True
) -> str:
    """Audit, then measure until the cells or the time run out; gives the state of the run.

    Args:
        providers: who takes part; everyone when None.
        warm: compile our kernels in parallel first; False where somebody has.
        operations: look at every operation on the CPU besides what the device's allocator gives out.
    """
    providers = step_providers() if providers is None else providers
    # A captured step holds its memory for good: there is nothing to see while it runs.
    providers = [p for p in providers if not p.compiles and p.name != "ours_graph"]
    context.result.data["calls"] = {provider.name: provider.call for provider in providers}
    groups = memory_cells(context)
    if warm:
        warm_all(context, compile_step, [case for group in groups for case in group.cases])
    red = not audit(context, providers, operations=operations)
    for group in groups:
        if context.left < _SPARE_SECONDS:
            return "red" if red else "out of time"
        red |= _measure_group(group, context, providers)
    return "red" if red else "complete"


def memory_cells(context: Context) -> list[Group]:
    """The groups of this run's device with a cell that `--only` names, reduced to those cells."""
    if context.tiny:
        groups = tiny_groups()[1:2]
    else:
        groups = cpu_groups() if context.device.type == "cpu" else memory_groups(MEMORY_CELLS)
    chosen = ((group, context.chosen(group.cases)) for group in groups)
    return [Group(tuple(cases)) for group, cases in chosen if cases]


def _measure_group(group: Group, context: Context, providers: list[StepProvider]) -> bool:
    """Every cell of a group; gives whether one of ours was wrong or failed."""
    bench, red = None, False
    try:
        bench = GroupBench(group, context, providers)
        entries = bench.set_up(bench.providers, [])
        for case in group.cases:
            cell = _measure(bench, case, entries[case.id])
            context.result.put(cell)
            context.say(_line_of(cell))
            red |= any(p.ours and cell["peers"].get(p.name, {}).get("status") in _RED for p in bench.providers)
    except Exception as error:
        red = True
        entry = entry_of(error, context.device)
        for case in group.cases:
            context.result.put({"id": case.id, "case": case.as_dict(), **entry})
            context.say(f"{case.id}: {entry['status']} {entry['reason']}")
    finally:
        del bench
        clean_up(context.device)
    return red


def _measure(bench: GroupBench, case: StepCase, peers: dict[str, dict]) -> dict[str, object]:
    device = bench.context.device
    for name, entry in peers.items():
        if entry["status"] != "passed" or name not in bench.bound:
            continue
        free_memory(device)
        try:
            entry |= memory_of(bench.bound[name], bench.batches[case], device)
        except Exception as error:
            entry |= entry_of(error, device)
    return {
        "id": case.id,
        "case": case.as_dict(),
        "tokens": sum(case.lengths),
        "date": environment.now(),
        "peers": peers,
    }


def memory_of(bound: Bound, batch, device: torch.device) -> dict[str, int]:
    """Kept and peak bytes of a step, after steps that made the optimizer's state and filled every cache."""
    arguments = bound.prepare(batch)
    optimizer = torch.optim.AdamW(bound.trained, lr=LEARNING_RATE) if bound.trained else None

    def forward():
        return bound.forward(*arguments)

    def rest(loss) -> None:
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        clear_gradients(bound, arguments)

    for _ in range(2):
        bound.arm()
        rest(forward())
    synchronize(device)
    bound.arm()
    return measure_memory(forward, rest, device)


def audit(context: Context, providers: list[StepProvider], *, operations: bool = True) -> bool:
    """Both audits over whole steps; the literal form has to trip each of them. Gives whether ours pass."""
    green = True
    checks = [("audit-operations", _audit_operations), ("audit-allocator", _audit_allocator)]
    for name, check in checks[0 if operations else 1 :]:
        try:
            status, reason = check(context, providers)
        except Exception as error:
            status, reason = entry_of(error, context.device).values()
        context.result.put({"id": name, "status": status, "reason": reason, "date": environment.now()})
        context.say(f"{name}: {status} {reason}")
        green &= status not in _RED
    clean_up(context.device)
    return green


def _audited(context: Context, device: torch.device, providers: list[StepProvider], backend: str):
    """A case, its base, its batch, and the providers that are looked at bound to it."""
    case = audited_case(device)
    base = build_base(case.model, device, case.torch_dtype)
    kit = Kit(base, make_prompts(base, case.P), case, tiny=context.tiny, backend=backend)
    batch = make_batch(base, case.lengths, causal=case.causal, width=case.N)
    return case, base, batch, {p.name: p.build(kit) for p in providers if p.name in _AUDITED}


def _run(bound: Bound, batch) -> None:
    bound.arm()
    arguments = bound.prepare(batch)
    bound.forward(*arguments).backward()
    clear_gradients(bound, arguments)


def _audit_operations(context: Context, providers: list[StepProvider]) -> tuple[str, str]:
    """Every operation's outputs on the CPU; through our kernels where Triton's interpreter is on."""
    if context.device.type == "cuda":
        return "not applicable", "looks at operations on the CPU: a card's minutes are for what only it can show"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    cpu = torch.device("cpu")
    case, base, batch, bound = _audited(context, cpu, providers, "triton" if interpreted else "torch")
    # Keys and values are joined inside our torch backend; our kernels join nothing.
    allowed = (lambda shape: False) if interpreted else inside_attention(case, base)
    hits = {}
    for name, one in bound.items():
        shapes = JoinedShapes(case, allowed)
        with shapes:
            _run(one, batch)
        hits[name] = shapes.hits
    way = "our kernels, interpreted" if interpreted else "our torch backend, joins inside attention allowed"
    return _verdict(hits, way)


def _audit_allocator(context: Context, providers: list[StepProvider]) -> tuple[str, str]:
    if context.device.type != "cuda":
        return "not applicable", "traces the CUDA allocator"
    case, base, batch, bound = _audited(context, context.device, providers, "auto")
    hits = {}
    for name, one in bound.items():
        for _ in range(2):
            _run(one, batch)
        found, blocks = forbidden_among(case, base, lambda one=one: _run(one, batch))
        if not blocks:
            return "failed", f"the trace of {name} is empty: nothing was looked at"
        hits[name] = found
    return _verdict(hits, f"{case.id}")


def _verdict(hits: dict[str, list], way: str) -> tuple[str, str]:
    literal = hits.pop("literal_sdpa")
    if not literal:
        return "failed", "the literal form shows no joined tensor: this audit sees nothing"
    bad = {name: found[:5] for name, found in hits.items() if found}
    if bad:
        return "wrong", f"{way}: {bad}"
    return "passed", f"{way}: none in {', '.join(hits)}; {len(literal)} in the literal form"


def _line_of(cell: dict) -> str:
    shown = [
        f"{name} {entry['peak_bytes'] / 2**20:.4g} ({entry['kept_bytes'] / 2**20:.4g})"
        for name, entry in cell["peers"].items()
        if "peak_bytes" in entry
    ]
    bad = [
        f"{name} {entry['status']}: {entry.get('reason', '')}"
        for name, entry in cell["peers"].items()
        if "peak_bytes" not in entry and entry["status"] != "not applicable"
    ]
    return f"{cell['id']} (MiB, peak and kept): {', '.join(shown)}" + "".join(f"\n    {x}" for x in bad)
