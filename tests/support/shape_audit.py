"""Watching every operation of a computation for tensors of a forbidden size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ShapeAudit(TorchDispatchMode):
    """Collects the operations whose outputs have a forbidden size in their shape.

    Attributes:
        hits: (operation, shape) of every output with a forbidden size that `allowed` does not let through.
        calls: how often each operation ran.
    """

    def __init__(self, *forbidden: int, allowed: Callable[[tuple[int, ...]], bool] = lambda shape: False):
        super().__init__()
        self.forbidden, self.allowed = set(forbidden), allowed
        self.hits: list[tuple[str, tuple[int, ...]]] = []
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.calls[function.overloadpacket.__name__] += 1
        for tensor in tree_leaves(output):
            if not isinstance(tensor, torch.Tensor):
                continue
            shape = tuple(tensor.shape)
            if self.forbidden & set(shape) and not self.allowed(shape):
                self.hits.append((str(function), shape))
        return output
