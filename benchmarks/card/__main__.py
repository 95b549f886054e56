"""Spend a card's minutes: `python -m benchmarks.card --plan first|second --minutes M --commit HASH --out DIR`.

What to look at, and what to do then: benchmarks/CARD.md. The exit status is 1 when anything is red.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.card import faults, plans
from benchmarks.card.parent import Parent
from benchmarks.card.record import CardRecord, failures_of, found_in

# Works that are not called as the suite whose cells they give.
_SUITES = {"gates": "parity", "native": "parity", "bisect": "parity"}
_ROOT = Path(__file__).resolve().parents[2]


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.card", description=__doc__.splitlines()[0])
    parser.add_argument("--plan", required=True, choices=("first", "second"))
    parser.add_argument("--minutes", type=float, default=7.0, help="the run ends by itself before that")
    parser.add_argument("--commit", required=True, help="the commit that is measured: git does not travel")
    parser.add_argument("--out", type=Path, required=True, help="takes card.json, card.log and failures.txt")
    parser.add_argument("--variant", choices=plans.VARIANTS, help="of the second plan; told by --after when left out")
    parser.add_argument("--after", type=Path, metavar="JSON", help="the first call's card.json")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="cells of variant steps")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal of every phase on small models")
    parser.add_argument("--fault", help="of a rehearsal: wrong-kernel, or raise, hang, kill, broken and :PHASE")
    options = parser.parse_args(words)
    try:
        faults.check(options.fault)
    except ValueError as error:
        parser.error(str(error))
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes must be a positive number; got {options.minutes}")
    if options.after is not None and not options.after.is_file():
        parser.error(f"--after must be the card.json of a first call; got {str(options.after)!r}")
    if options.fault and not options.tiny:
        parser.error("--fault is for rehearsals: it needs --tiny")
    return options


def before(path: Path | None) -> tuple[str, dict[str, object]]:
    """The variant that a first call asks for, and what its record tells the second: failed tests, winners."""
    if path is None:
        return "tune", {}
    data = json.loads(path.read_text())
    red = {cell["suite"] for cell in data["cells"] if failures_of(cell)}
    found = found_in(data)
    # A phase that died, or gates that nobody judged, may have left no red cell.
    died = {line.removeprefix("phase ").split(": ")[0] for line in data["failures"] if line.startswith("phase ")}
    red |= {_SUITES.get(phase.work, phase.work) for phase in plans.first().phases if phase.name in died}
    if red & {"parity", "kernels"}:
        return "kernels", found
    return ("steps" if red & {"steps", "decode", "memory"} else "tune"), found


def _without_folders(word: str) -> str:
    """A word of the command line with the last part of a path alone, also behind "--out="."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + (Path(value).name if os.sep in value else value)


def main(words: list[str] | None = None) -> int:
    """Run a plan; gives the exit status."""
    options = arguments(words)
    # Everything that the phases' common process imports sees these.
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # Processes that are ended leave semaphores to be cleaned up, which is no news.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    told, found = before(options.after)
    variant = options.variant or told
    plan = plans.first() if options.plan == "first" else plans.second(variant, tuple(options.only))
    name = "first" if options.plan == "first" else f"second, {variant}"
    # Where a machine keeps its files is nobody else's concern.
    command = ["python", "-m", "benchmarks.card", *map(_without_folders, sys.argv[1:] if words is None else words)]
    date = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    facts = {"device": options.device, "commit": options.commit, "date": date}
    record = CardRecord(options.out, name, command, facts)
    parent = Parent(
        plan.scaled(60.0 * options.minutes), device=options.device, tiny=options.tiny, fault=options.fault,
        record=record, before=found,
    )  # fmt: skip
    # A run that is told to end closes its record.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start = time.monotonic()
    state = "red"
    try:
        state = parent.run()
    except (SystemExit, KeyboardInterrupt):
        state = record.state(out_of_time=True)
        raise
    finally:
        table = record.close(state, seconds=round(time.monotonic() - start, 1))
    print(table)
    record.say(f"{state}: {name}")
    return 1 if state == "red" else 0


if __name__ == "__main__":
    sys.exit(main())
