"""The frozen linear maps that make a layer's keys and values, as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Projection:
    """x -> x weight^T + bias.

    Attributes:
        weight: (F, D), any strides: a view of the base's parameter.
        bias: (F,) or None.
    """

    weight: Tensor
    bias: Tensor | None


def linear_projection(module: nn.Module) -> Projection:
    """The projection that an nn.Linear is.

    Raises:
        ValueError: the module is something else, a quantised or adapted layer for instance, whose weight alone does
            not say what it computes.
    """
    if type(module) is not nn.Linear:
        raise ValueError(f"base must project keys and values by torch.nn.Linear; got {type(module).__name__}")
    return Projection(module.weight, module.bias)
