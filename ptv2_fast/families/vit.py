"""ViT: pre-norm encoder of an image's patches behind a class token."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone.virtual_tokens import evolving_view
from ptv2_fast.families.family import Family


class Vit(Family):
    reads = "pixel_values"
    reads_first = True
    skips_unread_tokens = True
    layer_index = "layer_idx"
    norm_path = "layernorm_before"
    attention_path = "attention"

    def feature_tokens(self, backbone: PreTrainedModel, features: Tensor) -> int:
        """How many rows N images (B, C, H, W) become: their patches and the class token."""
        patch = backbone.config.patch_size
        high, wide = (patch, patch) if isinstance(patch, int) else patch
        return 1 + (features.shape[2] // high) * (features.shape[3] // wide)

    def shallow_view(self, backbone: PreTrainedModel, prompts: Tensor) -> PreTrainedModel:
        """A view of the backbone in which virtual tokens (P, D) evolve with the patches (VPT-shallow).

        They enter behind the embeddings, position embeddings and dropout included, of which they have none.
        """
        return evolving_view(backbone, prompts, f"{self.layers_path}.0", "layernorm")
