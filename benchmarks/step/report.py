"""The tables of whole steps, memory and decoding, made from result files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from benchmarks.goals import Standing, best_of_ours, milliseconds, standing
from benchmarks.step.goals import STEP_GOALS

UNMEASURED = "not measured yet"
_PEERS = (
    "floor", "floor_compiled", "literal_sdpa", "literal_eager", "literal_compiled", "peft", "peft_compiled",
    "joined_sdpa", "joined_flex",
)  # fmt: skip
_DECODERS = ("ours", "ours_compiled", "ours_static", "peft", "static_compiled", "two_calls")
_AUDITS = ("audit-operations", "audit-allocator")
_MIB = 2**20

Table = Callable[[list[str], list[list[str]]], str]


def goals_rows(cells_of: Callable[[str], list[dict]], checks: Iterable[Mapping]) -> list[list[str]]:
    """One line for each goal; `cells_of` gives a suite's newest cells, `checks` the audits of memory runs."""
    rows = [goal_row(standing(goal, cells_of(goal.suite))) for goal in STEP_GOALS]
    return [*rows, _audit_row(checks)]


def goal_row(stand: Standing) -> list[str]:
    """Goal, what, must, reach, geomean, worst cell, met, reached."""
    goal = stand.goal
    must = goal.asked or _bound(goal.must({}), goal.at_most)
    reach = "by cell" if callable(goal.reach) else _bound(goal.reach, goal.at_most)
    if not stand.cells:
        return [goal.id, goal.what, must, reach, *[UNMEASURED] * 3, "–"]
    met = "yes" if stand.met else "**no**"
    return [
        goal.id, goal.what, must, reach, f"{stand.geomean:.2f}×",
        f"{stand.worst:.2f}× ({stand.worst_cell}, {stand.worst_provider})",
        f"{met} ({stand.met_cells} of {stand.cells} cells)", f"{stand.reached_cells} of {stand.cells}",
    ]  # fmt: skip


def goal_line(stand: Standing) -> str:
    """A goal on one line of a terminal."""
    if not stand.cells:
        return f"{stand.goal.id:8} {UNMEASURED}"
    return (
        f"{stand.goal.id:8} {stand.geomean:6.2f}x geomean {stand.worst:6.2f}x worst "
        f"{'met' if stand.met else 'NOT MET':7} {stand.met_cells}/{stand.cells}  {stand.worst_cell} "
        f"({stand.worst_provider})"
    )


def summary_lines(suite: str, cells: list[Mapping]) -> list[str]:
    """The goals that a suite's cells judge, on lines."""
    return [goal_line(standing(goal, cells)) for goal in STEP_GOALS if goal.suite == suite]


def _bound(figure: float, at_most: bool) -> str:
    return f"{'≤' if at_most else '≥'} {figure:.2f}×"


def _audit_row(checks: Iterable[Mapping]) -> list[str]:
    """M2, which is no ratio: both audits over whole steps."""
    newest = {cell["id"]: cell for cell in checks if cell["id"] in _AUDITS and cell["status"] != "not applicable"}
    words = "; ".join(f"{name[6:]}: {cell['status']} on {cell['on']}" for name, cell in sorted(newest.items()))
    green = len(newest) == len(_AUDITS) and all(cell["status"] == "passed" for cell in newest.values())
    wrong = any(cell["status"] != "passed" for cell in newest.values())
    met = "yes" if green else "**no**" if wrong else f"{UNMEASURED} by both"
    return [
        "M2", "no tensor over P + N in a whole step, no copy of a prompt for each row", "none, by both audits", "–",
        "–", words or UNMEASURED, met if words else UNMEASURED, "–",
    ]  # fmt: skip


def cells_table(cells: list[Mapping], table: Table) -> str:
    """Milliseconds of every cell and peer, and the best of ours; the roofline beside."""
    cells = [cell for cell in cells if cell.get("kind") != "stream"]
    if not cells:
        return UNMEASURED
    rows = []
    for cell in cells:
        best = best_of_ours(cell)
        rows.append(
            [
                cell["id"], _number(cell.get("speed_of_light_ms")), *(_entry(cell, name) for name in _PEERS),
                _entry(cell, "ours_p0"), _entry(cell, "ours"), _entry(cell, "ours_graph"),
                "–" if best is None else f"{_entry(cell, best)} ({best})", _rate(cell, best),
            ]
        )  # fmt: skip
    head = ["cell", "roofline", *_PEERS, "ours, P = 0", "ours", "ours_graph", "best of ours", "TFLOP/s, best"]
    return table(head, rows)


def ladder_table(cells: list[Mapping], table: Table) -> str:
    """Every rung of our switches, one more on at each, and the defaults."""
    cells = [cell for cell in cells if cell.get("kind") != "stream" and "ours_0_plain" in cell["peers"]]
    names = rung_names(cells)
    if not cells:
        return UNMEASURED
    rows = [[cell["id"], *(_entry(cell, name) for name in names), _entry(cell, "ours")] for cell in cells]
    return table(["cell", *names, "ours (defaults)"], rows)


def rung_names(cells: Iterable[Mapping]) -> list[str]:
    """The rungs that any cell has, in order."""
    found = {name for cell in cells for name in cell["peers"] if name.startswith("ours_") and name[5].isdigit()}
    return sorted(found)


