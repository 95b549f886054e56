"""The package's types: what a type checker says of it is part of its contract (py.typed)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
ROOT = Path(__file__).parents[2]


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


@pytest.mark.timeout(300)
def test_public_names_have_their_own_types(tmp_path):
    """They are loaded when asked for; to a type checker they are what they are, and others are errors."""
    import ptv2_fast

    names = sorted(ptv2_fast.__all__)
    sample = tmp_path / "sample.py"
    lines = ["import ptv2_fast", *(f"reveal_type(ptv2_fast.{name})" for name in names), "ptv2_fast.get_ptv2_modell"]
    sample.write_text("\n".join([*lines, "from ptv2_fast import PTuningV2Config, get_ptv2_model", _USE]))
    done = _mypy(str(sample))
    revealed = [line.partition("Revealed type is ")[2] for line in done.stdout.splitlines() if "Revealed" in line]
    assert len(revealed) == len(names), done.stdout + done.stderr
    for name, kind in zip(names, revealed, strict=True):
        assert kind.startswith('"def (') and kind != '"def (*args: Any, **kwargs: Any) -> Any"', (name, kind)
        if isinstance(getattr(ptv2_fast, name), type):
            assert kind.endswith(f'-> {getattr(ptv2_fast, name).__module__}.{name}"'), (name, kind)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert ['"get_ptv2_modell"' in line for line in errors] == [True, False], done.stdout
    assert '"PTuningV2Config" has incompatible type "int"' in errors[1]


_USE = """
PTuningV2Config(3)
"""

_LAZY = """
import sys
import ptv2_fast
names = dir(ptv2_fast)
assert set(ptv2_fast.__all__) | {"__version__"} <= set(names) and names == sorted(set(names)), names
assert not {"torch", "transformers", "triton"} & set(sys.modules)
try:
    ptv2_fast.get_ptv2_modell
except AttributeError as error:
    print(error)
from ptv2_fast import *
assert ptv2_fast.StepOptions is StepOptions and StepOptions.__name__ == "StepOptions"
assert all(globals()[name].__name__ == name for name in ptv2_fast.__all__)
"""


def test_public_names_are_listed_and_loaded_when_asked_for():
    done = subprocess.run([sys.executable, "-c", _LAZY], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "module 'ptv2_fast' has no attribute 'get_ptv2_modell'"
