"""The frozen linear maps that make a layer's keys and values, as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Projection:
    """x -> x weight^T + bias.

    Attributes:
        weight: (F, D), any strides.
        bias: (F,) or None.
        in_place: weight and bias are views of the base's parameters, not copies: whoever keeps their addresses reads
            what the base computes with.
    """

    weight: Tensor
    bias: Tensor | None
    in_place: bool = True

    def rows(self, start: int, end: int) -> Projection:
        """The map to outputs start..end - 1 alone."""
        return Projection(self.weight[start:end], None if self.bias is None else self.bias[start:end], self.in_place)


def linear_projection(module: nn.Module) -> Projection:
    """The projection that an nn.Linear is.

    Raises:
        ValueError: the module is something else, a quantised or adapted layer for instance, whose weight alone does
            not say what it computes.
    """
    if type(module) is not nn.Linear:
        raise ValueError(f"base must project keys and values by torch.nn.Linear; got {type(module).__name__}")
    return Projection(module.weight, module.bias)
