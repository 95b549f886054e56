"""Benchmarks lie in folders whose imports point one way, over a harness that knows none of them."""

from __future__ import annotations

import ast
import importlib.util
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from benchmarks.run import SUITES

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "benchmarks").rglob("*.py"))
MAX_LINES = 500

# Room -> the rooms that it may import besides itself. The harness is what lies at the top, except the ends.
HARNESS = "harness"
BELOW = {
    HARNESS: set(),
    "quality": {HARNESS},
    "attention": {HARNESS},
    "step": {HARNESS, "attention"},
    "decode": {HARNESS, "attention", "step"},
    "host": {HARNESS, "attention", "step"},
    "ends": {HARNESS, "step", "host", "quality"},
    "card": {HARNESS, "attention", "step", "decode", "ends"},
}
# They show what the folders found: modules of the top that may know a folder, and that no folder knows.
ENDS = {"report", "plots", "run"}


def _name(path: Path) -> str:
    """The module of a file; a package's is its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


NAMES = {_name(path) for path in SOURCES}


def _room(module: str) -> str:
    """Where a module lies: a folder, the harness, or the ends."""
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in BELOW:
        return parts[1]
    return "ends" if parts[-1] in ENDS else HARNESS


def _imports(text: str) -> set[str]:
    """The modules of benchmarks that a text imports, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in NAMES else node.module for name in inner}
    return {name for name in found if name.split(".")[0] == "benchmarks"}


IMPORTS = {_name(path): _imports(path.read_text(encoding="utf-8")) for path in SOURCES}


def test_every_folder_has_its_place():
    folders = {path.name for path in (ROOT / "benchmarks").iterdir() if list(path.glob("*.py"))}
    assert folders == BELOW.keys() - {HARNESS, "ends"}
    assert {f"benchmarks.{name}" for name in ENDS} <= NAMES


@pytest.mark.parametrize("module", sorted(IMPORTS))
def test_imports_point_down(module):
    room = _room(module)
    wrong = {name for name in IMPORTS[module] if _room(name) not in {room, *BELOW[room]}}
    assert not wrong, f"{module} of {room} imports {sorted(wrong)}"


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter(IMPORTS).prepare()


def test_what_is_imported_exists():
    assert not {name: found - NAMES for name, found in IMPORTS.items() if found - NAMES}


def test_the_walk_sees_imports_of_every_kind():
    text = "from benchmarks import step\ndef f():\n    from benchmarks.step.clock import Step\n    import torch\n"
    assert _imports(text) == {"benchmarks.step", "benchmarks.step.clock"}
    assert (_room("benchmarks.step.clock"), _room("benchmarks.record")) == ("step", HARNESS)
    assert _room("benchmarks.card.record") == "card" and _room("benchmarks.report") == "ends"
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_every_suite_is_a_module():
    assert all(importlib.util.find_spec(module) for module in SUITES.values())


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_files_stay_readable(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES, f"{len(lines)} lines"
