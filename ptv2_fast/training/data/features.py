"""Features: what `datasets` writes beside its columns, of which the names of class numbers are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Column -> the names of its class numbers, of the columns that hold such numbers or lists of them.

    Args:
        features: as `datasets.Features.to_dict` gives them, and as its files have them.
    """
    found = {column: _names(feature) for column, feature in features.items()}
    return {column: names for column, names in found.items() if names is not None}


def _names(feature: Any) -> list[str] | None:
    # A list of one feature is how older versions wrote sequences.
    while isinstance(feature, list) and len(feature) == 1:
        feature = feature[0]
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel":
        names = feature.get("names")
        return [str(name) for name in names] if isinstance(names, list) else None
    return _names(feature.get("feature"))


def named(values: Mapping[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
    """A record with names in the place of class numbers."""
    return {key: _decoded(value, names.get(key)) for key, value in values.items()}


def _decoded(value: Any, names: list[str] | None) -> Any:
    if names is None or value is None:
        return value
    if isinstance(value, list):
        return [_decoded(item, names) for item in value]
    if type(value) is not int:
        return value  # Somebody has changed the column behind its description.
    # A split without labels stores -1, which names no class.
    return names[value] if 0 <= value < len(names) else None
