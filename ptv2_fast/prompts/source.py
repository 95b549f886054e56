"""Where a model gets an adapter's keys and values from: they are made anew each time that they are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ptv2_fast.attention.prompt_batch import LayerPrompt, LazyPrompt
from ptv2_fast.backbone.hooked import Hooked
from ptv2_fast.backbone.sharded_weights import device_of, dtype_of
from ptv2_fast.families.family import Family
from ptv2_fast.prompts.bank import made_together, stack_bank
from ptv2_fast.prompts.encoder import PromptEncoder
from ptv2_fast.prompts.keys_values import layer_prompts
from ptv2_fast.prompts.projection import LayerProjections


class PromptSource:
    """The keys and values that one adapter's prompts make in one backbone.

    Attributes:
        encoder: the prompts.
    """

    def __init__(self, encoder: PromptEncoder, backbone: PreTrainedModel, family: Family, hooked: Hooked):
        self.encoder = encoder
        self._backbone = backbone
        self._family = family
        self._hooked = hooked
        self._projections = LayerProjections(backbone, family, encoder.layers)

    def __call__(self, backend: str) -> tuple[LayerPrompt | LazyPrompt | None, ...]:
        """Every layer's prompt for a backend of `prompt_attention`."""
        return layer_prompts(
            self.encoder, self._backbone, self._family, self._projections, backend, hooked=self._hooked
        )

    @property
    def trains(self) -> bool:
        """Whether the prompts are in training mode: dropout gives other ones each time."""
        return self.encoder.training

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        """The device that the backbone computes on, and the dtype of its weights."""
        return device_of(self._backbone), dtype_of(self._backbone)

    @staticmethod
    def bank(sources: Sequence[PromptSource | None], backend: str) -> tuple[LayerPrompt | LazyPrompt | None, ...]:
        """Every layer's bank of several adapters' prompts; None stands for an entry without any.

        The sources are of one backbone; at least one is not None.
        """
        first = next(source for source in sources if source is not None)
        encoders = [None if source is None else source.encoder for source in sources]
        together = made_together(encoders, first._backbone, first._family, first._projections, backend)
        if together is not None:
            return together
        nothing = (None,) * first._projections.num_layers
        return stack_bank([nothing if source is None else source(backend) for source in sources])
