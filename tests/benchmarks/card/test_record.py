"""The record of a card's minutes: lines of phases become one file that tables are made from."""

from __future__ import annotations

import json

import pytest

from benchmarks import report
from benchmarks.attention.cases import case_of, gate_cases
from benchmarks.attention.inputs import make_inputs
from benchmarks.card import bisection
from benchmarks.card.__main__ import _without_folders, arguments, before
from benchmarks.card.channel import Heard, Lines
from benchmarks.card.record import CardRecord, found_in
from benchmarks.step.cases import StepCase
from benchmarks.untried import PATHS, untried
from ptv2_fast.kernels import launch, row_backward
from ptv2_fast.kernels.gradients import Needs
from ptv2_fast.kernels.problem import Problem

FACTS = {"device": "cuda", "commit": "abc", "date": "2026-01-01T00:00:00+00:00"}


@pytest.fixture
def record(tmp_path):
    return CardRecord(tmp_path / "out", "first", ["x"], dict(FACTS))


def _kernel_cell(**milliseconds):
    case = case_of("roberta-large", 32, 512, 128, direction="forward")
    peers = {name: {"status": "timed", "ms": ms, "tflops": 300.0} for name, ms in milliseconds.items()}
    return {"id": case.id, "case": case.as_dict(), "peers": peers}


def _step_cell(**entries):
    case = StepCase("bert-base", 32, 128, 20, 0.4)
    return {"id": case.id, "case": case.as_dict(), "peers": {n: {"status": "timed", **e} for n, e in entries.items()}}


def test_lines_arrive_whole_however_they_are_written(tmp_path):
    path = tmp_path / "lines"
    heard = Heard(path)
    assert list(heard) == []
    lines = Lines(path, "kernels")
    lines.put({"id": "one", "peers": {}})
    assert list(heard) == [{"cell": {"id": "one", "peers": {}}, "suite": "kernels"}]
    with open(path, "a") as file:
        file.write('{"end": "comp')
        file.flush()
        assert list(heard) == []
        file.write('lete"}\n')
    assert list(heard) == [{"end": "complete"}] and list(heard) == []


def test_a_number_that_is_none_is_refused_where_it_is_sent(tmp_path):
    with pytest.raises(ValueError):
        Lines(tmp_path / "lines", "kernels").put({"id": "one", "ms": float("nan")})


def test_three_files_are_all_that_comes_back(record, tmp_path):
    record.phase("gates", state="complete")
    record.cell("parity", "gates", {"id": "judged", "status": "passed"})
    record.close("complete")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["card.json", "card.log", "failures.txt"]


def test_a_cards_cells_stand_in_the_tables_of_their_suites(record, tmp_path):
    record.environment({"card": "NVIDIA H200", "commit": None})
    record.cell("kernels", "kernels", _kernel_cell(ours=1.0, cudnn=1.2))
    record.cell("parity", "gates", {"id": "judged-x", "status": "passed", "reason": "fine"})
    results = report.load(tmp_path / "out")
    assert {data["suite"] for data in results} == {"kernels", "parity"}
    assert "1.20×" in report.goals_table(report.latest_cells(results, "kernels"))
    assert "| judged-x | NVIDIA H200 | passed | fine |" in report.checks_table(results)
    assert "| card.json | kernels | running | NVIDIA H200 |" in report.sources_table(results)


def test_a_cell_grows_and_a_late_peer_is_compared_within_its_rounds(record, tmp_path):
    record.cell("steps", "steps", _step_cell(ours={"ms": 2.0}, ours_graph={"ms": 1.0}, peft={"ms": 3.0}))
    late = {"ms": 3.0, "beside": {"ours_graph": 1.5}}
    record.cell("steps", "steps", _step_cell(ours={"ms": 2.0}, ours_graph={"ms": 1.0}, peft_compiled=late))
    (cell,) = record.data["cells"]
    assert set(cell["peers"]) == {"ours", "ours_graph", "peft_compiled"}
    row = next(r for r in report.step_goals_table(report.load(tmp_path / "out")).splitlines() if r.startswith("| S1 "))
    assert "| 2.00× |" in row


