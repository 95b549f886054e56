"""The suite `quality` starts the comparison in a process of its own and says how it went."""

from __future__ import annotations

from benchmarks.quality import suite


def test_quality_says_what_it_needs(make_context):
    context = make_context()
    assert suite.run(context) == "complete"
    assert context.result.cells[0]["status"] == "not applicable" and "--data" in context.result.cells[0]["reason"]


def test_quality_goes_on_with_its_own_file(make_context, monkeypatch, tmp_path):
    seen = []

    def run(command, **options):
        seen.append(command)
        return type("Done", (), {"returncode": len(seen) - 1, "stdout": "| table |", "stderr": "quality: broken"})()

    monkeypatch.setattr(suite.subprocess, "run", run)
    context = make_context(data=tmp_path, only=("sst2",))
    assert suite.run(context) == "complete"
    assert seen[0][2] == "benchmarks.quality" and "--resume" in seen[0] and "--fast" in seen[0]
    assert seen[0][seen[0].index("--tasks") + 1 :] == ["sst2"]
    assert str(tmp_path / "quality_minilm_cpu.json") in seen[0]
    assert suite.run(context) == "red"
    assert context.result.cells[-1]["reason"] == "quality: broken"
