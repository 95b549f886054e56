"""README, the tree in CONTRIBUTING.md and the evidence in docs/choosing.md say what is there."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from benchmarks.quality.run import searched, table
from ptv2_fast.config import PTuningV2Config
from ptv2_fast.families.registry import families

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHOOSING = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")


def test_two_screens_say_what_there_is():
    assert len(README.splitlines()) <= 135
    assert f"\n{len(families())} model types, listed in [docs/families.md]" in README


def test_every_field_of_the_configuration_is_explained():
    missing = [field.name for field in dataclasses.fields(PTuningV2Config) if f"`{field.name}`" not in CHOOSING]
    assert missing == []


def test_the_tree_is_the_one_that_is_there():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = re.findall(r"```text\n(.*?)```", contributing.split("## The tree")[1], flags=re.DOTALL)[0]
    rooms = {path.parent.name for path in (ROOT / "ptv2_fast").glob("*/*.py")} - {"kernels"}
    assert [room for room in sorted(rooms) if f" {room}/" not in tree] == []
    folder = ROOT
    for line in tree.splitlines():
        inside, entries = line.startswith("  "), line.strip()
        if not inside:
            folder = ROOT / entries.split()[0]
            assert folder.is_dir(), line
            continue
        for entry in re.findall(r"[\w./]+(?:/|\.py)(?=\s)", re.split(r"\s{2,}|;", entries)[0] + " "):
            assert (folder / entry).exists(), line


@pytest.mark.parametrize(("mark", "make"), [("quality", table), ("searched", searched)])
def test_the_quality_tables_are_what_the_results_give(mark, make):
    results = json.loads((ROOT / "benchmarks" / "results" / "quality_minilm_cpu.json").read_text(encoding="utf-8"))
    assert CHOOSING.split(f"<!-- {mark} -->\n")[1].split(f"\n<!-- /{mark} -->")[0] == make(results)
