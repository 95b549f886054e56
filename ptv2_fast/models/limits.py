"""How long a text may be."""

from __future__ import annotations

from transformers import PreTrainedModel

from ptv2_fast.models.families import Family
from ptv2_fast.models.rotary import longest_text


def check_length(backbone: PreTrainedModel, family: Family, length: int) -> None:
    """Refuse texts that run past a table of learned positions, or past where rotary frequencies change.

    Args:
        length: tokens and position offset together.

    Raises:
        ValueError: the text is too long.
    """
    if family.rotary:
        limit = longest_text(backbone)
        if limit is not None and length > limit:
            raise ValueError(
                f"input_ids must leave the text within {limit} tokens, where the model's rotary frequencies change "
                f"and the prompt's keys do not; got {length}"
            )
        return
    limit = backbone.config.max_position_embeddings - family.first_position(backbone)
    if length > limit:
        raise ValueError(
            f"input_ids must leave the text's last position within the model's {limit} learned positions; "
            f"tokens and position offset come to {length}"
        )
