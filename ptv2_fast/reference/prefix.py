"""Prefixes that a text-book attention asks for while a whole backbone runs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class PrefixByCall:
    """Keys, values and bias that stand in front of each layer's own, handed out in the order of the layers.

    ALBERT's one layer runs again and again and some layers know no index of their own; but every layer asks once.
    """

    def __init__(self, by_layer: Mapping[int, tuple[Tensor, Tensor, Tensor | None] | None]):
        self._by_layer = by_layer
        self._calls = 0

    def next(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Return the prefix of the layer whose turn it is, None where it has none."""
        self._calls += 1
        return self._by_layer.get(self._calls - 1)
