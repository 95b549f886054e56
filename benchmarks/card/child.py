"""One phase in a process of its own: forked from one that has imported everything and has no CUDA context."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  what forks share

from benchmarks.card import faults, work
from benchmarks.card.channel import Lines
from benchmarks.card.order import BROKEN, Order
from benchmarks.ceilings import Ceiling
from benchmarks.context import Context
from benchmarks.health import BrokenContext
from benchmarks.stand_in import captured_on_cpu

with suppress(ImportError):
    import peft  # noqa: F401  likewise, where it is installed

# Set where a phase's process is a fresh interpreter.
_FRESH = "PTV2_CARD_FRESH"
# What a phase keeps back of its seconds to end by itself.
_SPARE = 0.06


def main(text: str) -> None:
    """Do what an order says and end the process; its status is 0, `BROKEN` or 1."""
    order = Order.of(text)
    # Where CUDA was touched before the fork it cannot be used after it: start over as a fresh interpreter.
    forked = _FRESH not in os.environ
    if forked and (torch.cuda._is_in_bad_fork() or faults.is_fresh(order.fault, order.phase)):
        command = [sys.executable, "-m", "benchmarks.card.child", text]
        os.execve(sys.executable, command, {**os.environ, _FRESH: "1"})
    os.setpgid(0, 0)
    _end_with_the_parent()
    with open(order.log, "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    # What is printed comes line by line, whoever reads it.
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    os._exit(_run(order))


def _run(order: Order) -> int:
    # Why a step was not captured is said there alone.
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("ptv2_fast").setLevel(logging.INFO)
    suite, do = work.WORK[order.work]
    lines = Lines(Path(order.lines), suite)
    seconds = order.seconds * (1 - _SPARE)
    context = Context(
        torch.device(order.device), order.tiny, Path(order.scratch), time.monotonic() + seconds, lines,
        only=tuple(order.arguments.get("only", ())), keep_going=True, small=True,
        ceiling=None if order.ceiling is None else Ceiling(**order.ceiling), done=frozenset(order.done),
    )  # fmt: skip
    # Without CUDA a stand-in captures, so that what only a card reaches is run there too.
    captured = captured_on_cpu() if order.device == "cpu" else nullcontext()
    try:
        with captured:
            faults.plant(order.fault, order.phase, order.attempt)
            lines.end(do(context, order.arguments, order.before))
    except BrokenContext as error:
        lines.end("failed", f"the device does not answer any more, after {error}")
        # At once: what the error holds alive cannot be destroyed without a device, and would abort the process.
        os._exit(BROKEN)
    except Exception as error:
        traceback.print_exc()
        lines.end("failed", f"{type(error).__name__}: {error}"[:500])
        return 1
    return 0


def _end_with_the_parent() -> None:
    """A watch that ends this process and all that it started when whoever started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1])
