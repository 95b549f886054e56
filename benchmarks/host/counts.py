"""What a call does, counted: operations of PyTorch, calls of Python functions, launches. No clock is asked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts what reaches PyTorch's dispatcher below autograd, that of backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[], Any]) -> int:
    """How many operations of PyTorch a call makes."""
    with Operations() as counted:
        call()
    return counted.count


def python_calls(call: Callable[[], Any]) -> int:
    """How many functions written in Python a call enters, in this thread."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return count