def test_what_is_red_stands_in_the_list_once(record, tmp_path):
    cell = _step_cell(ours={"status": "wrong", "reason": "gradient"}, peft={"status": "failed", "reason": "no"})
    for _ in range(2):
        record.cell("steps", "steps", cell)
    record.phase("decode", state="failed", reason="a planted error")
    lines = (tmp_path / "out" / "failures.txt").read_text().splitlines()
    assert lines == [f"steps: {cell['id']}: ours wrong gradient", "phase decode: a planted error"]
    assert record.state(out_of_time=False) == "red"


@pytest.mark.parametrize(
    ("state", "status", "red"),
    [
        ("complete", "passed", False),
        ("complete", "wrong", True),
        ("out of time", "passed", False),
        ("out of time", "failed", True),
        ("out of time", None, True),
        ("failed", None, True),
        ("failed", "passed", True),
        ("skipped", None, True),
    ],  # fmt: skip
)
def test_gates_are_red_unless_all_that_they_judged_is_right(record, state, status, red):
    assert not record.gates_are_red
    record.phase("gates", state="running")
    assert not record.gates_are_red
    if status:
        record.cell("parity", "gates", {"id": "judged", "status": status})
    record.phase("gates", state=state)
    assert record.gates_are_red is red


@pytest.mark.parametrize("state", ["out of time", "skipped"])
def test_gates_that_nobody_judged_are_red_everywhere(record, tmp_path, state):
    record.phase("gates", state=state, reason="why")
    assert record.state(out_of_time=False) == "red"
    assert (tmp_path / "out" / "failures.txt").read_text() == f"phase gates: {state} why\n"


@pytest.mark.parametrize(
    ("phase", "state", "variant"),
    [
        ("gates", "failed", "kernels"),
        ("gates", "out of time", "kernels"),
        ("native", "failed", "kernels"),
        ("kernels", "failed", "kernels"),
        ("flex", "failed", "kernels"),
        ("llama", "failed", "steps"),
        ("memory", "failed", "steps"),
        ("decode", "failed", "steps"),
        ("compile-bert", "failed", "tune"),
        ("llama", "out of time", "tune"),
    ],  # fmt: skip
)
def test_a_phase_that_died_without_a_cell_decides_the_second_call_too(record, tmp_path, phase, state, variant):
    record.phase(phase, state=state, reason="its process ended with status -9")
    assert before(tmp_path / "out" / "card.json")[0] == variant


def test_a_phase_left_out_for_time_is_no_complete_run(record):
    record.phase("kernels", state="complete")
    assert record.state(out_of_time=False) == "complete"
    record.phase("bisection", state="skipped", reason="the gates are green: nothing to look for")
    assert record.state(out_of_time=False) == "complete"
    record.phase("memory", state="skipped", reason="too late: 400 s into the run")
    assert record.state(out_of_time=False) == "out of time"


@pytest.mark.parametrize(
    ("suite", "status", "variant"),
    [
        ("parity", "failed", "kernels"),
        ("steps", "wrong", "steps"),
        ("decode", "failed", "steps"),
        ("steps", "passed", "tune"),
    ],  # fmt: skip
)
def test_the_first_call_decides_the_second(record, tmp_path, suite, status, variant):
    record.cell(suite, "x", {"id": "one", "status": status, "reason": "why"})
    record.fail("native: failed test tests/kernels/test_a.py::test_b[1]: no gradient")
    told, found = before(tmp_path / "out" / "card.json")
    assert told == variant and found["failed_tests"] == ["tests/kernels/test_a.py::test_b[1]"]
    assert before(None) == ("tune", {})


def _row(kernel_pass, case, launch, status):
    return {"pass": kernel_pass, "case": case.as_dict(), "launch": launch, "status": status}


