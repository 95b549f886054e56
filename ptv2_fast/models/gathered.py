"""Weights that are there only while their layer runs: sharded over processes, or offloaded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
else:
    FSDPModule = DTensor = ()


def gathered_by(modules: Iterable[nn.Module]) -> str | None:
    """Who brings the weights of some modules while they run, and takes them away again; None where they stay.

    The one place that decides this. FSDP2 swaps a module's class and parameters, DeepSpeed's ZeRO-3 marks its
    parameters by `ds_id`, and offloaded ones wait on the device "meta". Each treats all parameters of a module alike,
    so the first one says it.

    Args:
        modules: a backbone and its layers, say.
    """
    for module in modules:
        first = next(module.parameters(), None)
        if isinstance(module, FSDPModule) or isinstance(first, DTensor):
            return "FSDP2"
        if hasattr(first, "ds_id"):
            return "DeepSpeed ZeRO-3"
        if first is not None and first.is_meta:
            return "offloading"
    return None
