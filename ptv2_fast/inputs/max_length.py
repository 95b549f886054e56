"""How long a text may be."""

from __future__ import annotations

from transformers import PreTrainedModel

from ptv2_fast.backbone.rotary import max_rotary_length
from ptv2_fast.families.family import Family
from ptv2_fast.inputs.features import reads_text


def text_limit(backbone: PreTrainedModel, family: Family) -> int | None:
    """The most tokens and position offset together: the table of learned positions, or where rotary frequencies change.

    None where there is no limit: images and sounds become as many rows as their model has positions for, or it refuses
    them itself.
    """
    if not reads_text(family):
        return None
    if family.rotary:
        return max_rotary_length(backbone)
    size = family.num_positions(backbone)
    return None if size is None else size - family.first_position(backbone)


def check_length(backbone: PreTrainedModel, family: Family, length: int, name: str = "input_ids") -> None:
    """Refuse texts that run past the model's limit.

    Args:
        length: tokens and position offset together.
        name: what the text is called in messages.

    Raises:
        ValueError: the text is too long.
    """
    limit = text_limit(backbone, family)
    if limit is None or length <= limit:
        return
    if family.rotary:
        raise ValueError(
            f"{name} must leave the text within {limit} tokens, where the model's rotary frequencies change "
            f"and the prompt's keys do not; got {length}"
        )
    raise ValueError(
        f"{name} must leave the text's last position within the model's {limit} learned positions; "
        f"tokens and position offset come to {length}"
    )
