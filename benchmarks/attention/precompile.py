"""Compile ahead of a measurement, in parallel: a kernel takes seconds to compile and microseconds to launch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from os import cpu_count

import torch

from benchmarks.attention.cases import Case
from benchmarks.context import Context

# Each holds a CUDA context and a compiler: some hundred megabytes of host and device memory.
_MOST_WORKERS = 12
# Sizes are no part of the compiled code, but whether strides are multiples of 16 is: this many tokens
# stand for every longer text.
_TOKENS = 128
# What compiling ahead of whole steps may take.
_WARM_SECONDS = 60.0


class Compilers:
    """Processes that fill Triton's cache on disk; without CUDA there is nothing to compile and none start.

    They idle while something is timed: `warm` returns when its work is done.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Compilers:
        if self.device.type == "cuda":
            workers = max(1, min(_MOST_WORKERS, (cpu_count() or 2) - 2))
            self.pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, whose contexts hold memory of the device; nothing is compiled ahead after this."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.pool = None

    def warm(self, function: Callable, tasks: Iterable[tuple], seconds: float) -> None:
        """Run `function(*task)` for every task, at most for `seconds` in all.

        What fails here fails again, and is recorded, where it is measured.
        """
        if self.pool is None:
            return
        deadline = time.monotonic() + seconds
        try:
            futures = [self.pool.submit(function, *task) for task in tasks]
            for future in futures:
                future.exception(timeout=max(0.0, deadline - time.monotonic()))
        except (BrokenProcessPool, FutureTimeout):  # the builtin TimeoutError from Python 3.11 on
            self.close()


def warm_all(context: Context, function: Callable, cases: Iterable) -> None:
    """Compile the kernels of whole steps or generations in parallel before the first is measured; not on the CPU."""
    with Compilers(context.device) as compilers:
        compilers.warm(function, [(case,) for case in cases], min(_WARM_SECONDS, context.left / 4))


def small(case: Case, rows: int = 2) -> Case:
    """A case that compiles to the same code as this one and runs in no time."""
    tokens = _TOKENS if case.N > _TOKENS and case.N % 16 == 0 else case.N
    return replace(case, B=min(case.B, rows), N=tokens, direction="training")


def compile_provider(name: str, case: Case) -> None:
    """Run a provider of ours once, forward and backward, on a small case; for a worker."""
    from benchmarks.attention.inputs import BANK_TASKS, make_inputs
    from benchmarks.attention.provider import gradients
    from benchmarks.attention.providers import all_providers

    provider = next(p for p in all_providers() if p.name == name)
    case = small(case, BANK_TASKS if provider.bank else 2)
    if provider.refuses(case, torch.device("cuda")) is not None:
        return
    call = provider.build(case, make_inputs(case, "cuda"))
    gradients(call, call.forward())
    torch.cuda.synchronize()


def code_of(name: str, case: Case) -> tuple:
    """What decides the compiled code of a provider on a case; equal keys compile once."""
    prompt_tile = min(128, 1 << (max(1, case.P) - 1).bit_length())
    aligned = case.N % 16 == 0
    return name, case.d, case.group, case.causal, case.padding > 0, case.dtype, case.P > 0, prompt_tile, aligned
