"""The suite `parity`: whether the kernels are right on this machine, beyond what a CPU can show."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks import environment
from benchmarks.attention import audit, cases
from benchmarks.attention.cases import Case
from benchmarks.attention.inputs import Inputs, make_inputs
from benchmarks.attention.native_tests import Outcome, run_tests
from benchmarks.attention.provider import Call, Provider, gradients, poison
from benchmarks.attention.providers import all_providers
from benchmarks.attention.suite import judge_providers
from benchmarks.context import Context
from benchmarks.health import BrokenContext, entry_of
from benchmarks.measure import capture, cell_stream

# Shares of the time left that the subprocesses may take.
_PYTEST_SHARE, _SANITIZER_SHARE = 0.5, 0.4
_SPARE_SECONDS = 5.0
_RED = ("wrong", "failed")
GATE_DTYPES = ("bf16", "fp16", "fp32")


class NotApplicable(Exception):
    """A check has nothing to look at on this machine; the message says why."""


def run(context: Context) -> str:
    """Run every check, whatever the ones before it gave; gives the state of the run.

    Raises:
        BrokenContext: the device is unusable; the check that did it is recorded as failed.
    """
    red = False
    for name, check in _checks(context):
        if context.left < _SPARE_SECONDS:
            return "red" if red else "out of time"
        start = time.monotonic()
        broken = None
        try:
            status, reason = check(context)
        except NotApplicable as why:
            status, reason = "not applicable", str(why)
        except Exception as error:
            try:
                status, reason = entry_of(error, context.device).values()
            except BrokenContext as why:
                status, reason, broken = "failed", str(why), why
        seconds = round(time.monotonic() - start, 1)
        context.result.put(
            {"id": name, "status": status, "reason": reason, "seconds": seconds, "date": environment.now()}
        )
        context.say(f"{name}: {status} {reason} ({seconds} s)")
        red |= status in _RED
        if broken is not None:
            raise broken
    return "red" if red else "complete"


def _checks(context: Context) -> list[tuple[str, Callable[[Context], Outcome]]]:
    """Every check, cheap and telling ones first."""
    on_cpu = context.device.type == "cpu"
    small = cases.tiny_cases() if on_cpu else [c for dtype in GATE_DTYPES for c in cases.gate_cases(dtype)]
    one = next(case for case in small if case.gradients)
    checks: list[tuple[str, Callable[[Context], Outcome]]] = []
    checks += [(f"judged-{case.id}", _judged(case)) for case in small]
    checks += [
        ("two-runs-bit-identical", _bit_identical(one)),
        ("cuda-graph-equals-eager", _graph_equals_eager(one)),
        ("torch-compile-equals-eager", _compile_equals_eager(one)),
        ("allocator-trace", lambda context: audit.allocator_trace(context, NotApplicable)),
    ]
    if not context.tiny:
        checks += [(f"judged-{case.id}", _judged(case)) for case in cases.large_cases()]
        checks += [("offsets-past-2^31", _huge(packed=False)), ("offsets-past-2^31-packed", _huge(packed=True))]
    checks += [("pytest", _pytest)]
    checks += [(f"sanitizer-{tool}", _sanitizer(tool)) for tool in ("memcheck", "racecheck")]
    return [(name, check) for name, check in checks if context.wants(name)]


def _ours() -> list[Provider]:
    return [provider for provider in all_providers() if provider.triton]


def _judged(case: Case) -> Callable[[Context], Outcome]:
    """Every one of our forms against the literal one, on one shape."""

    def check(context: Context) -> Outcome:
        if context.device.type == "cpu" and not context.tiny:
            raise NotApplicable("sizes for a GPU")
        with cell_stream(context.device):
            peers, _ = judge_providers(case, make_inputs(case, context.device), context, _ours())
        bad = {name: entry["reason"] for name, entry in peers.items() if entry["status"] in _RED}
        seen = [name for name, entry in peers.items() if entry["status"] in ("passed", "untimed")]
        if bad:
            return "wrong", str(bad)
        if not seen:
            raise NotApplicable(str({name: entry.get("reason") for name, entry in peers.items()}))
        worst = max(error for name in seen for error in peers[name]["errors"].values())
        return "passed", f"{', '.join(seen)}; largest relative error {worst:.1e}"

    return check


def _bound(name: str, case: Case, context: Context) -> tuple[Call, Inputs]:
    """One of our providers bound to fresh tensors, or `NotApplicable`."""
    provider = next(p for p in _ours() if p.name == name)
    reason = provider.refuses(case, context.device)
    if reason is not None:
        raise NotApplicable(reason)
    inputs = make_inputs(case, context.device)
    return provider.build(case, inputs), inputs


def _results(call: Call) -> list[torch.Tensor]:
    out = call.forward()
    return [out.detach(), *gradients(call, out)]


def _compare(first: list[torch.Tensor], second: list[torch.Tensor], what: str) -> Outcome:
    names = ("out", "q", "k", "v", "prompt_k", "prompt_v")
    off = [name for name, a, b in zip(names, first, second, strict=False) if not torch.equal(a, b)]
    return ("wrong", f"{what}: {', '.join(off)} differ") if off else ("passed", f"{what}: same bits")


def _bit_identical(case: Case) -> Callable[[Context], Outcome]:
    def check(context: Context) -> Outcome:
        with cell_stream(context.device):
            # The interpreter runs one program after the other: there is little to find, and it is slow.
            names = ("ours",) if context.tiny else ("ours", "ours_packed", "ours_bank16")
            for name in names:
                try:
                    call, inputs = _bound(name, case, context)
                except NotApplicable:
                    if name == "ours":
                        raise
                    continue
                first = [x.clone() for x in _results(call)]
                poison(inputs)
                outcome = _compare(first, _results(call), name)
                if outcome[0] != "passed":
                    return outcome
        return "passed", "same bits twice, memory poisoned between"

    return check


def _graph_equals_eager(case: Case) -> Callable[[Context], Outcome]:
    """Capture forward and backward, replay on other numbers, compare with eager on those."""

    def check(context: Context) -> Outcome:
        if context.device.type != "cuda":
            raise NotApplicable("CUDA graphs need a CUDA device")
        with cell_stream(context.device):
            call, _ = _bound("ours", case, context)
            _results(call)
            kept: list[torch.Tensor] = []

            def step() -> None:
                kept[:] = _results(call)

            graph = capture(step)
            with torch.no_grad():
                for leaf in call.leaves:
                    leaf.copy_(torch.randn_like(leaf))
            graph.replay()
            replayed = [x.clone() for x in kept]
            return _compare(replayed, _results(call), "replay on fresh inputs")

    return check


def _compile_equals_eager(case: Case) -> Callable[[Context], Outcome]:
    def check(context: Context) -> Outcome:
        call, _ = _bound("ours", case, context)
        torch._dynamo.reset()
        backend = "inductor" if context.device.type == "cuda" else "aot_eager"
        compiled = torch.compile(call.forward, fullgraph=True, backend=backend)
        out = compiled()
        found = [out.detach(), *gradients(call, out)]
        return _compare(found, _results(call), f"fullgraph, {backend}")

    return check


def _huge(packed: bool) -> Callable[[Context], Outcome]:
    """Tensors of more than 2^31 elements: the last rows must come out like the first."""

    def check(context: Context) -> Outcome:
        if context.device.type != "cuda":
            raise NotApplicable("needs some 40 GB of device memory")
        case = cases.huge_case(context.memory)
        with cell_stream(context.device):
            return audit.judge_huge(case, context.device, packed=packed)

    return check


def _pytest(context: Context) -> Outcome:
    """The kernels' tests in a process of their own; failures are said and recorded as they happen."""

    def tell(failure: str, so_far: Outcome) -> None:
        context.say(f"failed test {failure}")
        context.result.fail(f"failed test {failure}")
        context.result.put({"id": "pytest", "status": so_far[0], "reason": so_far[1], "date": environment.now()})

    # Alone a share of the time, all that is left where nothing else was asked for.
    share = 1.0 if context.only == ("pytest",) else _PYTEST_SHARE
    seconds = max(10.0, share * context.left - _SPARE_SECONDS)
    workers = 1 if context.tiny else None
    outcome = run_tests(
        context.tests, context.device, context.out, seconds, tell=tell, workers=workers, first=context.first_tests
    )
    if outcome is None:
        raise NotApplicable(f"no tests under {context.tests}")
    return outcome


def _sanitizer(tool: str) -> Callable[[Context], Outcome]:
    def check(context: Context) -> Outcome:
        # As with the tests: a share of the time, all that is left where nothing else was asked for.
        share = 1.0 if context.only == (f"sanitizer-{tool}",) else _SANITIZER_SHARE
        return audit.sanitizer(context, tool, NotApplicable, seconds=max(10.0, share * context.left - _SPARE_SECONDS))

    return check
