"""Whether modules can be part of what is captured: a replay runs none of their Python."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

# Whose modules keep nothing beside tensors that a forward depends on, or nothing that changes.
_KNOWN_MAKERS = ("torch", "transformers", "bitsandbytes")


def why_not_layers(backbone: PreTrainedModel) -> str | None:
    """Why the host has a part in what a backbone's layers compute; None where it has none."""
    if getattr(backbone, "gradient_checkpointing", False):
        return "gradient checkpointing reads the random state, which a capture forbids"
    if any(getattr(backbone.config, name, 0.0) for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")):
        return "layers are skipped at random (layerdrop), which the host decides"
    return None


def why_not_modules(base: PreTrainedModel, adapter: nn.Module) -> str | None:
    """Why the modules that a pass runs cannot be captured; None where they can. Walks them."""
    for owner, part, makers in (("base", base, _KNOWN_MAKERS), ("adapter", adapter, (*_KNOWN_MAKERS, "ptv2_fast"))):
        for module in part.modules():
            kind, maker = type(module).__name__, type(module).__module__.split(".")[0]
            if maker not in makers:
                return f"the {owner} has a {kind} of {maker}, which may decide by what a replay cannot see"
            # In the place of a parameter: its gradient leads to others, and the next step has another one.
            beside = [value for value in vars(module).values() if isinstance(value, Tensor)]
            if beside and (part is adapter or any(value.requires_grad for value in beside)):
                return f"the {owner} has a {kind} with a tensor that is no parameter, as one that somebody computes"
    return None
