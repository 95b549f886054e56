"""The package's types: what a type checker says of it is part of its contract (py.typed)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
ROOT = Path(__file__).parents[1]


def _mypy(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mypy", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.timeout(300)
def test_package_and_kernels_are_clean():
    done = _mypy()
    assert done.returncode == 0, done.stdout + done.stderr


_SAMPLE = """
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = 3


def undeclared(model: nn.Module) -> int:
    return model.encoder.layer[0].width


def declared(layer: Layer) -> str:
    return layer.width


def loose(layer):
    return layer
"""


@pytest.mark.timeout(300)
def test_only_attributes_that_no_module_declares_are_any(tmp_path):
    """And the check can fail: a declared attribute keeps its type, and functions need theirs."""
    sample = tmp_path / "sample.py"
    sample.write_text(_SAMPLE)
    done = _mypy(str(sample))
    lines = [line for line in done.stdout.splitlines() if ": error: " in line]
    codes = [line.rpartition("[")[2] for line in lines]
    assert codes == ["return-value]", "no-untyped-def]"], done.stdout + done.stderr
    assert 'got "int", expected "str"' in lines[0]
