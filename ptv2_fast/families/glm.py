"""GLM and GLM-4: Llama's shape; neighbouring channels are the pairs that rotate, in the first part of each head."""

from __future__ import annotations

from torch import Tensor

from ptv2_fast.backbone import rotary
from ptv2_fast.families.llama import Llama


class Glm(Llama):
    def rotate(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Keys (..., P, Hkv, d) turned; the tables have each pair's angle in either half."""
        pairs = cos.shape[-1] // 2
        return rotary.rotate_neighbours(keys, cos[..., :pairs], sin[..., :pairs])
