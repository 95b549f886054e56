"""A model as it is by itself: what is read off it does not depend on what its caller has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ptv2_fast.backbone.sharded_weights import device_of


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Without gradients, dropout and autocast; afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device_of(model).type, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training
