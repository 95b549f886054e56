"""Gradient checkpointing of a frozen base: activations computed again in backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class Recomputation(nn.Module):
    """What a PTuningV2Model knows of gradient checkpointing; mixed into it."""

    def _check_checkpointing(self) -> None:
        holders = (self.backbone, *self._family.layers(self.backbone)) if self.training else ()
        functions = [m._gradient_checkpointing_func for m in holders if getattr(m, "gradient_checkpointing", False)]
        if any(getattr(function, "keywords", {}).get("use_reentrant") for function in functions):
            raise ValueError(
                "gradient checkpointing must be non-reentrant: prompts reach the layers beside the inputs that the "
                "reentrant kind tracks; pass use_reentrant=False"
            )

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute the base's activations in backward; gradients stay the same."""
        chosen = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if chosen["use_reentrant"]:
            raise ValueError("use_reentrant must be False: the reentrant kind loses the prompts' gradients")
        if hasattr(self.base_model, "activation_checkpointing_enable"):
            self.base_model.activation_checkpointing_enable(chosen, **kwargs)
        else:
            self.base_model.gradient_checkpointing_enable(chosen, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)
