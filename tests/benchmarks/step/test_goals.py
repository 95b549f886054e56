"""The goals of steps, memory and decoding take their figures from the right cells; plots and tables follow."""

from __future__ import annotations

import pytest

from benchmarks import plots, report
from benchmarks.goals import BEST, best_of_ours, standing
from benchmarks.step import report as step_report
from benchmarks.step.cases import StepCase
from benchmarks.step.goals import STEP_GOALS

GOALS = {goal.id: goal for goal in STEP_GOALS}
TEXT = "<!-- step-goals:begin -->\nold\n<!-- step-goals:end -->"


def _cell(case, quantity="ms", **figures):
    status = "timed" if quantity == "ms" else "passed"
    peers = {name: {"status": status, quantity: figure, "method": "events"} for name, figure in figures.items()}
    case = case if isinstance(case, dict) else case.as_dict()
    return {"id": case.get("id", "cell"), "case": case, "peers": peers}


def _run(cells, suite="steps", device="cuda"):
    facts = {"device": device, "card": "NVIDIA H200", "date": "2026-01-01T00:00:00+00:00"}
    return {"suite": suite, "state": "complete", "environment": facts, "cells": cells, "file": "x.json"}


BASE = StepCase("bert-base", 32, 128, 20, 0.4)
LARGE = StepCase("roberta-large", 32, 128, 20, 0.4)
LLAMA = StepCase("llama-3-8b", 8, 512, 128, 0.4)
DECODE = {"model": "qwen3-0.6b", "B": 64, "P": 512, "N": 32, "dtype": "bf16", "causal": True}


@pytest.mark.parametrize(
    ("goal", "cell", "figure", "met"),
    [
        ("S1", _cell(BASE, ours=1.0, peft_compiled=1.5), 1.5, False),
        ("S1", _cell(LARGE, ours=1.0, peft_compiled=1.5), 1.5, True),
        ("S2", _cell(StepCase("bert-base", 32, 128, 20), ours=1.0, peft_compiled=1.02), 1.02, False),
        ("S2", _cell(StepCase("bert-base", 32, 128, 20), ours=1.0, peft_compiled=1.06), 1.06, True),
        ("S3", _cell(BASE, ours=1.0, literal_sdpa=1.9), 1.9, True),
        ("S3", _cell(StepCase("bert-base", 32, 128, 128, 0.4), ours=1.0, literal_sdpa=1.9), 1.9, False),
        ("S4", _cell(LLAMA, ours=0.65, floor_compiled=1.0), 0.65, True),
        ("S4", _cell(StepCase("llama-3-8b", 8, 512, 128), ours=1.1, floor_compiled=1.0), 1.1, False),
        ("S5", _cell(StepCase("bert-base", 64, 128, 512), ours=1.3, ours_p0=1.0), 1.3, True),
        ("S6c", _cell(StepCase("bert-base", 8, 64, 20), ours=2.0, ours_graph=1.0, peft_compiled=1.3), 1.3, True),
        ("S7", _cell(StepCase("bert-base", 32, 128, 20, 0.4, dropout=0.1), ours=1.0, peft=1.7), 1.7, False),
        ("S8b", _cell(LLAMA, ours=1.0, peft_compiled=1.5), 1.5, True),
        ("S9a", _cell(StepCase("qwen3-0.6b", 8, 512, 64), ours=1.0, peft=2.0), 2.0, False),
        ("T1 step", _cell(StepCase("bert-base", 32, 128, 20, peers="tasks"), ours=1.0, ours_tasks16=1.04), 1.04, True),
        ("M1a", _cell(BASE, "peak_bytes", ours=0.5, literal_sdpa=1.0), 0.5, True),
        ("M1a", _cell(BASE, "peak_bytes", ours=0.53, literal_sdpa=1.0), 0.53, False),
        ("M1b", _cell(LLAMA, "peak_bytes", ours=0.4, floor=1.0), 0.4, False),
        ("D1", _cell(DECODE, ours=1.0, ours_compiled=0.5, static_compiled=1.0), 2.0, True),
        ("D3", _cell(DECODE, ours=1.0, peft=4.0), 4.0, False),
    ],
)  # fmt: skip
def test_each_goal_takes_its_figure_from_its_cells(goal, cell, figure, met):
    stand = standing(GOALS[goal], [cell])
    assert stand.cells == 1 and stand.worst == pytest.approx(figure) and stand.met is met


