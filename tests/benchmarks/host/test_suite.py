"""The suite `host`: every provider of every cell is timed and counted, and its goals are judged."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import record, report
from benchmarks.host import process
from benchmarks.host import report as host_report
from benchmarks.host import suite as host_suite
from benchmarks.host.cases import HostCase, host_cases
from benchmarks.host.parts import PARTS, parts

ROOT = Path(__file__).parents[3]
CASES = {case.id: case for case in host_cases()}


def test_a_run_is_complete(make_context):
    only = (
        "launch-forward",
        "step-tiny-bert-*-deep-*",
        "token-*-deep",
        "tasks-tiny-bert-*-prefix",
        "cpu-eval-tiny-bert-*-deep-*",
    )
    context = make_context(only=only)
    assert host_suite.run(context) == "complete"
    record.check_schema(context.result.data)
    cells = context.result.cells
    assert [cell["case"]["kind"] for cell in cells] == ["cpu-eval", "launch", "step", "token", "tasks"]
    for cell in cells:
        for entry in cell["peers"].values():
            assert entry["status"] == "timed"
            assert entry["python_calls"] > 0
    evaluation, launch, step, token, tasks = (cell["peers"] for cell in cells)
    assert launch["ours"]["launches"] == launch["ours_unrepeated"]["launches"] == launch["plain"]["launches"] == 1
    assert launch["ours"]["python_calls"] < launch["ours_unrepeated"]["python_calls"]
    assert set(step) == set(token) == set(evaluation) == {"ours", "peft", "bare"}
    assert not evaluation["ours"]["launches"]
    assert step["ours"]["launches"] and not step["peft"]["launches"]
    assert sum(step["ours"]["parts"].values()) == pytest.approx(1.0, abs=0.02)
    assert token["ours"]["launches"] == 4  # a layer's attention and what merges its parts
    assert tasks["ours_tasks16"]["operations"] >= tasks["ours"]["operations"]
    rows = host_report.goals_table(cells, report.table).splitlines()[2:]
    assert [report.UNMEASURED in row for row in rows] == [False, True, *[False] * 5, True, False, True]
    assert "step-tiny-bert" in host_report.cells_table(cells, report.table)
    assert all(goal.id in report.summary({**context.result.data, "suite": "host"}) for goal in host_report.HOST_GOALS)


def test_nothing_stands_in_for_a_device_where_the_cpu_is_it(monkeypatch):
    measured = []
    monkeypatch.setattr(process.driver, "install", lambda: measured.append("driver"))
    monkeypatch.setattr(process, "_print", lambda case, *_, **__: measured.append(case.kind))
    process.main([])
    before, behind = measured[: measured.index("driver")], measured[measured.index("driver") + 1 :]
    assert set(before) == {"cpu-eval", "cpu-step"} and set(behind) == {"launch", "step", "token", "tasks"}
    measured.clear()
    process.main([case.id for case in CASES.values() if case.on_cpu])
    assert measured and "driver" not in measured


def test_every_goal_has_cells():
    for goal in host_report.HOST_GOALS:
        assert any(goal.judged(case.as_dict()) for case in CASES.values()), goal.id
    assert len(CASES) == len(host_cases())


def test_a_process_that_fails_is_a_red_cell(make_context, monkeypatch):
    start = subprocess.Popen
    command = ["python", "-c", "import sys; print('a warning'); sys.exit('no such driver')"]
    monkeypatch.setattr(subprocess, "Popen", lambda words, **options: start([words[0], *command[1:]], **options))
    context = make_context(only=("launch-*",))
    assert host_suite.run(context) == "red"
    (cell,) = context.result.cells
    assert (cell["status"], cell["reason"]) == ("failed", "no such driver")


def test_a_run_ends_with_its_minutes(make_context):
    context = make_context(seconds=0.0)
    assert host_suite.run(context) == "out of time"


def test_time_goes_to_the_part_that_spends_it():
    def call() -> None:
        SimpleNamespace(a=[x for x in range(1000)])

    found = parts(call, 3)
    assert found == {"others": 1.0}


def test_a_kind_that_is_none_is_refused():
    with pytest.raises(ValueError, match="kind must be one of .*; got 'steps'"):
        HostCase("steps")


def test_parts_are_named_by_paths_that_exist():
    paths = [str(path) for folder in ("ptv2_fast", "kernels") for path in (ROOT / folder).rglob("*.py")]
    foreign = ("torch/", "transformers/", "autograd/")
    ends = [end for ends in PARTS.values() for end in ends if not end.startswith(foreign)]
    assert [end for end in ends if not any(end in path for path in paths)] == []
