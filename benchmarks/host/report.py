"""Goals and tables of the suite `host`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.goals import Goal, Standing, milliseconds, standing
from benchmarks.step.report import UNMEASURED, goal_line, goal_row

Case = Mapping[str, object]
Table = Callable[[list[str], list[list[str]]], str]


def _kind(kind: str, injection: str | None = None) -> Callable[[Case], bool]:
    return lambda case: case["kind"] == kind and injection in (None, case["injection"])


def _goal(name: str, what: str, judged: Callable[[Case], bool], peer: str, must: float, reach: float, **more) -> Goal:
    ours = more.pop("ours", "ours")
    return Goal(name, what, judged, ours, peer, lambda case: must, reach, at_most=True, suite="host", **more)


HOST_GOALS = (
    _goal("H1", "a forward launch over a plain one", _kind("launch", "forward"), "plain", 4.0, 2.5),
    _goal("H2", "the launches of a whole backward over a plain one", _kind("launch", "backward"), "plain", 14.0, 9.0),
    _goal("H3", "an eager step over PEFT's", _kind("step"), "peft", 1.0, 0.85),
    _goal("H4", "the same over the bare frozen model's", _kind("step"), "bare", 1.15, 1.0),
    _goal("H5", "a generated token over the bare model's", _kind("token"), "bare", 1.2, 1.1),
    _goal(
        "H6", "operations of a step of 16 tasks over one task's", _kind("tasks"), "ours", 1.2, 1.05,
        ours="ours_tasks16", quantity="operations",
    ),
    _goal("H7", "a CPU's forward of evaluation over the bare model's", _kind("cpu-eval"), "bare", 1.3, 1.15),
    _goal("H8", "a CPU's training step over the bare frozen model's", _kind("cpu-step"), "bare", 1.3, 1.15),
    _goal("H9", "a CPU's forward of evaluation over PEFT's", _kind("cpu-eval"), "peft", 1.0, 0.95),
    _goal("H10", "a CPU's training step over PEFT's", _kind("cpu-step"), "peft", 1.0, 0.95),
)  # fmt: skip


def goals_table(cells: list[Mapping], table: Table) -> str:
    """The goals of the host, met or not."""
    head = ["goal", "what", "must", "reach", "geomean", "worst cell", "met", "reached"]
    return table(head, [goal_row(stand) for stand in _standings(cells)])


def summary_lines(cells: list[Mapping]) -> list[str]:
    """The goals on lines of a terminal."""
    return [goal_line(stand) for stand in _standings(cells)]


def _standings(cells: list[Mapping]) -> list[Standing]:
    return [standing(goal, cells) for goal in HOST_GOALS]


def cells_table(cells: list[Mapping], table: Table) -> str:
    """Milliseconds of process time, and operations / launches / Python calls in brackets; ours over each peer."""
    if not cells:
        return UNMEASURED
    rows = []
    for cell in cells:
        peers = cell["peers"]
        own = "ours_tasks16" if "ours_tasks16" in peers else "ours"
        other = {name: milliseconds(cell, name) for name in peers if name != own}
        ours = milliseconds(cell, own)
        ratios = ", ".join(f"{ours / ms:.2f}× {name}" for name, ms in other.items() if ms and ours)
        shown = "; ".join(f"{name} {_shown(entry)}" for name, entry in peers.items())
        rows.append([cell["id"], shown, ratios, _parts(peers[own])])
    return table(["cell", "ms (operations / launches / Python calls)", "ours over", "where ours is spent"], rows)


def _shown(entry: Mapping) -> str:
    return f"{entry['ms']:.3g} ({entry['operations']:.0f} / {entry['launches']:.0f} / {entry['python_calls']:.0f})"


def _parts(entry: Mapping) -> str:
    parts = entry.get("parts", {})
    return ", ".join(f"{part} {share:.0%}" for part, share in parts.items() if share >= 0.01) or "–"
