"""A frozen base, and all that is known of its backbone: what every way to run a call looks at."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from ptv2_fast.attention.prompt_batch import PromptBatch
from ptv2_fast.backbone.hooked import Hooked
from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.families.dimensions import Dimensions
from ptv2_fast.families.family import Family
from ptv2_fast.families.parts import check_parts
from ptv2_fast.families.registry import family_of
from ptv2_fast.step.layers import StepLayers


@dataclass(frozen=True)
class FrozenBase:
    """A frozen base and what has been found out about it; nothing in it belongs to one call.

    Attributes:
        model: the base, with its task's head if it has one.
        backbone: the base without that head.
        family: the backbone's.
        sizes: the backbone's, with a layer for every attention that may have a prompt.
        hooked: makes views of it whose attention runs through the hook.
        layers: makes views of it as a training step runs it.
    """

    model: PreTrainedModel
    backbone: PreTrainedModel
    family: Family
    sizes: Dimensions
    hooked: Hooked
    layers: StepLayers

    @classmethod
    def of(cls, model: PreTrainedModel) -> FrozenBase:
        """Find out all that is known of a base.

        Raises:
            ValueError: its family is not supported, or says of it what is not so.
        """
        backbone = backbone_of(model)
        family = family_of(backbone)
        check_parts(backbone, family)
        hooked = Hooked(backbone, own_attention=family.own_attention, with_layer_index=family.with_layer_index)
        return cls(model, backbone, family, family.sizes(backbone), hooked, StepLayers(backbone, family))

    def check_reached(self, prompts: PromptBatch) -> None:
        """Check that a forward's prompts reached every layer.

        Raises:
            RuntimeError: a layer ran without its prompt.
        """
        prompts.check_reached(type(self.backbone).__name__, self.sizes.num_layers)
