"""Write tables and plots from the result files: `python -m benchmarks.report`.

What stands between the markers of benchmarks/README.md and what is drawn under benchmarks/results/plots/ comes from
JSON under benchmarks/results/; no figure is typed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks import headline, plots, predictions
from benchmarks.goals import KERNEL_GOALS, Standing, milliseconds, standing
from benchmarks.host import report as host_report
from benchmarks.quality import float8_table
from benchmarks.record import check_schema
from benchmarks.step import report as step_report
from benchmarks.untried import untried

HERE = Path(__file__).resolve().parent
UNMEASURED = "not measured yet"
_COLUMNS = (
    "ours", "ours_packed", "sdpa_user", "sdpa_outside", "cudnn", "cudnn_mask", "flash", "efficient",
    "efficient_mask", "flex_concat", "flex_split",
)  # fmt: skip


def load(folder: Path) -> list[dict]:
    """Every result file of a folder, oldest first.

    Raises:
        ValueError: a file is not a result file; the message names it.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or "schema" not in data:
            continue
        try:
            check_schema(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        results += parts({**data, "file": path.name})
    return sorted(results, key=lambda data: data["environment"].get("date") or "")


def parts(data: Mapping) -> list[dict]:
    """A result file as one of each suite: a card's record holds cells of several."""
    if data["suite"] != "card":
        return [dict(data)]
    found = []
    for suite in dict.fromkeys(cell["suite"] for cell in data["cells"]):
        cells = [cell for cell in data["cells"] if cell["suite"] == suite]
        found.append({**data, **data["rest"].get(suite, {}), "suite": suite, "cells": cells})
    return found


def measured_cells(results: Iterable[Mapping], suite: str, device: str = "cuda") -> list[dict]:
    """Every measurement of the cells of a suite, oldest first."""
    return [
        {**cell, "file": data.get("file")}
        for data in results
        if data["suite"] == suite and data["environment"].get("device") == device
        for cell in data["cells"]
        if _measured(cell)
    ]


def latest_cells(results: Iterable[Mapping], suite: str, device: str = "cuda") -> list[dict]:
    """The newest measurement of each cell of a suite, whoever took part in it."""
    return list({cell["id"]: cell for cell in measured_cells(results, suite, device)}.values())


def _measured(cell: Mapping) -> bool:
    return any(entry["status"] == "timed" or "peak_bytes" in entry for entry in cell.get("peers", {}).values())


def _bound(figure: float, at_most: bool) -> str:
    return f"{'≤' if at_most else '≥'} {figure:.2f}×"


def goal_row(stand: Standing) -> list[str]:
    """One line of the table of goals."""
    goal = stand.goal
    if not stand.cells:
        return [goal.id, goal.what, _default_musts(goal), _bound(goal.reach, goal.at_most)] + [UNMEASURED] * 3 + ["–"]
    musts = " / ".join(_bound(must, goal.at_most) for must in stand.musts)
    rate = f", {stand.worst_tflops:.0f} TFLOP/s" if stand.worst_tflops else ""
    met = "yes" if stand.met else "**no**"
    return [
        goal.id, goal.what, musts, _bound(goal.reach, goal.at_most), f"{stand.geomean:.2f}×",
        f"{stand.worst:.2f}× ({stand.worst_cell}{rate})",
        f"{met} ({stand.met_cells} of {stand.cells} cells)", f"{stand.reached_cells} of {stand.cells}",
    ]  # fmt: skip


def _default_musts(goal) -> str:
    """What a goal asks for over the sizes of the grid."""
    asked = {goal.must({"d": d, "N": N}) for d in (64, 128) for N in (128, 512)}
    if goal.id == "K1" or goal.id == "K2":
        asked = {goal.must({})}
    return " / ".join(_bound(must, goal.at_most) for must in sorted(asked))


def goals_table(cells: list[Mapping]) -> str:
    """The goals of the kernels, met or not, or not measured yet."""
    head = ["goal", "what", "must", "reach", "geomean", "worst cell", "met", "reached"]
    return table(head, [goal_row(standing(goal, cells)) for goal in KERNEL_GOALS])


def cells_table(cells: list[Mapping]) -> str:
    """Milliseconds of every cell and peer, the roofline beside; rows where a peer wins stay in."""
    if not cells:
        return UNMEASURED
    rows = []
    for cell in sorted(cells, key=lambda cell: cell["id"]):
        ours = cell["peers"].get("ours", {})
        light = cell.get("speed_of_light_ms")
        row = [cell["id"], _number(light)]
        row += [_entry(cell, name) for name in _COLUMNS]
        rows.append([*row, _number(ours.get("tflops"), ".0f")])
    return table(["cell", "roofline", *_COLUMNS, "TFLOP/s, ours"], rows)


def _entry(cell: Mapping, name: str) -> str:
    entry = cell["peers"].get(name)
    if entry is None or entry["status"] == "not applicable":
        return "–"
    ms = milliseconds(cell, name)
    return entry["status"] if ms is None else f"{ms:.4g}"


def _number(value, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form)


def checks_table(results: Iterable[Mapping]) -> str:
    """The newest outcome of every check of the parity suite, on each kind of device."""
    outcomes = {}
    for data in results:
        if data["suite"] == "parity":
            where = data["environment"].get("card") or data["environment"].get("device")
            for cell in data["cells"]:
                outcomes[cell["id"], where] = [cell["id"], where, cell["status"], cell.get("reason") or "–"]
    return table(["check", "on", "outcome", "detail"], list(outcomes.values())) if outcomes else UNMEASURED


def untried_table(results: list[Mapping]) -> str:
    """What no card has run yet."""
    rows = [[path.name, path.suite, path.stand_in] for path in untried(results)]
    head = ["never run yet", "suite", "in its place on a CPU"]
    return table(head, rows) if rows else "A card has run all of it."


def predictions_table(results: list[Mapping]) -> str:
    """What was expected of a card, and what came."""
    found = predictions.rows(results)
    head = ["what", "expected", "measured", "measured over expected", "file"]
    return table(head, found) if found else UNMEASURED


def headline_table(results: list[Mapping]) -> str:
    """The rows of the front page."""
    found = headline.rows(lambda suite: measured_cells(results, suite))
    head = ["what", "ours", "peer", "the peer", "peer over ours"]
    return table(head, found) if found else UNMEASURED


def sources_table(results: list[Mapping]) -> str:
    """Which runs the tables come from."""
    rows = []
    for data in results:
        facts = data["environment"]
        clocks = facts.get("clocks") or {}
        rows.append(
            [
                data["file"], data["suite"], data["state"], facts.get("card") or facts["device"],
                *(str(facts.get(name) or "–") for name in ("driver", "torch", "triton", "commit", "date")),
                _number(clocks.get("sm_mhz"), ".0f"), str(len(data["cells"])),
            ]
        )  # fmt: skip
    head = ["file", "suite", "state", "on", "driver", "torch", "triton", "commit", "date", "SM MHz", "cells"]
    return table(head, rows) if rows else UNMEASURED


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["--"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def step_goals_table(results: list[Mapping]) -> str:
    """The goals of whole steps, memory and decoding."""
    checks = [
        {**cell, "on": data["environment"].get("card") or data["environment"]["device"]}
        for data in results
        if data["suite"] == "memory"
        for cell in data["cells"]
    ]
    head = ["goal", "what", "must", "reach", "geomean", "worst cell", "met", "reached"]
    return table(head, step_report.goals_rows(lambda suite: _fixed(measured_cells(results, suite)), checks))


def _fixed(cells: Iterable[Mapping]) -> list[Mapping]:
    """Cells of one shape, which goals are about; not the scenarios of drawn lengths."""
    return [cell for cell in cells if cell.get("kind") != "stream"]


def float8_quality_table(results: list[Mapping]) -> str:
    """What float8 costs in quality, each run by the newest file that has it."""
    runs = [data for data in results if data["suite"] == float8_table.SUITE]
    newest = {cell["id"]: cell for data in runs for cell in data["cells"]}
    return float8_table.table(newest.values(), table) if runs else UNMEASURED


def _step_section(render_cells, suite: str, device: str):
    return lambda results: render_cells(latest_cells(results, suite, device), table)


# Marker name -> what stands between its two markers.
SECTIONS = {
    "step-goals": step_goals_table,
    "step-cells": _step_section(step_report.cells_table, "steps", "cuda"),
    "step-ladder": _step_section(step_report.ladder_table, "steps", "cuda"),
    "step-streams": _step_section(step_report.stream_table, "steps", "cuda"),
    "memory-cells": _step_section(step_report.memory_table, "memory", "cuda"),
    "decode-cells": _step_section(step_report.decode_table, "decode", "cuda"),
    "cpu-steps": _step_section(step_report.cpu_table, "steps", "cpu"),
    "cpu-ladder": _step_section(step_report.ladder_table, "steps", "cpu"),
    "cpu-streams": _step_section(step_report.stream_table, "steps", "cpu"),
    "cpu-memory": _step_section(step_report.memory_table, "memory", "cpu"),
    "float8-quality": float8_quality_table,
    "float8-cells": _step_section(step_report.float8_table, "float8", "cuda"),
    "host-goals": lambda results: host_report.goals_table(measured_cells(results, "host", "cpu"), table),
    "host-cells": _step_section(host_report.cells_table, "host", "cpu"),
    "plots": lambda results: plots.links(plots.drawable(results, latest_cells)) or UNMEASURED,
    "kernel-goals": lambda results: goals_table(measured_cells(results, "kernels")),
    "kernel-cells": lambda results: cells_table(latest_cells(results, "kernels")),
    "parity-checks": checks_table,
    "untried": untried_table,
    "predictions": predictions_table,
    "headline": headline_table,
    "sources": sources_table,
}


def render(text: str, results: list[dict]) -> str:
    """The text with every marked section rewritten.

    Raises:
        ValueError: a begin marker has no end marker.
    """
    for name, section in SECTIONS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin not in text:
            continue
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{begin} and {end} must each stand in the text once")
        before, rest = text.split(begin)
        after = rest.split(end)[1]
        text = f"{before}{begin}\n\n{section(results)}\n\n{end}{after}"
    return text


def summary(data: Mapping) -> str:
    """The short table at the end of a run."""
    if data["suite"] == "kernels":
        lines = [
            f"{stand.goal.id:4} {stand.geomean:6.2f}x geomean {stand.worst:6.2f}x worst "
            f"{'met' if stand.met else 'NOT MET':7} {stand.met_cells}/{stand.cells}  {stand.worst_cell}"
            if stand.cells
            else f"{stand.goal.id:4} {UNMEASURED}"
            for stand in (standing(goal, data["cells"]) for goal in KERNEL_GOALS)
        ]
        return "\n".join(lines)
    if data["suite"] in ("steps", "memory", "decode") and data["environment"].get("device") == "cuda":
        cells = _fixed(cell for cell in data["cells"] if _measured(cell))
        return "\n".join(step_report.summary_lines(data["suite"], cells))
    if data["suite"] == "host":
        return "\n".join(host_report.summary_lines([cell for cell in data["cells"] if _measured(cell)]))
    if data["suite"] == "tune":
        rows = [
            f"sm_{arch} {precision} {name} d={size}: {best['config']} at {best['time_over_present']:.3f} "
            f"of {best['present']}"
            for arch, precisions in data.get("winners", {}).get("tables", {}).items()
            for precision, passes in precisions.items()
            for name, sizes in passes.items()
            for size, best in sizes.items()
        ]
        return "\n".join(rows) or UNMEASURED
    return "\n".join(
        f"{cell['status']:15} {cell['id']}  {cell.get('reason') or ''}".rstrip()
        for cell in data["cells"]
        if "status" in cell
    )


def main(words: list[str] | None = None) -> int:
    """Rewrite the tables; gives the exit status, 1 with --check where they were stale."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--readme", type=Path, action="append", help="a page with tables; the project's when absent")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the tables are stale")
    options = parser.parse_args(words)
    results = load(options.results)
    pages = options.readme or [HERE / "README.md", HERE.parent / "README.md"]
    before = [page.read_text() for page in pages]
    after = [render(text, results) for text in before]
    if options.check:
        return int(before != after)
    for page, text in zip(pages, after, strict=False):
        page.write_text(text)
    plots.draw(plots.drawable(results, latest_cells), options.results / "plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
