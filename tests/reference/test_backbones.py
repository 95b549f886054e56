"""What the literal forms know of each family: without prompts they are the backbone itself."""

from __future__ import annotations

import pytest
import torch

from batches import padded, text_rows
from ptv2_fast.reference.backbones import layer_kind, layers_of
from ptv2_fast.reference.literal import literal_deep, literal_prefix, literal_shallow
from tiny_models import FAMILIES, WINDOW, WINDOWED, tiny_base, wide_window
from tolerances import assert_differs, assert_equal

LENGTHS = (9, 6)


def _without_prompts(backbone, injection: str, **inputs):
    if injection == "deep":
        return literal_deep(backbone, {}, **inputs)
    if injection == "prefix":
        return literal_prefix(backbone, {}, {}, **inputs)
    width = backbone.get_input_embeddings().weight.shape[1]
    return literal_shallow(backbone, torch.zeros(0, width, dtype=backbone.dtype), **inputs)


@pytest.mark.parametrize("injection", ["deep", "shallow", "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_prompts_every_form_is_the_backbone(family, injection):
    """Embeddings, layers, windows, softcaps, tables and norms stand where the model has them."""
    backbone = tiny_base(family, exact=True)
    batch = padded(text_rows(*LENGTHS), "right")
    real = batch.attention_mask.bool()
    with torch.no_grad():
        expected = backbone(**batch.inputs).last_hidden_state[real]
        # transformers takes some softmaxes and cosines in float32 whatever the dtype.
        assert_equal(_without_prompts(backbone, injection, **batch.inputs)[real], expected, dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_there_are_as_many_layers_as_the_configuration_says(family):
    backbone = tiny_base(family, num_hidden_layers=3)
    assert len(layers_of(backbone)) == 3
    kinds = {layer_kind(backbone, index) for index in range(3)}
    assert ("sliding_attention" in kinds) == (family in WINDOWED)


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_counts_tokens_and_not_padding(family):
    backbone = tiny_base(family, exact=True)
    rows = text_rows(*LENGTHS)
    assert max(map(len, rows)) > WINDOW + 1
    prompts = torch.randn(2, 3, 32, dtype=torch.float64)
    batch = padded(rows, "holes", width=12)
    wide = tiny_base(family, exact=True, **wide_window(family))
    with torch.no_grad():
        states = literal_deep(backbone, prompts, **batch.inputs)
        for index, row in enumerate(rows):
            alone = literal_deep(backbone, prompts, row[None])[0]
            assert_equal(batch.real(states, index), alone)
        assert_differs(literal_deep(wide, prompts, rows[0][None]), literal_deep(backbone, prompts, rows[0][None]))
