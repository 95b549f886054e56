"""DINOv2: ViT's encoder with a learned scale behind each part; some have registers behind the class token."""

from __future__ import annotations

import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone.locate import part_at
from ptv2_fast.families.vit import Vit


class Dinov2(Vit):
    # Its classifier reads the patches beside the class token.
    reads_first = False
    layers_path = "encoder.layer"
    norm_path = "norm1"

    def check(self, backbone: PreTrainedModel) -> None:
        """Refuse versions whose layers are given nothing but states, and the one class that returns feature maps.

        Raises:
            ValueError: the message names the class, and the version where that is the reason.
        """
        name = type(backbone).__name__
        if hasattr(backbone, "out_features"):
            raise ValueError(f"base must return its last states, as AutoModel's DINOv2 does; got {name}")
        if not hasattr(part_at(self.layers(backbone)[0], self.attention_path), self.key_path):
            raise ValueError(
                "base must hand on to its attention what it is called with, which DINOv2 does in later versions; got "
                f"{name} of transformers {transformers.__version__}"
            )

    def feature_tokens(self, backbone: PreTrainedModel, features: Tensor) -> int:
        """How many rows N images (B, C, H, W) become: their patches, the class token and the registers."""
        return super().feature_tokens(backbone, features) + getattr(backbone.config, "num_register_tokens", 0)