@pytest.mark.parametrize(
    ("goal", "case"),
    [
        ("S1", StepCase("bert-base", 8, 64, 20, 0.4)),
        ("S1", StepCase("bert-base", 32, 128, 20, 0.4, dropout=0.1)),
        ("S1", StepCase("bert-base", 32, 128, 20, 0.4, dtype="fp32")),
        ("S3", StepCase("bert-base", 64, 128, 8, 0.4)),
        ("S9a", StepCase("qwen3-0.6b", 8, 64, 20)),
        ("T1 step", BASE),
    ],
)
def test_cells_outside_a_goal_do_not_count(goal, case):
    figures = dict.fromkeys(("ours", "peft", "peft_compiled", "literal_sdpa", "ours_tasks16"), 1.0)
    assert standing(GOALS[goal], [_cell(case, **figures)]).cells == 0


def test_the_best_of_ours_does_the_whole_work():
    cell = _cell(BASE, ours=3.0, ours_1_unpad=2.0, ours_p0=1.0, ours_tasks16=1.0, peft=0.5)
    assert best_of_ours(cell) == "ours_1_unpad"
    assert best_of_ours(_cell(BASE, peft=1.0)) is None
    assert standing(GOALS["S1"], [_cell(BASE, ours=1.0, ours_3_x=0.5, peft_compiled=1.0)]).worst_provider == "ours_3_x"
    assert GOALS["S5"].ours != BEST, "the cost of a prompt compares one configuration with itself"


def test_a_geomean_below_its_own_bound_is_no_success():
    cases = (StepCase("bert-base", 32, 128, 20), StepCase("roberta-large", 32, 128, 20))
    stand = standing(GOALS["S2"], [{**_cell(case, ours=1.0, peft_compiled=1.01), "id": case.id} for case in cases])
    assert stand.met_cells == 2 and stand.met is False


def test_what_nobody_measured_is_not_measured_yet():
    text = report.render(TEXT, [])
    for goal in (*GOALS, "M2"):
        row = next(line for line in text.splitlines() if line.startswith(f"| {goal} |"))
        assert "not measured yet" in row


def test_a_cpu_says_nothing_about_the_goals():
    text = report.render(TEXT, [_run([_cell(BASE, ours=1.0, peft_compiled=9.0)], device="cpu")])
    assert "9.00" not in text
    assert "9.00" in report.render(TEXT, [_run([_cell(BASE, ours=1.0, peft_compiled=9.0)])])


def test_both_audits_have_to_pass():
    def row(*statuses):
        names = ("audit-operations", "audit-allocator")
        cells = [{"id": name, "status": status} for name, status in zip(names, statuses, strict=True)]
        text = report.render(TEXT, [_run(cells, "memory")])
        return next(line for line in text.splitlines() if line.startswith("| M2 "))

    assert "| yes |" in row("passed", "passed")
    assert "**no**" in row("passed", "wrong")
    assert "not measured yet by both" in row("passed", "not applicable")


def _steps():
    figures = {"ours_0_plain": 3.0, "ours_1_unpad": 2.0, "ours": 2.0, "ours_p0": 1.5, "literal_sdpa": 5.0, "peft": 4.0}
    cases = [StepCase("minilm", 8, 64, P, padding, dtype="fp32") for P in (20, 128) for padding in (0.0, 0.4)]
    return [{**_cell(case, **figures, floor=2.0), "id": case.id} for case in cases]


def test_ratios_on_a_cpu_stand_beside_what_the_lengths_predict():
    shown = step_report.cpu_table(_steps(), report.table)
    first = next(line for line in shown.splitlines() if "P20-pad0-" in line)
    assert "2.50×" in first and "2.00×" in first and "1.31×" in first
    assert shown.splitlines()[-1].startswith("| worst cell")


def test_a_compiled_peer_in_pieces_is_marked():
    cell = _cell(BASE, ours=1.0, peft_compiled=2.0)
    cell["peers"]["peft_compiled"]["compiled"] = {"whole": False}
    assert "2 (graph not whole)" in step_report.cells_table([cell], report.table)


def test_plots_are_drawn_from_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    memory = [{**_cell(BASE, "peak_bytes", ours=1.0, floor=2.0, literal_sdpa=3.0), "id": "m"}]
    results = [_run(_steps(), device="cpu"), _run(memory, "memory", "cpu")]
    found = plots.drawable(results, report.latest_cells)
    names = ("ladder", "peak-memory", "speedup-over-padding", "speedup-over-prompt", "step-against-floor")
    assert sorted(found) == [f"{name}-cpu.svg" for name in names]
    written = plots.draw(found, tmp_path)
    first = {path.name: path.read_text() for path in written}
    assert all("<svg" in text for text in first.values())
    assert {path.name: path.read_text() for path in plots.draw(found, tmp_path)} == first
    assert "![ladder-cpu](results/plots/ladder-cpu.svg)" in plots.links(found)
    assert plots.drawable([], report.latest_cells) == {}
