"""What is repaired in Triton's interpreter, and when."""

from __future__ import annotations

from types import SimpleNamespace

import numpy
import pytest
import triton
from triton.runtime import interpreter as triton_interpreter

from ptv2_fast.kernels import interpreter


@pytest.fixture
def patched(monkeypatch) -> list[str]:
    """Names that Triton's own patch has set, with the patch replaced by one that records."""
    names: list[str] = []

    def patch(tensor, scope):
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data))
        names.append("__index__")

    monkeypatch.setattr(triton_interpreter, "_patch_lang_tensor", patch)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(numpy, "__version__", "2.4.6")
    return names


def test_reads_a_scalar_held_in_an_array(patched):
    interpreter.repair()
    interpreter.repair()
    tensor, scope = type("tensor", (), {}), SimpleNamespace(set_attr=setattr)
    triton_interpreter._patch_lang_tensor(tensor, scope)
    assert patched == ["__index__"]
    scalar = tensor()
    scalar.handle = SimpleNamespace(data=numpy.array([3]))
    assert list(range(scalar)) == [0, 1, 2]


@pytest.mark.parametrize("sound", [("triton", "3.7.1"), ("numpy", "2.3.5"), ("environment", "0")], ids=lambda x: x[0])
def test_leaves_a_sound_interpreter_alone(patched, monkeypatch, sound):
    name, value = sound
    if name == "environment":
        monkeypatch.setenv("TRITON_INTERPRET", value)
    else:
        monkeypatch.setattr({"triton": triton, "numpy": numpy}[name], "__version__", value)
    before = triton_interpreter._patch_lang_tensor
    interpreter.repair()
    assert triton_interpreter._patch_lang_tensor is before
