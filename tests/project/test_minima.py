"""The oldest versions that are promised: README, pyproject.toml and `make minima` name the same ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def _variable(name: str) -> list[str]:
    value = re.search(rf"^{name} \??:?= ((?:.*\\\n)*.*)$", MAKEFILE, flags=re.MULTILINE)[1]
    return value.replace("\\\n", " ").split()


def test_minima_runs_with_what_pyproject_asks_for_at_least():
    dependencies = re.search(r"^dependencies = \[\n(.*?)^\]", PYPROJECT, flags=re.DOTALL | re.MULTILINE)[1]
    asked = dict(re.findall(r'"([\w-]+)>=([\d.]+)', dependencies))
    installed = dict(word.split("==") for word in _variable("OLDEST"))
    assert installed.keys() == asked.keys() and len(asked) == 4

    def release(version: str) -> list[int]:
        numbers = [int(number) for number in version.split(".")]
        return numbers + [0] * (3 - len(numbers))

    assert {name: release(version) for name, version in installed.items()} == {
        name: release(version) for name, version in asked.items()
    }


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_pages_promise_the_same(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    (python,) = _variable("OLDEST_PYTHON")
    oldest = re.search(r'^requires-python = ">=([\d.]+)"', PYPROJECT, flags=re.MULTILINE)[1]
    assert python == f"python{oldest}" and f"Python {oldest} or newer" in text
    if page == "README.md":
        asked = dict(re.findall(r'"(torch|triton|transformers)>=([\d.]+)', PYPROJECT))
        assert all(f"{name} {version} or newer" in text for name, version in asked.items()), asked


def test_the_tests_of_minima_are_there():
    tests = _variable("OLDEST_TESTS")
    assert len(tests) > 10 and all((ROOT / test).exists() for test in tests)
