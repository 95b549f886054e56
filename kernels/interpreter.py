"""What Triton's interpreter needs before it runs these kernels; without TRITON_INTERPRET=1 nothing is touched."""

from __future__ import annotations

import os
from typing import Any

import triton


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def repair() -> None:
    """Let the interpreter of Triton 3.6 turn scalars into integers under NumPy 2.4 and later.

    It holds every scalar as an array of one element and asks NumPy for `int(array)`, which NumPy 2.4 refuses. Triton
    3.7 asks otherwise.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or _version(triton.__version__) >= (3, 7):
        return
    import numpy
    from triton.runtime import interpreter

    if _version(numpy.__version__) < (2, 4):
        return

    patch = interpreter._patch_lang_tensor
    if getattr(patch, "reads_scalars", False):
        return

    def patch_and_read_scalars(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch_and_read_scalars.reads_scalars = True  # type: ignore[attr-defined]  # a mark for the next call
    interpreter._patch_lang_tensor = patch_and_read_scalars
