"""What no card has run yet: paths that a CPU cannot take, and what in the result files shows that one was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Cell = Mapping[str, object]


@dataclass(frozen=True)
class Path:
    """One thing that only a card can run.

    Attributes:
        name: what it is.
        suite: whose cells show it.
        shown: whether a cell of a run on CUDA does.
        stand_in: what runs in its place on a CPU.
    """

    name: str
    suite: str
    shown: Callable[[Cell], bool]
    stand_in: str


def _timed(*names: str) -> Callable[[Cell], bool]:
    """A provider was timed in the cell."""
    return lambda cell: any(cell.get("peers", {}).get(name, {}).get("status") == "timed" for name in names)


def _passed(name: str) -> Callable[[Cell], bool]:
    """A check of that name, or one that begins with it, passed."""
    return lambda cell: cell["id"].startswith(name) and cell.get("status") == "passed"


def _entries(check: Callable[[Mapping], bool]) -> Callable[[Cell], bool]:
    return lambda cell: any(check(entry) for entry in cell.get("peers", {}).values())


PATHS = (
    Path("our kernels, compiled", "parity", _passed("judged-"), "Triton's interpreter; ahead-of-time compilation"),
    Path("the kernels' tests, natively", "parity", _passed("pytest"), "the same tests, interpreted"),
    Path("the allocator's trace", "parity", _passed("allocator-trace"), "every operation's output, in the tests"),
    Path("tensors past 2^31 elements", "parity", _passed("offsets-past-2^31"), "nothing"),
    Path("compute-sanitizer", "parity", _passed("sanitizer-"), "how its logs are read"),
    Path(
        "a kernel captured in a CUDA graph",
        "parity",
        _passed("cuda-graph-equals-eager"),
        "a stand-in that keeps the call",
    ),
    Path("maps in float8", "float8", _passed("float8-"), "the same numbers multiplied in float32"),
    Path("cuDNN attention", "kernels", _timed("cudnn", "cudnn_mask"), "nothing"),
    Path("flash attention", "kernels", _timed("flash"), "nothing"),
    Path("FlexAttention, compiled", "kernels", _timed("flex_concat", "flex_split"), "its eager form, forward alone"),
    Path("replay of kernels by the clock", "kernels", _entries(lambda e: e.get("method") == "graph"), "nothing"),
    Path("a captured training step", "steps", _entries(lambda e: bool(e.get("captured"))), "a stand-in for capture"),
    Path(
        "a peer compiled with CUDA graphs",
        "steps",
        _timed("peft_compiled", "floor_compiled"),
        "the same step, compiled without a code generator",
    ),
    Path("the profiler on a device", "steps", _entries(lambda e: bool(e.get("device_ms"))), "the profiler on the CPU"),
    Path("the allocator's audit of a step", "memory", _passed("audit-allocator"), "the audit of operations"),
    Path(
        "generation by captured steps", "decode", _timed("ours_captured"), "the same, eager; in the tests by a stand-in"
    ),
    Path("generation by a compiled step", "decode", _timed("ours_compiled"), "the same, without a code generator"),
    Path(
        "launch configurations chosen by time",
        "tune",
        _entries(lambda e: e.get("method") in ("events", "graph")),
        "the sweep, interpreted, with one configuration",
    ),
)


def untried(results: Iterable[Mapping]) -> list[Path]:
    """The paths that no result file of a card shows.

    Args:
        results: what `benchmarks.report.load` gives.
    """
    on_cards = [data for data in results if data["environment"].get("device") == "cuda"]
    cells: dict[str, list[Cell]] = {}
    for data in on_cards:
        cells.setdefault(data["suite"], []).extend(data["cells"])
    return [path for path in PATHS if not any(map(path.shown, cells.get(path.suite, ())))]
