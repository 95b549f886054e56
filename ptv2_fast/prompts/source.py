"""Where a model gets an adapter's keys and values from: made anew while training, kept while nothing changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from ptv2_fast.attention.prompt_batch import LayerPrompt, LazyPrompt
from ptv2_fast.models.family import Family
from ptv2_fast.prompts.bank import made_together, stack_bank
from ptv2_fast.prompts.encoder import PromptEncoder
from ptv2_fast.prompts.keys_values import layer_prompts
from ptv2_fast.prompts.projection import LayerProjections

# Steps that any optimizer has taken. A fused step writes to parameters without raising their versions.
_steps_taken = 0


def count_step(*_: Any) -> None:
    """Note that prompts may have been written to: optimizers call this, and whoever replays one has to."""
    global _steps_taken
    _steps_taken += 1


register_optimizer_step_post_hook(count_step)


class PromptSource:
    """The keys and values that one adapter's prompts make in one backbone."""

    def __init__(self, encoder: PromptEncoder, backbone: PreTrainedModel, family: Family):
        self._encoder = encoder
        self._backbone = backbone
        self._family = family
        self._projections = LayerProjections(backbone, family, encoder.layers)
        self._kept: tuple[tuple, tuple[LayerPrompt | LazyPrompt | None, ...]] | None = None

    def __call__(self, backend: str) -> tuple[LayerPrompt | LazyPrompt | None, ...]:
        """Every layer's prompt for a backend of `prompt_attention`; the same tensors again in eval mode."""
        if self._trains():
            return self._make(backend)
        made_from = _state_of(self._encoder, self._backbone)
        if made_from is None:
            return self._make(backend)
        if self._kept is None or self._kept[0] != (made_from, backend):
            self._kept = ((made_from, backend), self._make(backend))
        return self._kept[1]

    @staticmethod
    def bank(sources: Sequence[PromptSource | None], backend: str) -> tuple[LayerPrompt | LazyPrompt | None, ...]:
        """Every layer's bank of several adapters' prompts; None stands for an entry without any.

        The sources are of one backbone; at least one is not None.
        """
        present = [source for source in sources if source is not None]
        first = present[0]
        if all([source._trains() for source in present]):
            encoders = [None if source is None else source._encoder for source in sources]
            together = made_together(encoders, first._backbone, first._family, first._projections, backend)
            if together is not None:
                return together
        made = [None if source is None else source(backend) for source in sources]
        nothing = (None,) * first._family.sizes(first._backbone).num_layers
        return stack_bank([nothing if own is None else own for own in made])

    def _trains(self) -> bool:
        """Whether prompts are made anew in this call; what was kept is then dropped."""
        if torch.is_grad_enabled() or self._encoder.training or torch.compiler.is_compiling():
            self._kept = None  # whoever trains is about to change the prompts
            return True
        return False

    def _make(self, backend: str) -> tuple[LayerPrompt | LazyPrompt | None, ...]:
        return layer_prompts(self._encoder, self._backbone, self._family, self._projections, backend)


def _state_of(encoder: nn.Module, backbone: PreTrainedModel) -> tuple | None:
    """What changes whenever the prompts are written to, or the frozen base is moved, cast or loaded anew.

    None where that cannot be seen (parameters made in inference mode).
    """
    parameters = [*encoder.parameters(), *backbone.parameters()]
    if any(p.is_inference() for p in parameters):
        return None
    return (_steps_taken, *((p._version, p.data_ptr()) for p in parameters))
