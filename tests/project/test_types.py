"""The package's types: what a type checker says of it is part of its contract (py.typed)."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from planted_typos import Typo, plant
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
def test_only_attributes_that_no_module_declares_are_any(said):
    """And the check can fail: a declared attribute keeps its type, and functions need theirs."""
    lines = [line for line in said["sample_of_modules"] if ": error: " in line]
    codes = [line.rpartition("[")[2] for line in lines]
    assert codes == ["return-value]", "no-untyped-def]"], said
    assert 'got "int", expected "str"' in lines[0]


@pytest.mark.timeout(300)
def test_a_typo_on_the_way_of_a_call_is_seen(said, planted):
    """The files of forward/ are functions of typed arguments: nothing that they name of ours is Any."""
    assert len(planted) > 5 and all(len(typos) > 2 for _, typos in planted.values()), planted
    for name, (_, typos) in planted.items():
        seen = [line.partition(f"{name}.py:")[2] for line in said[name] if ": error: " in line]
        unseen = [t for t in typos if not any(e.startswith(f"{t.line}: ") and f'"{t.name}"' in e for e in seen)]
        assert not unseen, (name, unseen, said[name])


@pytest.mark.timeout(300)
def test_public_names_have_their_own_types(said):
    """They are loaded when asked for; to a type checker they are what they are, and others are errors."""
    import ptv2_fast

    names = sorted(ptv2_fast.__all__)
    lines = said["sample_of_names"]
    revealed = [line.partition("Revealed type is ")[2] for line in lines if "Revealed" in line]
    assert len(revealed) == len(names), lines
    for name, kind in zip(names, revealed, strict=True):
        assert kind.startswith('"def (') and kind != '"def (*args: Any, **kwargs: Any) -> Any"', (name, kind)
        if isinstance(getattr(ptv2_fast, name), type):
            assert kind.endswith(f'-> {getattr(ptv2_fast, name).__module__}.{name}"'), (name, kind)
    errors = [line for line in lines if ": error: " in line]
    assert ['"get_ptv2_modell"' in line for line in errors] == [True, False], lines
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


@pytest.fixture(scope="module")
def planted() -> dict[str, tuple[str, list[Typo]]]:
    """The files of forward/ by their names, with typos, and those."""
    modules = (
        importlib.import_module(one.name) for one in pkgutil.iter_modules(forward.__path__, "ptv2_fast.forward.")
    )
    return {module.__name__.rpartition(".")[2]: plant(module) for module in modules}


@pytest.fixture(scope="module")
def said(planted, tmp_path_factory) -> dict[str, list[str]]:
    """What is said of each sample; one run for all of them, for most of a run reads what they import."""
    import ptv2_fast

    names = (f"reveal_type(ptv2_fast.{name})" for name in sorted(ptv2_fast.__all__))
    lines = ["import ptv2_fast", *names, "ptv2_fast.get_ptv2_modell", "from ptv2_fast import PTuningV2Config", _USE]
    texts = {name: text for name, (text, _) in planted.items()}
    texts |= {"sample_of_modules": _SAMPLE, "sample_of_names": "\n".join(lines), "sample_of_a_user": _USER}
    folder = tmp_path_factory.mktemp("samples")
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    done = _mypy(*(str(folder / f"{name}.py") for name in texts))
    found = {name: [line for line in done.stdout.splitlines() if f"{name}.py:" in line] for name in texts}
    assert all(found.values()), done.stdout + done.stderr
    return found


@pytest.mark.timeout(300)
def test_a_users_mistakes_are_seen(said):
    lines = said["sample_of_a_user"]
    revealed = [line.partition("Revealed type is ")[2].strip('"') for line in lines]
    model = "ptv2_fast.model.PTuningV2Model"
    assert [kind for kind in revealed if kind] == [model, "str | None", model], lines
    errors = [line for line in lines if ": error: " in line]
    parts = ('"unpad" to "StepOptions"', '"window" to "prompt_attention"', "Buckets")
    assert len(errors) == len(parts), lines
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
assert not {"torch", "transformers", "triton"} & set(sys.modules)
"""


def test_public_names_are_listed_and_loaded_when_asked_for():
    done = subprocess.run([sys.executable, "-c", _LAZY], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "module 'ptv2_fast' has no attribute 'get_ptv2_modell'"
    import ptv2_fast

    given: dict[str, object] = {}
    exec("from ptv2_fast import *", given)
    assert all(given[name].__name__ == name and given[name] is getattr(ptv2_fast, name) for name in ptv2_fast.__all__)