def test_a_bisection_says_where_a_pass_is_wrong_and_what_heals_it():
    half, single = (next(iter(gate_cases(dtype))) for dtype in ("bf16", "fp32"))
    rows = [_row("backward_text", half, "present", "wrong"), _row("backward_text", half, "one stage", "passed")]
    rows += [_row("backward_text", half, "4 warps", "wrong"), _row("backward_text", single, "present", "passed")]
    rows += [_row("forward", half, "present", "passed")]
    assert bisection.verdict_of(rows) == (
        "backward_text is wrong in bf16 d 64 padded P 17 and right in fp32 d 64 padded P 17; right with one stage"
    )
    assert "no other launch heals it" in bisection.verdict_of(rows[:1])
    assert bisection.verdict_of(rows[4:]).startswith("every pass alone is right")


def test_what_a_card_has_run_leaves_the_list():
    assert untried([]) == list(PATHS)
    cell = _kernel_cell(ours=1.0, cudnn=1.0)
    run = {"suite": "kernels", "environment": {"device": "cuda"}, "cells": [cell]}
    left = {path.name for path in untried([run])}
    assert "cuDNN attention" not in left and "flash attention" in left
    assert untried([{**run, "environment": {"device": "cpu"}}]) == list(PATHS)


@pytest.mark.parametrize("words", ["--fault raise:steps", "--tiny --fault odd", "--fault raise --tiny"])
def test_faults_are_for_rehearsals_and_have_a_place(words, capsys):
    with pytest.raises(SystemExit):
        arguments(["--plan", "first", "--commit", "abc", "--out", "x", *words.split()])
    assert "fault" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "kept"),
    [("/a/b", "b"), ("b/", "b"), ("--out=/a/b", "--out=b"), ("--tiny", "--tiny"), ("bert-*-B8", "bert-*-B8")],
)
def test_where_a_machine_keeps_its_files_is_not_recorded(word, kept):
    assert _without_folders(word) == kept


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_minutes_are_positive(minutes, capsys):
    with pytest.raises(SystemExit):
        arguments(["--plan", "first", "--commit", "abc", "--out", "x", "--minutes", minutes])
    assert "--minutes must be" in capsys.readouterr().err


def test_a_first_call_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        arguments(["--plan", "second", "--commit", "abc", "--out", "x", "--after", "nowhere/card.json"])
    assert "--after must be the card.json of a first call; got 'nowhere/card.json'" in capsys.readouterr().err


def test_the_commit_must_be_given(capsys):
    with pytest.raises(SystemExit):
        arguments(["--plan", "first", "--out", "x"])
    assert "--commit" in capsys.readouterr().err


def test_the_record_on_disk_is_whole_after_each_result(record, tmp_path):
    record.cell("kernels", "kernels", _kernel_cell(ours=1.0))
    assert json.loads((tmp_path / "out" / "card.json").read_text())["state"] == "running"


def test_a_second_attempt_adds_to_what_the_first_one_found(record):
    rows = [{"forward": {"64": {"config": [1]}}}, {"forward": {"128": {"config": [2]}}}]
    for row in rows:
        record.rest("tune", {"winners": {"form": "x", "tables": {"90": {"half": row}}}, "calls": {}})
    tables = found_in(record.data)["winners"]["tables"]
    assert tables == {"90": {"half": {"forward": {"64": {"config": [1]}, "128": {"config": [2]}}}}}


def test_gates_judge_the_kernel_of_short_rows_at_both_head_sizes():
    judged = set()
    for case in gate_cases("bf16"):
        made = make_inputs(case, "cpu")
        with launch.record(90):
            form = Problem.of(made.q, made.k, made.v, made.prompt_k[None], made.prompt_v[None]).form
            if row_backward.is_chosen(form, Needs(query=True, text=True, prompt=True), 4 * 132):
                judged.add((case.d, case.padding > 0, case.P))
    assert judged == {(64, True, 20), (128, False, 0)}
