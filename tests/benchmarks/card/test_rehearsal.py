"""The whole first plan and each variant of the second on tiny models, and what a wrong kernel leads to.

What one plan does in the same words as another is rehearsed in one of them.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from benchmarks import report
from benchmarks.card import plans
from benchmarks.card.__main__ import main
from benchmarks.record import check_schema


@pytest.fixture(scope="module")
def rehearse(tmp_path_factory):
    """Run a plan once; gives (exit status, record, seconds, folder)."""
    known = {}

    def run(name, plan, *words):
        if name not in known:
            out = tmp_path_factory.mktemp(name)
            start = time.monotonic()
            which = "first" if name in ("first", "wrong") else "second"
            common = ["--minutes", "8", "--commit", "abc", "--out", str(out), "--tiny", "--device", "cpu"]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(plans, which, lambda *_: plan)
                status = main(["--plan", which, *words, *common])
            known[name] = (status, json.loads((out / "card.json").read_text()), time.monotonic() - start, out)
        return known[name]

    return run


def _without(plan, left_out):
    return replace(plan, phases=tuple(phase for phase in plan.phases if phase not in left_out))


def _words(phase):
    """What a phase's process is told in a rehearsal, but for the name."""
    return phase.work, phase.timed, phase.beside, sorted({**phase.arguments, **phase.tiny}.items())


@pytest.fixture(scope="module")
def only_new():
    """A plan without what one of this file's plans had before; its start and its gates, which the others need, stay."""
    seen = []

    def cut(plan):
        had = [phase for phase in plan.phases if phase.work not in ("start", "gates") and _words(phase) in seen]
        seen.extend(map(_words, plan.phases))
        return _without(plan, had)

    return cut


def _check_phases(data, plan):
    """Every phase came to its end, or was left out because nothing is red; what runs beside may have been cut."""
    states = {phase["name"]: phase["state"] for phase in data["phases"]}
    for phase in plan.phases:
        wanted = {"skipped"} if phase.when == plans.RED else {"complete"} | ({"out of time"} if phase.beside else set())
        assert states.pop(phase.name) in wanted, phase.name
    assert states == {}


def _cells(data, phase):
    return [cell for cell in data["cells"] if cell["phase"] == phase]


def test_the_first_plan_is_complete(rehearse):
    status, data, seconds, out = rehearse("first", plans.first())
    assert (status, data["state"]) == (0, "complete"), (out / "failures.txt").read_text()
    check_schema(data)
    assert seconds < 240
    _check_phases(data, plans.first())
    facts = data["environment"]
    assert facts["commit"] == "abc" and facts["libtriton_sha256"] and facts["ceiling"]["tflops"] > 0
    assert sorted(path.name for path in out.iterdir()) == ["card.json", "card.log", "failures.txt"]
    assert (out / "failures.txt").read_text() == ""


def test_every_timing_phase_timed_something(rehearse):
    data = rehearse("first", plans.first())[1]
    for phase in plans.first().phases:
        if phase.timed and not phase.arguments.get("profile"):
            entries = [e for cell in _cells(data, phase.name) for e in cell.get("peers", {}).values()]
            assert any(e["status"] == "timed" or "peak_bytes" in e for e in entries), phase.name
    (profile,) = [cell for cell in _cells(data, "profile") if cell.get("kind") == "profile"]
    assert profile["status"] == "passed"


def test_the_captured_step_is_judged_right_and_was_captured(rehearse):
    data = rehearse("first", plans.first())[1]
    for phase in ("steps", "qwen3"):
        entry = next(cell["peers"]["ours_graph"] for cell in _cells(data, phase) if "peers" in cell)
        assert entry["status"] == "timed" and entry["captured"] >= 1
    late = next(cell["peers"]["floor_compiled"] for cell in _cells(data, "steps") if "peers" in cell)
    assert late["beside"]["ours"] > 0


def test_tables_are_made_from_it(rehearse):
    out = rehearse("first", plans.first())[3]
    results = report.load(out)
    assert {"parity", "kernels", "steps", "memory", "decode"} <= {data["suite"] for data in results}
    for name, section in report.SECTIONS.items():
        assert section(results), name


@pytest.mark.parametrize("variant", plans.VARIANTS)
def test_a_second_plan_is_complete(rehearse, only_new, variant):
    plan = only_new(plans.second(variant))
    status, data, seconds, out = rehearse(variant, plan, "--variant", variant)
    assert (status, data["state"]) == (0, "complete"), (out / "failures.txt").read_text()
    _check_phases(data, plan)
    assert seconds < 240
    if variant == "tune":
        assert data["rest"]["tune"]["winners"]["tables"]
        again = next(cell["peers"] for cell in _cells(data, "kernels-again") if "peers" in cell)
        assert "ours_tuned" in again and again["ours_tuned"]["errors"]["out"] < 1e-5


def test_a_wrong_kernel_turns_the_gate_red_and_is_looked_for(rehearse):
    phases = plans.first().phases
    judged = [phase.name for phase in phases].index("gates")
    # What compiles beside the gates begins before they are red, and the kernels' own tests run whatever they say.
    whatever = [phase for phase in phases if phase.work == "native" or phase in phases[:judged] and phase.beside]
    plan = _without(plans.first(), whatever)
    status, data, _, out = rehearse("wrong", plan, "--fault", "wrong-kernel")
    assert (status, data["state"]) == (1, "red")
    states = {phase["name"]: phase["state"] for phase in data["phases"]}
    assert states["gates"] == "red" and states["bisection"] == "red"
    for phase in plan.phases:
        assert phase.when != plans.GREEN or states[phase.name] == "skipped", phase.name
    assert not any(phase.timed for phase in phases[:judged])
    (verdict,) = [cell for cell in data["cells"] if cell["id"] == "bisection"]
    # The backward passes are right when they start from the right output.
    assert verdict["reason"] == (
        "forward is wrong in fp32 d 16 P 3, fp32 d 16 causal padded P 3 everywhere; no other launch heals it"
    )
    lines = (out / "failures.txt").read_text()
    assert "gates: judged-tiny-training" in lines and "bisection: bisection: wrong forward is wrong" in lines
