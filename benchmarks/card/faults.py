"""Faults planted in a rehearsal, to see that each costs what it should and no more."""

from __future__ import annotations

import os
import signal
import time

# Of "kind:phase"; a wrong kernel is wrong wherever it is launched.
KINDS = ("wrong-kernel", "raise", "hang", "kill", "broken", "fresh", "pool")


def check(fault: str | None) -> None:
    """Raise ValueError unless a fault is "wrong-kernel" or a kind and a phase ("raise:PHASE"); several with commas."""
    for one in _each(fault):
        kind, _, phase = one.partition(":")
        if one != "wrong-kernel" and (kind not in KINDS or not phase):
            raise ValueError(f"fault must be wrong-kernel or one of {KINDS[1:]} with a phase; got {one!r}")


def is_fresh(fault: str | None, phase: str) -> bool:
    """Whether a phase is to run as if CUDA had been touched before its process was forked."""
    return f"fresh:{phase}" in _each(fault)


def plant(fault: str | None, phase: str, attempt: int) -> None:
    """Do in a phase's process what the fault says; a broken context is broken in the first attempt alone."""
    for one in _each(fault):
        kind, _, where = one.partition(":")
        if kind == "wrong-kernel":
            _spoil_forward()
        elif where == phase:
            _do(kind, attempt)


def _each(fault: str | None) -> list[str]:
    return [] if fault is None else fault.split(",")


def _do(kind: str, attempt: int) -> None:
    if kind == "raise":
        raise RuntimeError("a planted error")
    if kind == "hang":
        time.sleep(3600)
    if kind == "pool":
        import torch

        from benchmarks.attention.precompile import Compilers

        # As on a card, where a phase compiles in processes of its own.
        with Compilers(torch.device("cuda")) as compilers:
            compilers.warm(os.getpid, [()], 60.0)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "broken" and attempt == 0:
        from benchmarks.health import BrokenContext

        raise BrokenContext("a planted broken context")


def _spoil_forward() -> None:
    """The forward kernel's output is off by five percent from here on."""
    from ptv2_fast.kernels import prompt_forward

    right = prompt_forward.prompt_attention_forward

    def wrong(*arguments, **options):
        output, lse = right(*arguments, **options)
        return 1.05 * output, lse

    prompt_forward.prompt_attention_forward = wrong
