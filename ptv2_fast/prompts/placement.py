"""Where an adapter's prompts stand beside a text: in its rows or in its layers, and how far its positions shift."""

from __future__ import annotations

from ptv2_fast.config import PTuningV2Config
from ptv2_fast.families.family import Family


def is_inline(config: PTuningV2Config, family: Family) -> bool:
    """Whether virtual tokens see the text, so that they have to be rows of its batch: shallow ones on a model whose
    text sees in both directions."""
    return config.injection == "shallow" and not family.causal


def text_offset(config: PTuningV2Config, family: Family) -> int:
    """How far the text's positions shift; rotary ones need no room for a shallow prompt."""
    return 0 if config.injection == "shallow" and family.rotary else config.text_offset


def stack_offset(config: PTuningV2Config, stack: str) -> int:
    """How far the positions of a stack of an encoder-decoder shift: by the offset of a prompt in its self-attention."""
    prompted = config.injection != "shallow" and stack in config.prompted_stacks
    return (config.position_offset or 0) if prompted else 0
