"""What the phases of a plan do: the suites' own runs on chosen cells, and what is compiled ahead of them.

Each function takes the run's context, the phase's arguments and what earlier phases found; it gives the state of the
phase, one of `record.STATES`.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.attention import audit, cases, parity_suite, tune_suite
from benchmarks.attention import suite as kernels_suite
from benchmarks.attention.inputs import make_inputs
from benchmarks.attention.precompile import Compilers
from benchmarks.attention.provider import gradients
from benchmarks.attention.providers import all_providers
from benchmarks.card import bisection, tuned
from benchmarks.ceilings import measure_ceiling
from benchmarks.context import Context
from benchmarks.decode import suite as decode_suite
from benchmarks.decode.cases import decode_cases, tiny_decode_cases
from benchmarks.decode.precompile import compile_cell
from benchmarks.decode.providers import DecodeKit, decode_providers
from benchmarks.step import float8_suite, memory_suite
from benchmarks.step import suite as steps_suite
from benchmarks.step.batches import make_prompts
from benchmarks.step.bench import GroupBench, clean_up
from benchmarks.step.models import FIRST_WORD, build_base
from benchmarks.step.providers import step_providers
from benchmarks.step.verify import run_once

Arguments = Mapping[str, object]
_MACHINE_CHECKS = ("two-runs-bit-identical", "cuda-graph-equals-eager", "torch-compile-equals-eager", "allocator-trace")


def start(context: Context, arguments: Arguments, before: Arguments) -> str:
    """What the machine is and what it reaches; nothing is worth much before that is known."""
    facts = environment.describe(context.device)
    ceiling = measure_ceiling(context.device, tiny=context.tiny)
    facts |= {"ceiling": ceiling.as_dict(), "libtriton_sha256": _digest_of_triton()}
    context.result.send(facts=facts)
    context.say(
        f"{facts['card'] or 'cpu'}, torch {facts['torch']}, triton {facts['triton']}, "
        f"{ceiling.tflops:.4g} TFLOP/s, {ceiling.terabytes_per_second:.4g} TB/s"
    )
    return "complete"


def _digest_of_triton() -> str | None:
    """Which build of Triton compiles: versions alone do not say."""
    spec = importlib.util.find_spec("triton")
    library = Path(spec.origin).parent / "_C" / "libtriton.so" if spec is not None and spec.origin else None
    return hashlib.sha256(library.read_bytes()).hexdigest() if library is not None and library.exists() else None


def gates(context: Context, arguments: Arguments, before: Arguments) -> str:
    """Our kernels compiled in parallel, then judged on small shapes in every dtype, and where asked on large ones."""
    small = context.chosen(cases.tiny_cases()) if context.device.type == "cpu" else [
        case for dtype in parity_suite.GATE_DTYPES for case in cases.gate_cases(dtype)
    ]  # fmt: skip
    large = cases.large_cases() if arguments.get("large") and not context.tiny else []
    timed = replace(context, only=tuple(arguments.get("ahead", ()))).chosen(cases.kernel_cases())
    ahead = [*small, audit.audited_case(), *large, *timed]
    with Compilers(context.device) as compilers:
        kernels_suite.compile_ahead(ahead, context, all_providers(), compilers, set())
    names = [f"judged-{case.id}" for case in (*small, *large)]
    return parity_suite.run(replace(context, only=(*names, *_MACHINE_CHECKS)))


def native(context: Context, arguments: Arguments, before: Arguments) -> str:
    """The kernels' own tests; those that failed in an earlier call before the others, where asked."""
    tests = Path(str(arguments.get("tests", context.tests)))
    first = tuple(before.get("failed_tests", ())) if arguments.get("failed") else ()
    return parity_suite.run(replace(context, tests=tests, first_tests=first, only=("pytest",)))


def checks(context: Context, arguments: Arguments, before: Arguments) -> str:
    """The checks of the machine that the phase names."""
    return parity_suite.run(context)


def bisect(context: Context, arguments: Arguments, before: Arguments) -> str:
    """Which kernel is wrong, in which dtype, and what heals it."""
    return bisection.run(context)


def kernels(context: Context, arguments: Arguments, before: Arguments) -> str:
    """Attention: ours against its peers; with `tuned`, also as the winners of tuning launch it."""
    everyone = [*all_providers(), *tuned.providers(before.get("winners", {}))]
    # The gates' phase has judged and compiled before; starting the compilers again takes longer than what is left.
    return kernels_suite.run(context, _named(everyone, arguments), gates=False, warm=False)


