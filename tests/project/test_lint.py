"""The linter and the formatter, as `make lint` runs them: part of the suite, which every change runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ruff")
ROOT = Path(__file__).parents[2]
COMMANDS = (("check",), ("format", "--check"))


def _ruff(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ruff", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_tree_is_as_the_tool_wants_it(command):
    done = _ruff(*command, "--no-cache", "--quiet", ".")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_the_command_runs_what_is_tested_here():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    ran = [tuple(line.split("ruff ")[1].split()) for line in recipe[1].splitlines()]
    assert ran == [(*command, ".") for command in COMMANDS]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("print(list(zip([1], [2])))\n", "B905"),
        (f'print("{"a line " * 20}")\n', "E501"),
        ("import torch\nfrom ptv2_fast.kernels.tiles import load_tile\n\nprint(torch, load_tile)\n", "I001"),
        ("import torch\nfrom tiny_models import IDS\n\nprint(torch, IDS)\n", "I001"),
    ],
    ids=["a zip that drops in silence", "a long line", "our kernels among strangers", "tests' modules among strangers"],
)
def test_the_linter_can_fail(text, code):
    """Sorted as first-party: the package, the kernels under their installed name, and what tests share."""
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", str(ROOT / "tests" / "sample.py"), "-"]
    done = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True)
    assert done.returncode == 1 and f"{code} " in done.stdout, done.stdout + done.stderr


def test_the_formatter_is_of_the_version_that_is_asked_for():
    """Another minor version formats otherwise, and would turn the tree red on one machine only."""
    wanted = re.search(r'"ruff==(\d+\.\d+)\.\*"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    assert _ruff("--version").stdout.split()[1].rpartition(".")[0] == wanted
