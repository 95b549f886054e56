"""The reference: what users import stands on one of its pages, and the examples of the docstrings there run."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ptv2_fast.families import registry
from ptv2_fast.families.family import Family
from ptv2_fast.task_types import TASKS

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
# `::: name` and the options below it.
_DIRECTIVE = re.compile(r"^::: (\S+)\n((?: +.*\n)*)", flags=re.MULTILINE)
_EXAMPLE = re.compile(r"^Example:\n    ```python\n(.*?)^    ```$", flags=re.MULTILINE | re.DOTALL)
_PYTHON = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
# Every name that these have in `__all__`.
_MODULES = ("ptv2_fast", "ptv2_fast.attention", "ptv2_fast.training", "ptv2_fast.tutorials")

_DIRECTIVES = [match for page in sorted(REFERENCE.glob("*.md")) for match in _DIRECTIVE.finditer(page.read_text())]
SHOWN: dict[str, dict[str, Any]] = {
    match[1]: (yaml.safe_load(match[2]) or {}).get("options", {}) for match in _DIRECTIVES
}


@cache
def object_of(path: str) -> Any:
    """What a dotted path names: a module, or what a module has."""
    module, _, name = path.rpartition(".")
    parent = importlib.import_module(module)
    return getattr(parent, name) if hasattr(parent, name) else importlib.import_module(path)


def example_of(path: str) -> str | None:
    """The code in a docstring's section "Example"; None where there is none."""
    found = _EXAMPLE.search(inspect.getdoc(object_of(path)) or "")
    return textwrap.dedent(found[1]) if found else None


def public() -> set[str]:
    """What has a name in `__all__`, and what README, the pages and the examples import besides."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    blocks = [block for page in pages for block in _PYTHON.findall(page.read_text(encoding="utf-8"))]
    blocks += [path.read_text(encoding="utf-8") for path in (ROOT / "examples").rglob("*.py")]
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if (node.module or "").split(".")[0] == "ptv2_fast"]
    imported = {f"{node.module}.{alias.name}" for node in ours for alias in node.names}
    listed = {f"{module}.{name}" for module in _MODULES for name in importlib.import_module(module).__all__}
    assert imported - listed, "no page imports anything from a submodule"
    return {path for path in listed | imported if not inspect.ismodule(object_of(path)) and not _is_of_a_model(path)}


def _is_of_a_model(path: str) -> bool:
    """Whether it is one of the package's own families: what those have is what the class above them has."""
    found = object_of(path)
    return inspect.isclass(found) and issubclass(found, Family) and found is not Family


def test_what_users_import_stands_in_the_reference_with_an_example():
    shown = {id(object_of(path)) for path in SHOWN}
    assert len(shown) == len(_DIRECTIVES), "a name stands there twice"
    assert not [path for path in sorted(public()) if id(object_of(path)) not in shown]
    assert not [path for path in sorted(public()) if example_of(path) is None]


def test_members_that_a_page_lists_are_there():
    """What builds the pages passes over a name that is gone."""
    listed = {(path, name) for path, options in SHOWN.items() for name in options.get("members", ())}
    assert listed and not [f"{path}.{name}" for path, name in listed if not hasattr(object_of(path), name)]


def test_the_table_of_tasks_has_every_task_with_its_output():
    rows = [
        line.split(" | ") for line in (REFERENCE / "tasks.md").read_text().splitlines() if line.startswith("| [`PT")
    ]
    told = {row[1]: (re.findall(r"`(\w+)`", row[0])[0], re.findall(r"`(\w+)`", row[4])[0]) for row in rows}
    classes = importlib.import_module("ptv2_fast.task_models.classes").MODEL_CLASSES
    assert told == {name: (classes[name].__name__, task.output_class) for name, task in TASKS.items()}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", SHOWN)
def test_an_example_runs(path, tmp_path, monkeypatch):
    example = example_of(path)
    if example is None:
        pytest.skip("what a call gives, which has no example")
    if "from trl" in example:
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    # What an example registers is taken back behind it.
    monkeypatch.setattr(registry, "_registered", registry._registered)
    torch.manual_seed(0)
    exec(compile(example, path, "exec"), {"__name__": "__main__"})
