"""The frozen maps that make a layer's keys and values: plain tensors where that is all there is, else the module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ptv2_fast.backbone.float8_bases import differentiable


# Equal by identity: comparing weights means nothing, and the compiler of torch 2.11 hashes what is made and called.
@dataclass(frozen=True, eq=False)
class Projection:
    """States (..., D) to some of the F features that a module of the base makes of them.

    Attributes:
        module: maps (..., D) to all its features.
        weight: (F, D), any strides: x -> x weight^T + bias is what the module computes for these features. None where
            its weight alone does not say so: a quantized, adapted or hooked module, which is called as it is.
        bias: (F,) or None.
        in_place: weight and bias are views of the base's parameters, not copies: whoever keeps their addresses reads
            what the base computes with.
        pick: all features of the module -> those of the projection; None for all. Of use without a weight.
    """

    module: nn.Module
    weight: Tensor | None = None
    bias: Tensor | None = None
    in_place: bool = True
    pick: Callable[[Tensor], Tensor] | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., F)."""
        if self.weight is not None:
            return F.linear(states, self.weight, self.bias)
        made = differentiable(self.module, states)
        return made if self.pick is None else self.pick(made)

    def rows(self, start: int, end: int) -> Projection:
        """The map of a whole module to its features start..end - 1 alone."""
        if self.weight is None:
            return replace(self, pick=lambda made: made[..., start:end])
        return replace(self, weight=self.weight[start:end], bias=None if self.bias is None else self.bias[start:end])

    def part(self, sizes: tuple[int, int, int], index: int) -> Projection:
        """The map to features [:, index] of a whole module whose features are `sizes` (heads, parts, head size).

        They do not lie one stride apart, so a weight is copied.
        """
        if self.weight is None:
            return replace(self, pick=lambda made: made.unflatten(-1, sizes)[..., index, :].flatten(-2))
        weight = self.weight.unflatten(0, sizes)[:, index].flatten(0, 1)
        bias = None if self.bias is None else self.bias.unflatten(0, sizes)[:, index].flatten()
        return replace(self, weight=weight, bias=bias, in_place=False)


def linear_projection(module: nn.Module) -> Projection:
    """The projection to all features of a module: nn.Linear, transformers' Conv1D, or whatever stands in for one."""
    if not _is_plain(module):
        return Projection(module)
    # Conv1D stores its weight as (in, out).
    weight = module.weight.T if type(module) is Conv1D else module.weight
    return Projection(module, weight, module.bias)


def _is_plain(module: nn.Module) -> bool:
    """Whether weight and bias alone say what a module computes.

    Not so for subclasses (bitsandbytes) and wrappers (LoRA), for weights that are tensors of another kind (torchao,
    DTensor), and where hooks bring the weights or change what comes out (offloading, DeepSpeed).
    """
    if type(module) not in (nn.Linear, Conv1D) or "forward" in module.__dict__:
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    return all(type(p) is nn.Parameter for p in (module.weight, module.bias) if p is not None)
