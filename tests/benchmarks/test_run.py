"""The three suites run as commands do, stop on red, and keep what they have."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from benchmarks import health, record, run
from benchmarks.attention import suite as kernels_suite
from benchmarks.attention.providers import all_providers
from ptv2_fast.kernels.launch import LaunchConfig

ROOT = Path(__file__).resolve().parents[2]
PEERS = [p for p in all_providers() if p.name in ("sdpa_user", "sdpa_outside")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The three suites in one process, interpreted: exit codes, output and result files."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "checks").mkdir()
    (folder / "checks" / "test_one.py").write_text("def test_one():\n    assert 1 + 1 == 2\n")
    common = ["--device", "cpu", "--tiny", "--minutes", "3", "--tests", str(folder / "checks")]
    codes, output = {}, io.StringIO()
    with contextlib.redirect_stdout(output):
        for suite in ("kernels", "parity", "tune"):
            codes[suite] = run.main(["--suite", suite, "--out", str(folder / suite), *common])
    files = {suite: next((folder / suite).glob(f"*-{suite}-cpu.json")) for suite in codes}
    data = {suite: json.loads(path.read_text()) for suite, path in files.items()}
    return {"codes": codes, "output": output.getvalue(), "data": data, "folder": folder}


@pytest.mark.parametrize("suite", ["kernels", "parity", "tune"])
def test_a_suite_is_complete_and_green(runs, suite):
    assert runs["codes"][suite] == 0
    data = runs["data"][suite]
    record.check_schema(data)
    assert (data["suite"], data["state"]) == (suite, "complete")
    assert data["cells"]
    facts = data["environment"]
    for name in ("torch", "triton", "transformers", "peft", "commit", "date", "driver", "card", "clocks"):
        assert name in facts
    assert facts["interpreted"] and facts["torch"]


def test_kernels_records_every_peer_of_every_cell(runs):
    for cell in runs["data"]["kernels"]["cells"]:
        wanted = {p.name for p in all_providers() if cell["case"]["peers"] in p.peers}
        assert set(cell["peers"]) == wanted
        assert cell["peers"]["sdpa_user"]["status"] == "timed"
        assert cell["peers"]["sdpa_user"]["tflops"] > 0
        assert all(e.get("reason") for e in cell["peers"].values() if e["status"] == "not applicable")


def test_the_interpreter_judges_ours_and_times_nothing(runs):
    for cell in runs["data"]["kernels"]["cells"]:
        ours = cell["peers"]["ours"]
        assert ours["status"] == "untimed" and "ms" not in ours
        assert ours["errors"]["out"] < 1e-5


def test_parity_says_what_it_could_not_look_at(runs):
    cells = {cell["id"]: cell for cell in runs["data"]["parity"]["cells"]}
    assert cells["pytest"]["status"] == "passed" and "1 passed" in cells["pytest"]["reason"]
    assert cells["two-runs-bit-identical"]["status"] == "passed"
    assert cells["torch-compile-equals-eager"]["status"] == "passed"
    for name in ("cuda-graph-equals-eager", "allocator-trace", "sanitizer-memcheck", "sanitizer-racecheck"):
        assert cells[name]["status"] == "not applicable" and cells[name]["reason"]


def test_tune_writes_its_winners(runs):
    written = json.loads((runs["folder"] / "tune" / "launch_configs-cpu.json").read_text())
    assert written == runs["data"]["tune"]["winners"]
    passes = written["tables"]["0"]["single"]
    assert set(passes) == {"forward", "backward_query", "backward_text", "backward_prompt"}
    count = len(fields(LaunchConfig))
    assert written["tables"] and written["form"].count(",") + 1 == count
    assert all(len(best["config"]) == count for sizes in passes.values() for best in sizes.values())


def test_a_short_table_stands_last(runs):
    assert "K1   not measured yet" in runs["output"]
    assert runs["output"].rstrip().splitlines()[-1].startswith("complete: ")


def _planted(**changes):
    """A provider whose result is off by a little."""
    right = next(p for p in PEERS if p.name == "sdpa_user")

    def build(case, inputs):
        call = right.build(case, inputs)
        return replace(call, common=lambda out, grads: call.common(1.001 * out, grads))

    return replace(right, name="planted", build=build, **changes)


def test_a_wrong_peer_is_recorded_never_timed_and_the_run_is_red(make_context):
    context = make_context()
    assert kernels_suite.run(context, [*PEERS, _planted()]) == "red"
    assert len(context.result.cells) == 2
    for cell in context.result.cells:
        planted = cell["peers"]["planted"]
        assert planted["status"] == "wrong" and "ms" not in planted
        assert "out: relative error 1.0e-03" in planted["reason"]
        assert cell["peers"]["sdpa_user"]["status"] == "timed"


def test_a_wrong_result_of_ours_stops_the_run(make_context):
    context = make_context()
    assert kernels_suite.run(context, [*PEERS, _planted(ours=True)]) == "red"
    assert len(context.result.cells) == 1


def test_the_run_can_be_told_to_go_on(make_context):
    context = make_context(keep_going=True)
    assert kernels_suite.run(context, [*PEERS, _planted(ours=True)]) == "red"
    assert len(context.result.cells) == 2


def test_an_error_of_ours_is_red_and_one_of_a_peer_a_refusal(make_context):
    def build(case, inputs):
        raise RuntimeError("no such kernel\nand a long trace")

    context = make_context()
    assert kernels_suite.run(context, [*PEERS, replace(_planted(), build=build)]) == "complete"
    assert context.result.cells[0]["peers"]["planted"] == {
        "status": "refused", "reason": "RuntimeError: no such kernel"
    }  # fmt: skip
    context = make_context()
    assert kernels_suite.run(context, [replace(_planted(ours=True), build=build)]) == "red"
    assert context.result.cells[0]["peers"]["planted"]["status"] == "failed"


def test_red_is_an_exit_status(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels_suite, "all_providers", lambda: [*PEERS, _planted()])
    words = ["--suite", "kernels", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    assert run.main(words) == 1
    data = json.loads(next(tmp_path.glob("*.json")).read_text())
    record.check_schema(data)
    assert data["state"] == "red"


def test_only_names_the_cells(make_context):
    context = make_context(only=("*causal*",))
    assert kernels_suite.run(context, PEERS) == "complete"
    assert [cell["case"]["causal"] for cell in context.result.cells] == [True]


def test_a_run_stops_before_its_minutes_are_over(make_context):
    context = make_context(seconds=1.0)
    start = time.monotonic()
    assert kernels_suite.run(context, PEERS) == "out of time"
    assert context.result.cells == [] and time.monotonic() - start < 1.0


def test_a_killed_run_keeps_its_cells(make_context):
    seen = []

    def build(case, inputs):
        seen.append(case)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return PEERS[0].build(case, inputs)

    context = make_context()
    with pytest.raises(KeyboardInterrupt):
        kernels_suite.run(context, [replace(PEERS[0], build=build)])
    data = json.loads(context.result.path.read_text())
    record.check_schema(data)
    assert data["state"] == "running" and len(data["cells"]) == 1


def test_a_cell_that_cannot_be_measured_is_a_row_and_the_others_go_on(make_context, monkeypatch):
    seen = []

    def measure(case, context, providers):
        seen.append(case.id)
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"id": case.id, "case": case.as_dict(), "peers": {}}

    monkeypatch.setattr(kernels_suite, "measure_cell", measure)
    context = make_context()
    assert kernels_suite.run(context, PEERS) == "complete"
    assert [cell.get("status") for cell in context.result.cells] == ["out of memory", None]


def test_a_broken_device_ends_a_run_red_with_its_record_whole(tmp_path, monkeypatch, capsys):
    def build(case, inputs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(kernels_suite, "all_providers", lambda: [replace(_planted(ours=True), build=build)])
    monkeypatch.setattr(health, "answers", lambda device: False)
    words = ["--suite", "kernels", "--device", "cpu", "--tiny", "--commit", "abc", "--out", str(tmp_path)]
    assert run.main(words) == 1
    data = json.loads(next(tmp_path.glob("*.json")).read_text())
    record.check_schema(data)
    assert data["state"] == "red" and data["cells"][0]["status"] == "failed"
    assert "illegal memory access" in data["cells"][0]["reason"]
    assert "does not answer any more" in capsys.readouterr().out


def test_a_run_that_cannot_name_its_commit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.environment.commit", lambda: None)
    with pytest.raises(SystemExit, match="--commit must name"):
        run.main(["--suite", "kernels", "--device", "cpu", "--tiny", "--out", str(tmp_path)])


def test_gates_are_judged_in_every_dtype_before_anything_is_timed(make_context, monkeypatch):
    context = make_context()
    context.device = torch.device("cuda")
    dtypes = [case.dtype for case in kernels_suite.gate_cases(context)]
    assert set(dtypes) == {"bf16", "fp16", "fp32"} and len(dtypes) == 15
    done = replace(context, done=frozenset(f"gate-{case.id}" for case in kernels_suite.gate_cases(context)))
    assert kernels_suite.gate_cases(done) == []


def test_attention_alone_is_measured_without_transformers():
    code = "import sys; sys.modules.update(transformers=None, peft=None)\n"
    code += "from benchmarks.attention import parity_suite, suite, tune_suite"
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


def test_an_unknown_suite_is_refused():
    with pytest.raises(SystemExit):
        run.arguments(["--suite", "nothing"])
