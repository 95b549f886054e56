"""A phase that raises, hangs, dies or breaks the device costs itself alone; a killed run leaves a record and nobody."""

from __future__ import annotations

import ast
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.card import plans
from benchmarks.card.parent import Parent
from benchmarks.card.plans import Phase, Plan
from benchmarks.card.record import CardRecord

ROOT = Path(__file__).resolve().parents[3]
_NOTHING = {"arguments": {"only": ("nothing",)}}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run phases that do next to nothing, with a fault; gives the record's phases by name."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def start(phases, fault=None, seconds=120.0, parent=Parent):
        record = CardRecord(tmp_path / "out", "first", ["x"], {"device": "cpu", "commit": "abc", "date": "now"})
        plan = Plan(tuple(phases), seconds, seconds)
        state = parent(plan, device="cpu", tiny=True, fault=fault, record=record).run()
        return state, {phase["name"]: phase for phase in record.data["phases"]}, record

    return start


def _idle(*names, **options):
    """Phases that find nothing to check; the rehearsals look at the machine, which takes a second."""
    return [Phase(name, "checks", **{"limit": 30.0, "latest": 110.0, **_NOTHING, **options}) for name in names]


# Phase -> what is planted in it, its state and the reason for that.
FAULTS = {
    "first": (None, "complete", ""),
    "raises": ("raise", "failed", "RuntimeError: a planted error"),
    "dies": ("kill", "failed", "its process ended with status -9"),
    "breaks": ("broken", "complete", ""),
    # As where CUDA was touched before the fork: the phase starts over as an interpreter of its own.
    "anew": ("fresh", "complete", ""),
    # On a card kernels are compiled by processes that a phase starts, which no rehearsal on the CPU does.
    "compiles": ("pool", "complete", ""),
    "hangs": ("hang", "out of time", "ended after 3 s"),
    "last": (None, "complete", ""),
}


def test_a_fault_costs_its_phase_alone(run):
    fault = ",".join(f"{kind}:{name}" for name, (kind, _, _) in FAULTS.items() if kind)
    # Interpreters that start over take their time on a busy machine.
    phases = [phase for name in FAULTS for phase in _idle(name, limit=2.0 if name == "hangs" else 150.0, latest=250.0)]
    phases[0] = replace(phases[0], work="start")
    ended, found, record = run(phases, fault, seconds=300.0)
    assert {name: (one["state"], one.get("reason", "")) for name, one in found.items()} == {
        name: (state, reason) for name, (_, state, reason) in FAULTS.items()
    }
    assert ended == "red" and "breaks: a fresh process goes on" in record.log_path.read_text()
    assert record.data["failures"] == [
        *(f"phase {name}: {FAULTS[name][2]}" for name in ("raises", "dies")),
        # That the device was lost is worth a line, though the phase has come to its end.
        "phase breaks: the device does not answer any more, after a planted broken context",
    ]
    facts = record.data["environment"]
    assert facts["torch"] and facts["commit"] == "abc" and facts["ceiling"]["tflops"] > 0


def test_a_phase_that_is_cut_is_no_complete_run(run):
    ended, found, _ = run([*_idle("a", limit=2.0), *_idle("b")], "hang:a")
    assert found["b"]["state"] == "complete" and ended == "out of time"


def test_a_run_that_is_told_to_end_ends_the_phase_that_runs(run):
    class Told(Parent):
        def _listen(self):
            if self._now > 3.0:
                raise SystemExit(143)

    begin = time.monotonic()
    with pytest.raises(SystemExit):
        run(_idle("a"), "hang:a", parent=Told)
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    ("gates", "fault", "why"),
    [({"limit": 1.5}, "hang:gates", "out of time"), ({"latest": 0.01}, None, "skipped too late")],
)
def test_gates_that_are_not_judged_are_not_green(run, gates, fault, why):
    phases = [*_idle("a"), *_idle("gates", **gates), *_idle("look", when=plans.RED)]
    phases += [*_idle("time", timed=True, when=plans.GREEN), *_idle("whatever they say")]
    ended, found, record = run(phases, fault)
    assert ended == "red" and found["look"]["state"] == found["whatever they say"]["state"] == "complete"
    assert found["time"] == {"name": "time", "state": "skipped", "reason": "the gates are not green: nothing is timed"}
    assert record.log_path.with_name("failures.txt").read_text().startswith(f"phase gates: {why}")


