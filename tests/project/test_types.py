"""The package's types: what a type checker says of it is part of its contract (py.typed)."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from planted_typos import plant
from ptv2_fast import forward

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
def test_a_typo_on_the_way_of_a_call_is_seen(tmp_path):
    """The files of forward/ are functions of typed arguments: nothing that they name of ours is Any."""
    planted = {}
    for module in pkgutil.iter_modules(forward.__path__, f"{forward.__name__}."):
        text, typos = plant(importlib.import_module(module.name))
        file = tmp_path / f"{module.name.rpartition('.')[2]}.py"
        file.write_text(text)
        planted[file] = typos
    assert len(planted) > 5 and all(len(typos) > 2 for typos in planted.values()), planted
    done = _mypy(*map(str, planted))
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    for file, typos in planted.items():
        seen = [line.partition(f"{file.name}:")[2] for line in errors if f"{file.name}:" in line]
        unseen = [t for t in typos if not any(e.startswith(f"{t.line}: ") and f'"{t.name}"' in e for e in seen)]
        assert not unseen, (file.name, unseen, done.stdout[-2000:])


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

_USER = """
import torch
from transformers import PreTrainedModel
from ptv2_fast import Buckets, PTuningV2Config, PTuningV2Model, StepOptions, get_ptv2_model, prompt_attention


def use(base: PreTrainedModel, q: torch.Tensor) -> None:
    model = get_ptv2_model(base, PTuningV2Config("SEQ_CLS", num_virtual_tokens=4))
    reveal_type(model)
    reveal_type(model.why_not_packed())
    reveal_type(PTuningV2Model.from_pretrained(base, "folder"))
    model.step_options = StepOptions(unpad="yes")
    prompt_attention(q, q, q, q, q, window=1.5)
    Buckets(rows="many")
"""


@pytest.mark.timeout(300)
def test_a_users_mistakes_are_seen(tmp_path):
    sample = tmp_path / "sample.py"
    sample.write_text(_USER)
    done = _mypy(str(sample))
    revealed = [line.partition("Revealed type is ")[2].strip('"') for line in done.stdout.splitlines()]
    model = "ptv2_fast.model.PTuningV2Model"
    assert [kind for kind in revealed if kind] == [model, "str | None", model], done.stdout + done.stderr
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    parts = ('"unpad" to "StepOptions"', '"window" to "prompt_attention"', "Buckets")
    assert len(errors) == len(parts), done.stdout
    assert all(part in error for part, error in zip(parts, errors, strict=True)), errors


def test_the_class_of_every_task_is_public():
    import ptv2_fast
    from ptv2_fast.task_models.classes import MODEL_CLASSES

    assert {cls.__name__ for cls in MODEL_CLASSES.values()} <= set(ptv2_fast.__all__)
    assert all(getattr(ptv2_fast, cls.__name__) is cls for cls in MODEL_CLASSES.values())


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