def steps(context: Context, arguments: Arguments, before: Arguments) -> str:
    """Whole training steps; with `profile`, only the device's own time of them."""
    providers = _named(step_providers(), arguments)
    if arguments.get("profile"):
        steps_suite.profile(context, providers)
        return "complete"
    return steps_suite.run(context, providers, warm=False, profiled=False)


def memory(context: Context, arguments: Arguments, before: Arguments) -> str:
    """Peak memory of a step, and the allocator's audit of it."""
    return memory_suite.run(context, _named(step_providers(), arguments), warm=False, operations=False)


def decode(context: Context, arguments: Arguments, before: Arguments) -> str:
    """Generation behind a prompt."""
    return decode_suite.run(context, _named(decode_providers(), arguments), warm=False)


def float8(context: Context, arguments: Arguments, before: Arguments) -> str:
    """Frozen maps in float8: right, and their time beside bf16."""
    return float8_suite.run(context)


def tune(context: Context, arguments: Arguments, before: Arguments) -> str:
    """Launch configurations of every pass, the likely winners first."""
    return tune_suite.run(context)


def compile_ours(context: Context, arguments: Arguments, before: Arguments) -> str:
    """The kernels of whole steps and of generation, in parallel."""
    steps = [case for group in steps_suite.chosen_groups(context) for case in group.cases]
    every = [*context.chosen(_decode_cases(context)), *steps]
    # At once: the processes take long to start, and nothing else is to be done in this phase.
    with Compilers(context.device) as compilers:
        compilers.warm(compile_cell, [(case,) for case in every], context.left)
    return "complete"


def compile_steps(context: Context, arguments: Arguments, before: Arguments) -> str:
    """Peers whose steps torch.compile takes long over, into the caches on disk."""
    for group in steps_suite.chosen_groups(context):
        bench = GroupBench(group, context, _named(step_providers(), arguments))
        for provider in bench.providers:
            if provider.refuses(group.first, context.device) is not None:
                continue
            bound = provider.build(bench.kit)
            for batch in bench.batches.values():
                for _ in range(bound.settle):
                    run_once(bound, bound.prepare(batch))
            context.say(f"compiled {provider.name} of {group.first.id}")
        del bench
        clean_up(context.device)
    return "complete"


def compile_decode(context: Context, arguments: Arguments, before: Arguments) -> str:
    """Compiled steps of generation, into the caches on disk."""
    for case in context.chosen(_decode_cases(context)):
        base = build_base(case.model, context.device, case.torch_dtype).eval()
        base.generation_config.eos_token_id = None
        kit = DecodeKit(base, make_prompts(base, case.P), case, tiny=context.tiny)
        ids = torch.full((case.B, case.N), FIRST_WORD, device=context.device)
        for provider in _named(decode_providers(), arguments):
            if provider.compiles and provider.refuses(context.device) is None:
                provider.build(kit)(ids, 4)
                context.say(f"compiled {provider.name} of {case.id}")
        clean_up(context.device)
    return "complete"


def compile_kernels(context: Context, arguments: Arguments, before: Arguments) -> str:
    """Every provider's attention once on chosen cells: FlexAttention compiles each shape."""
    for case in context.chosen(cases.tiny_cases() if context.tiny else cases.kernel_cases()):
        inputs = make_inputs(case, context.device)
        for provider in _named(all_providers(), arguments):
            if case.peers in provider.peers and provider.refuses(case, context.device) is None:
                call = provider.build(case, inputs)
                out = call.forward()
                if case.gradients:
                    gradients(call, out)
        context.say(f"compiled what is compared in {case.id}")
    return "complete"


def _decode_cases(context: Context) -> list:
    return tiny_decode_cases() if context.tiny else decode_cases()


def _named(everyone: Iterable, arguments: Arguments) -> list:
    """The providers that a phase names, all where it names none."""
    names = arguments.get("providers")
    return [provider for provider in everyone if not names or provider.name in names]


# Work -> whose cells it gives, and what does it.
WORK: dict[str, tuple[str, Callable[[Context, Arguments, Arguments], str]]] = {
    "start": ("parity", start),
    "gates": ("parity", gates),
    "native": ("parity", native),
    "checks": ("parity", checks),
    "bisect": ("parity", bisect),
    "kernels": ("kernels", kernels),
    "steps": ("steps", steps),
    "memory": ("memory", memory),
    "decode": ("decode", decode),
    "float8": ("float8", float8),
    "tune": ("tune", tune),
    "compile_ours": ("compiled", compile_ours),
    "compile_steps": ("compiled", compile_steps),
    "compile_decode": ("compiled", compile_decode),
    "compile_kernels": ("compiled", compile_kernels),
}
