"""Fails where the host would wait for the device."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ptv2_fast.attention import hook


class NoWaiting(TorchDispatchMode):
    """Fails on what would make the host wait for the device, or depend on what it holds."""

    FORBIDDEN = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._unique2", "aten.equal"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name.replace("::", ".") not in self.FORBIDDEN, func
        masks = args[1] if func is torch.ops.aten.index.Tensor else ()
        assert all(i is None or i.dtype != torch.bool for i in masks), "indexed by a mask"
        return func(*args, **(kwargs or {}))


def attend_without_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put something in the place of the CPU's attention, which looks at masks and boundaries as none does on CUDA."""

    def attend(q, k, v, prompt, batch, **_):
        return (q * prompt.keys.sum() + prompt.values.sum() + v.mean()).transpose(1, 2)

    monkeypatch.setattr(hook, "layer_attention", attend)
