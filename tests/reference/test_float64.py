"""Models in true float64: the same function, and exact where double() alone is not."""

from __future__ import annotations

import pytest
import torch

from ptv2_fast.reference.float64 import to_exact_float64
from tiny_models import FAMILIES, tiny_base


def _shift_error(model) -> float:
    """Rotary attention sees differences of positions only; how far is the model from that?"""
    ids = torch.arange(2, 11)[None]
    positions = torch.arange(9)[None]
    plain, shifted = (model(ids, position_ids=positions + n)[0] for n in (0, 7))
    return ((plain - shifted).norm() / plain.norm()).item()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_exact_float64_is_shift_invariant_where_double_is_not(make_backbone, family):
    assert _shift_error(make_backbone(family, exact=True)) < 1e-12
    assert _shift_error(make_backbone(family, exact=False).double()) > 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_float64_is_the_same_function(family):
    ids = torch.arange(2, 11)[None]
    with torch.no_grad():
        expected, output = (tiny_base(family, exact=exact)(ids)[0] for exact in (False, True))
    assert output.dtype == torch.float64
    assert (output - expected).norm() / output.norm() < 1e-5


def test_other_rotary_kinds_are_refused(make_backbone):
    scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    model = make_backbone("llama", exact=False, rope_parameters=scaled)
    with pytest.raises(ValueError, match="rotary_emb.*linear"):
        to_exact_float64(model)