def test_what_is_too_late_is_left_out_and_says_so(run):
    ended, found, _ = run([*_idle("a"), *_idle("b", latest=0.01)])
    assert found["b"]["state"] == "skipped" and "too late" in found["b"]["reason"] and ended == "out of time"


def test_what_runs_beside_is_stopped_while_something_is_timed(run):
    beside = Phase("beside", "checks", 60.0, 110.0, beside=True, **_NOTHING)
    signals = []

    class Watched(Parent):
        def _hold(self):
            super()._hold()
            signals.append([one.stopped for one in self._beside])

        def _go_on(self):
            super()._go_on()
            signals.append([one.stopped for one in self._beside])

    phases = [beside, *_idle("timed", timed=True), *_idle("after")]
    _, found, _ = run(phases, "hang:beside", seconds=60.0, parent=Watched)
    assert signals == [[], [True], [False]]
    assert found["timed"]["state"] == found["after"]["state"] == "complete"
    assert found["beside"]["state"] == "out of time"


def test_what_runs_beside_ends_where_only_timed_phases_follow(run):
    # Stopped until the end of the run it would hold memory of the device.
    left = []

    class Watched(Parent):
        def _begin_phase(self, phase, end, attempt):
            left.append((phase.name, len(self._beside)))
            return super()._begin_phase(phase, end, attempt)

    beside = Phase("beside", "checks", 60.0, 110.0, beside=True, **_NOTHING)
    phases = [beside, *_idle("first"), *_idle("b", "c", timed=True)]
    ended, found, _ = run(phases, "hang:beside", seconds=60.0, parent=Watched)
    assert left == [("beside", 0), ("first", 1), ("b", 0), ("c", 0)]
    assert found["beside"]["state"] == "out of time" and found["c"]["state"] == ended == "complete"


def _alive(token: str) -> list[str]:
    """Processes whose environment holds a token."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if token.encode() in (folder / "environ").read_bytes() and (folder / "cmdline").read_bytes():
                    found.append(folder.name)
            except OSError:
                continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes under /proc")
def test_a_killed_run_leaves_a_record_that_report_reads_and_no_process(tmp_path):
    token = uuid.uuid4().hex
    # Of the plans with something beside the gates the one that compiles least before its first cell.
    words = ["--plan", "second", "--variant", "tune", "--minutes", "4", "--commit", "abc", "--out", str(tmp_path)]
    words += ["--tiny", "--device", "cpu"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "RUN_OF_THIS_TEST": token}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.card", *words], cwd=ROOT, env=environ,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not report.load(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(random.uniform(0.0, 3.0))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    results = report.load(tmp_path)
    assert results and all(data["state"] == "running" and data["cells"] for data in results)
    report.render("<!-- parity-checks:begin --><!-- parity-checks:end -->", results)
    deadline = time.monotonic() + 30
    while (left := _alive(token)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes under /proc")
def test_a_run_that_is_told_to_end_says_that_it_was_cut_and_leaves_no_process(tmp_path):
    token = uuid.uuid4().hex
    words = ["--plan", "first", "--minutes", "4", "--commit", "abc", "--out", str(tmp_path)]
    words += ["--tiny", "--device", "cpu", "--fault", "hang:start"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "RUN_OF_THIS_TEST": token}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.card", *words], cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stdout.readline() == "phase start: running\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    data = json.loads((tmp_path / "card.json").read_text())
    assert (process.returncode, data["state"], data["failures"]) == (143, "out of time", [])
    assert _alive(token) == []


def _asked_at_import(tree: ast.AST) -> list[int]:
    """Lines that ask torch.cuda something when a module is imported: outside of functions, or among their defaults."""
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.cuda."):
            found.append(node.lineno)
        inner = ast.iter_child_nodes(node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inner = [node.args, *getattr(node, "decorator_list", [])]
        for child in inner:
            visit(child)

    visit(tree)
    return found


def test_what_phases_share_asks_nothing_of_the_device():
    """They are forked from one process: a CUDA context that was there before the fork could not be used after it."""
    folders = ("benchmarks", "ptv2_fast", "kernels")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    # Files of tests are imported by pytest alone.
    files = [path for path in files if not path.name.startswith("bench_")]
    found = {str(path): _asked_at_import(ast.parse(path.read_text(encoding="utf-8"))) for path in files}
    assert len(found) > 100 and not {name: lines for name, lines in found.items() if lines}
    assert _asked_at_import(ast.parse("x = torch.cuda.is_available()")) == [1]
    assert _asked_at_import(ast.parse("def f(n=torch.cuda.device_count()):\n    torch.cuda.init()")) == [1]
