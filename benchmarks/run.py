"""Run one suite of measurements into one result file.

    python -m benchmarks.run --suite parity|kernels|tune|steps|memory|decode|host|quality --minutes 8 --out DIR
                             [--device cuda|cpu] [--tiny]

Correctness comes first: a wrong result of ours stops the run. The exit status is 0 when the suite is
complete or its minutes are over, 1 when anything is red.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

# A module for each suite, imported when chosen: `run(context) -> state` is all that it has to offer.
SUITES = {
    "parity": "benchmarks.attention.parity_suite",
    "kernels": "benchmarks.attention.suite",
    "tune": "benchmarks.attention.tune_suite",
    "steps": "benchmarks.step.suite",
    "memory": "benchmarks.step.memory_suite",
    "decode": "benchmarks.decode.suite",
    "host": "benchmarks.host.suite",
    "quality": "benchmarks.quality.suite",
}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", required=True, choices=tuple(SUITES))
    parser.add_argument("--minutes", type=float, default=8.0, help="the run ends by itself before that")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is one")
    parser.add_argument("--tiny", action="store_true", help="a few small cells")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="cells whose id fits")
    parser.add_argument("--keep-going", action="store_true", help="measure on after a red cell")
    parser.add_argument("--tests", type=Path, default=Path("tests/kernels"), help="what parity gives pytest")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    parser.add_argument("--name", help="name of the result file; made of date, suite and device when left out")
    parser.add_argument("--small", action="store_true", help="less effort a cell, for a card that is there briefly")
    parser.add_argument("--every-peer", action="store_true", help="also compiled peers that no goal compares with")
    parser.add_argument("--data", type=Path, help="what quality reads: a folder with sst2/ and wnut17/")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Run a suite; gives the exit status."""
    options = arguments(words)
    deadline = time.monotonic() + 60.0 * options.minutes
    import torch

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu" and options.tiny:
        # Read when a kernel is decorated, so before any import of ours.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from benchmarks import environment, report
    from benchmarks.ceilings import measure_ceiling
    from benchmarks.context import Context
    from benchmarks.health import BrokenContext
    from benchmarks.record import ResultFile

    facts = environment.describe(device)
    facts["commit"] = options.commit or facts["commit"]
    if facts["commit"] is None:
        raise SystemExit("--commit must name the commit that is measured: git says none here")
    ceiling = measure_ceiling(device, tiny=options.tiny) if device.type == "cuda" or options.tiny else None
    facts["ceiling"] = None if ceiling is None else ceiling.as_dict()
    stamp = facts["date"].replace(":", "").replace("+0000", "")
    # Where a machine keeps its files is nobody else's concern.
    places = {str(place): place.name for place in (options.out, options.data) if place is not None}
    command = ["python", "-m", "benchmarks.run"]
    command += [places.get(word, word) for word in (sys.argv[1:] if words is None else words)]
    name = options.name or f"{stamp}-{options.suite}-{device.type}.json"
    result = ResultFile(options.out / name, options.suite, command, facts)
    context = Context(
        device, options.tiny, options.out, deadline, result,
        tuple(options.only), options.keep_going, options.tests, options.data,
        small=options.small, every_peer=options.every_peer, ceiling=ceiling,
    )  # fmt: skip
    start = time.monotonic()
    try:
        state = importlib.import_module(SUITES[options.suite]).run(context)
    except BrokenContext as error:
        context.say(f"the device does not answer any more, after {error}")
        state = "red"
    result.finish(
        state,
        seconds=round(time.monotonic() - start, 1),
        finished=environment.now(),
        clocks_after=environment.clocks(device),
    )
    context.say(report.summary(result.data))
    context.say(f"{state}: {result.path}")
    return 1 if state == "red" else 0


if __name__ == "__main__":
    sys.exit(main())
