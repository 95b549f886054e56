"""Families that differ from others in what a test says."""

from __future__ import annotations

import copy
from typing import Any

from ptv2_fast.families.family import Family


def changed(family: Family, **attributes: Any) -> Family:
    """A family with other attributes, or other methods, which are functions without `self`."""
    other = copy.copy(family)
    vars(other).update(attributes)
    return other


def one_by_one(*_: Any) -> None:
    """What several layers at once give where they must be asked one by one."""