def stream_table(cells: list[Mapping], table: Table) -> str:
    """Real tokens per second over batches of drawn lengths."""
    rows = [
        [
            cell["id"], name, _status(entry, "tokens_per_second", ",.0f"), _number(entry.get("ms")),
            str(entry.get("samples", "–")),
        ]
        for cell in cells
        if cell.get("kind") == "stream"
        for name, entry in cell["peers"].items()
        if entry["status"] != "not applicable"
    ]  # fmt: skip
    return table(["scenario", "provider", "real tokens/s", "ms a pass", "passes"], rows) if rows else UNMEASURED


def memory_table(cells: list[Mapping], table: Table) -> str:
    """MiB at the peak of a step, and kept for backward in brackets."""
    if not cells:
        return UNMEASURED
    names = ("floor", "literal_sdpa", "literal_eager", "peft", "joined_sdpa", "ours_p0", "ours")

    def shown(cell: Mapping, name: str) -> str:
        entry = cell["peers"].get(name)
        if entry is None or entry["status"] == "not applicable":
            return "–"
        if "peak_bytes" not in entry:
            return entry["status"]
        return f"{entry['peak_bytes'] / _MIB:,.1f} ({entry['kept_bytes'] / _MIB:,.1f})"

    rows = []
    for cell in cells:
        best = best_of_ours(cell, "peak_bytes")
        least = f"{shown(cell, best)} ({best})" if best else "–"
        rows.append([cell["id"], *(shown(cell, name) for name in names), least])
    return table(["cell", *names, "least of ours"], rows)


def decode_table(cells: list[Mapping], table: Table) -> str:
    """Milliseconds of one step of all rows, and tokens per second in brackets."""
    if not cells:
        return UNMEASURED

    def shown(cell: Mapping, name: str) -> str:
        ms = milliseconds(cell, name)
        if ms is None:
            return _entry(cell, name)
        return f"{ms:.3g} ({cell['peers'][name]['tokens_per_second']:,.0f})"

    rows = [
        [cell["id"], _number(cell.get("speed_of_light_ms"), ".3g"), *(shown(cell, name) for name in _DECODERS)]
        for cell in cells
    ]
    return table(["cell", "roofline", *_DECODERS], rows)


def float8_table(cells: list[Mapping], table: Table) -> str:
    """Milliseconds of every way of every cell, and what the judge found."""
    if not cells:
        return UNMEASURED
    rows = [
        [cell["id"], way, f"{entry['ms']:.4g}", cell["reason"]]
        for cell in cells
        for way, entry in cell["peers"].items()
    ]
    return table(["cell", "way", "ms", "errors against float64, or what two steps have in common"], rows)


def cpu_table(cells: list[Mapping], table: Table) -> str:
    """CPU cells as ratios: what the prompt costs, against the literal form, PEFT and the prompt-less model."""
    cells = [cell for cell in cells if cell.get("kind") != "stream" and best_of_ours(cell)]
    if not cells:
        return UNMEASURED
    rows, kept = [], {"literal": [], "peft": [], "floor": []}
    for cell in cells:
        case, ours = cell["case"], milliseconds(cell, "ours")
        times = {key: milliseconds(cell, name) for key, name in _CPU_PEERS.items()}
        ratios = {key: ms / ours if ms and ours else None for key, ms in times.items()}
        for key, ratio in ratios.items():
            kept[key] += [ratio] if ratio else []
        best = best_of_ours(cell)
        rows.append(
            [
                cell["id"], *(_number(times[key]) for key in _CPU_PEERS), _number(ours),
                f"{milliseconds(cell, best):.4g} ({best})", *(_times(ratios[key]) for key in _CPU_PEERS),
                _times(1 + case["P"] / case["N"]),
            ]
        )  # fmt: skip
    for label, take in (("geomean", _geomean), ("worst cell", min)):
        rows.append([label, *["–"] * 5, *(_times(take(kept[key]) if kept[key] else None) for key in _CPU_PEERS), "–"])
    head = ["cell", "literal, ms", "PEFT, ms", "prompt-less, ms", "ours, ms", "best of ours, ms"]
    return table([*head, "literal / ours", "PEFT / ours", "prompt-less / ours", "1 + P/N"], rows)


_CPU_PEERS = {"literal": "literal_sdpa", "peft": "peft", "floor": "floor"}


def _geomean(figures: list[float]) -> float:
    return math.exp(sum(map(math.log, figures)) / len(figures))


def _times(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.2f}×"


def _rate(cell: Mapping, name: str | None) -> str:
    return _number(cell["peers"].get(name, {}).get("tflops"), ".3g")


def _entry(cell: Mapping, name: str) -> str:
    entry = cell["peers"].get(name)
    if entry is None or entry["status"] == "not applicable":
        return "–"
    ms = milliseconds(cell, name)
    if ms is None:
        return entry["status"]
    broken = name.endswith("_compiled") and not entry.get("compiled", {}).get("whole", True)
    return f"{ms:.4g}{' (graph not whole)' if broken else ''}"


def _status(entry: Mapping, key: str, form: str) -> str:
    return format(entry[key], form) if key in entry else entry["status"]


def _number(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form)
