"""The tables come from the files, and say so where there is nothing to say."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks import headline, predictions, report
from benchmarks.attention.cases import case_of
from benchmarks.goals import KERNEL_GOALS, standing
from benchmarks.record import ResultFile

TEXT = "# Title\n\n<!-- kernel-goals:begin -->\nold figures\n<!-- kernel-goals:end -->\n\nafter\n"


def _cell(case, **milliseconds):
    peers = {name: {"status": "timed", "ms": ms, "tflops": 400.0} for name, ms in milliseconds.items()}
    peers["flash"] = {"status": "not applicable", "reason": "takes no mask"}
    return {"id": case.id, "case": case.as_dict(), "speed_of_light_ms": 0.25, "peers": peers}


def _run(folder, cells, *, name="run.json", device="cuda", date="2026-01-01T00:00:00+00:00", suite="kernels"):
    facts = {"device": device, "card": "NVIDIA H200", "date": date, "commit": "abc", "clocks": {"sm_mhz": 1980.0}}
    result = ResultFile(folder / name, suite, ["x"], facts)
    for cell in cells:
        result.put(cell)
    result.finish("complete")


def _k1(tokens=512):
    return case_of("roberta-large", 32, tokens, 128, direction="forward")


def _row(text, goal):
    return next(line for line in text.splitlines() if line.startswith(f"| {goal} "))


def test_what_nobody_measured_is_not_measured_yet(tmp_path):
    text = report.render(TEXT, report.load(tmp_path))
    assert "old figures" not in text
    assert text.startswith("# Title\n") and text.endswith("\nafter\n")
    assert all("not measured yet" in _row(text, goal.id) for goal in KERNEL_GOALS)


def test_a_goal_shows_geomean_worst_cell_and_whether_it_is_met(tmp_path):
    _run(tmp_path, [_cell(_k1(), ours=1.0, cudnn=1.6), _cell(_k1(2048), ours=1.0, cudnn=0.9)])
    row = _row(report.render(TEXT, report.load(tmp_path)), "K1")
    assert "1.20×" in row  # sqrt(1.6 * 0.9)
    assert f"0.90× ({_k1(2048).id}, 400 TFLOP/s)" in row
    assert "**no** (1 of 2 cells)" in row
    assert "| 1 of 2 |" in row


def test_a_met_goal_says_yes(tmp_path):
    _run(tmp_path, [_cell(_k1(), ours=1.0, cudnn=1.0)])
    assert "yes (1 of 1 cells)" in _row(report.render(TEXT, report.load(tmp_path)), "K1")


@pytest.mark.parametrize(
    ("goal", "case", "times", "figure", "met"),
    [
        ("K2", case_of("t5-3b-encoder", 32, 512, 8, direction="forward"), {"ours": 2.0, "cudnn": 1.6}, 0.8, True),
        ("K3", case_of("roberta-large", 32, 512, 8, direction="backward"), {"ours": 1.0, "cudnn": 0.65}, 0.65, False),
        ("K3", case_of("t5-3b-encoder", 32, 512, 8, direction="backward"), {"ours": 1.0, "cudnn": 0.65}, 0.65, True),
        ("K4", case_of("roberta-large", 64, 128, 8, padding=0.4), {"ours_packed": 1.0, "sdpa_user": 1.7}, 1.7, True),
        ("K4", case_of("roberta-large", 32, 512, 8, padding=0.4), {"ours_packed": 1.0, "sdpa_user": 1.7}, 1.7, False),
        ("K5b", case_of("roberta-large", 32, 512, 8, peers="flex"), {"ours": 1.0, "flex_split": 1.2}, 1.2, False),
        ("K6", case_of("llama-3-8b", 8, 512, 128, causal=True), {"ours": 1.0, "sdpa_outside": 1.5}, 1.5, True),
        ("K7", case_of("qwen3-0.6b", 8, 512, 8, direction="backward"), {"ours": 2.0, "ours_prefix": 0.9}, 0.45, False),
        ("T1", case_of("roberta-large", 32, 512, 128), {"ours": 2.0, "ours_bank16": 2.04}, 1.02, True),
    ],
)  # fmt: skip
def test_each_goal_takes_its_figure_from_its_cells(goal, case, times, figure, met):
    stand = standing(next(g for g in KERNEL_GOALS if g.id == goal), [_cell(case, **times)])
    assert (stand.cells, stand.met) == (1, met)
    assert stand.worst == pytest.approx(figure)


@pytest.mark.parametrize(
    ("goal", "case"),
    [
        ("K1", case_of("roberta-large", 64, 128, 8, direction="forward")),
        ("K1", case_of("llama-3.2-1b", 32, 512, 8, causal=True, direction="forward")),
        ("K1", case_of("roberta-large", 32, 512, 8, direction="forward", dtype="fp16")),
        ("K6", case_of("llama-3-8b", 8, 512, 129, causal=True)),
        ("K7", case_of("roberta-large", 8, 512, 256, direction="backward")),
    ],
)
def test_cells_outside_a_goal_do_not_count(goal, case):
    times = {name: 1.0 for name in ("ours", "cudnn", "sdpa_outside", "ours_prefix")}
    assert standing(next(g for g in KERNEL_GOALS if g.id == goal), [_cell(case, **times)]).cells == 0


def test_a_replay_is_not_compared_with_a_launch():
    cell = _cell(_k1(), ours=0.05, cudnn=0.09)
    cell["peers"]["ours"] |= {"method": "graph", "eager_ms": 0.1}
    cell["peers"]["cudnn"] |= {"method": "events"}
    assert standing(KERNEL_GOALS[0], [cell]).worst == pytest.approx(0.9)


def test_the_newest_measurement_of_a_cell_stands(tmp_path):
    _run(tmp_path, [_cell(_k1(), ours=1.0, cudnn=2.0)], name="a.json", date="2026-02-01T00:00:00+00:00")
    _run(tmp_path, [_cell(_k1(), ours=1.0, cudnn=1.0)], name="b.json", date="2026-01-01T00:00:00+00:00")
    assert "2.00×" in _row(report.render(TEXT, report.load(tmp_path)), "K1")


def test_a_goal_keeps_its_figure_when_a_newer_run_lacks_the_peer(tmp_path):
    _run(tmp_path, [_cell(_k1(), ours=1.0, cudnn=2.0)], name="a.json", date="2026-01-01T00:00:00+00:00")
    _run(tmp_path, [_cell(_k1(), ours=0.5)], name="b.json", date="2026-02-01T00:00:00+00:00")
    results = report.load(tmp_path)
    # A ratio is taken inside one run; the table of cells shows the newest one.
    assert "2.00×" in _row(report.render(TEXT, results), "K1")
    assert [cell["peers"]["ours"]["ms"] for cell in report.latest_cells(results, "kernels")] == [0.5]


def test_the_front_page_compares_inside_one_run(tmp_path, monkeypatch):
    row = headline.Row("forward", "kernels", _k1().id, "ours", "cudnn", "cuDNN")
    gone = dataclasses.replace(row, what="gone", peer="flash")
    monkeypatch.setattr(headline, "ROWS", (row, gone))
    _run(tmp_path, [_cell(_k1(), ours=1.0, cudnn=0.5)], name="a.json", date="2026-01-01T00:00:00+00:00")
    _run(tmp_path, [_cell(_k1(), ours=0.1)], name="b.json", date="2026-02-01T00:00:00+00:00")
    results = report.load(tmp_path)
    found = headline.rows(lambda suite: report.measured_cells(results, suite))
    assert found == [["forward", "1 ms", "0.5 ms", "cuDNN", "0.50×"]]


def test_predictions_stand_beside_what_came(tmp_path, monkeypatch):
    expected = predictions.Prediction("forward", 4.0, "ms", "a.json", _k1().id, "ours", "ms")
    ratio = dataclasses.replace(expected, what="over cuDNN", predicted=2.0, unit="×", over="cudnn")
    gone = dataclasses.replace(expected, what="gone", file="b.json")
    monkeypatch.setattr(predictions, "PREDICTIONS", (expected, ratio, gone))
    _run(tmp_path, [_cell(_k1(), ours=3.0, cudnn=1.0)], name="a.json")
    assert predictions.rows(report.load(tmp_path)) == [
        ["forward", "4 ms", "3 ms", "0.75", "a.json"], ["over cuDNN", "2 ×", "3 ×", "1.50", "a.json"]
    ]  # fmt: skip


def test_every_prediction_was_measured():
    results = report.load(report.HERE / "results")
    assert [one.what for one in predictions.PREDICTIONS if one.measured(results) is None] == []


def test_a_cpu_says_nothing_about_the_goals(tmp_path):
    _run(tmp_path, [_cell(_k1(), ours=1.0, cudnn=2.0)], device="cpu")
    assert "not measured yet" in _row(report.render(TEXT, report.load(tmp_path)), "K1")


def test_cells_stand_with_all_peers_and_the_roofline(tmp_path):
    _run(tmp_path, [_cell(_k1(), ours=1.5, cudnn=1.25)])
    text = report.render("<!-- kernel-cells:begin --><!-- kernel-cells:end -->", report.load(tmp_path))
    row = _row(text, _k1().id)
    assert [cell.strip() for cell in row.split("|")][2:4] == ["0.25", "1.5"]
    assert "1.25" in row and "–" in row


def test_checks_and_sources_are_listed(tmp_path):
    check = {"id": "pytest", "status": "failed", "reason": "3 tests, 1 failures"}
    _run(tmp_path, [check], suite="parity")
    names = ("parity-checks", "sources")
    text = report.render("\n".join(f"<!-- {n}:begin --><!-- {n}:end -->" for n in names), report.load(tmp_path))
    assert "| pytest | NVIDIA H200 | failed | 3 tests, 1 failures |" in text
    assert "| run.json | parity | complete | NVIDIA H200 |" in text and "1980" in text


def test_other_json_files_are_left_alone(tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"accuracy": 1.0}))
    assert report.load(tmp_path) == []


def test_a_spoiled_result_file_is_named(tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps({"schema": 1, "suite": "kernels", "cells": []}))
    with pytest.raises(ValueError, match="bad.json: .*must be"):
        report.load(tmp_path)


def test_a_marker_without_its_end_is_an_error():
    with pytest.raises(ValueError, match="must each stand in the text once"):
        report.render("<!-- sources:begin -->", [])


def test_check_tells_stale_tables_and_writes_nothing(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(TEXT)
    words = ["--results", str(tmp_path), "--readme", str(readme)]
    assert report.main([*words, "--check"]) == 1
    assert readme.read_text() == TEXT
    assert report.main(words) == 0
    assert report.main([*words, "--check"]) == 0


def test_the_tables_of_this_checkout_are_those_of_its_result_files():
    assert report.main(["--check"]) == 0, "run python -m benchmarks.report"
