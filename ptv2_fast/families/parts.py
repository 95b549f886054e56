"""Whether the parts that a family names are where it says, in a backbone that somebody wraps."""

from __future__ import annotations

from transformers import PreTrainedModel

from ptv2_fast.backbone.locate import part_at
from ptv2_fast.families.family import Family


def check_parts(backbone: PreTrainedModel, family: Family) -> None:
    """Refuse a backbone that has no such parts: without this the first forward would stumble over them.

    Nothing is run, so that a path to another part than the one that is meant stays unseen.

    Raises:
        ValueError: the message names the family, the backbone and what is not there.
    """
    try:
        layers, paths = family.layers(backbone), family.attention_paths(backbone)
        names = _names_of_keys(family)
        for path in paths:
            attention = part_at(backbone, path)
            for name in names:
                part_at(attention, name)
        if family.norm_path is not None and type(family).attention_input is Family.attention_input:
            for layer in layers:
                part_at(layer, family.norm_path)
        expected = family.sizes(backbone).num_layers
    except AttributeError as error:
        raise ValueError(
            f"base must have its parts where its family, {family!r}, says; {type(backbone).__name__} has not: {error}"
        ) from error
    if len(paths) != expected:
        raise ValueError(
            f"base must have an attention for each of the {expected} layers of its sizes; its family, {family!r}, "
            f"names {len(paths)} in {type(backbone).__name__}"
        )


def _names_of_keys(family: Family) -> tuple[str, ...]:
    """What the family looks for in an attention module, apart from what code of its own does."""
    is_own = type(family).projections is not Family.projections
    return () if is_own else (family.key_path, family.value_path)
