"""What the package knows of each family, against the models themselves."""

from __future__ import annotations

import pytest
import torch

import tiny_features
from batches import padded, text_rows
from ptv2_fast.families.dimensions import Dimensions
from ptv2_fast.families.registry import families, family_of
from tiny_models import (
    ENCODERS,
    FAMILIES,
    GROUPED,
    NARROW_WORDS,
    NOT_SERVED,
    WIDE_HEADS,
    WITHOUT_INDEX,
    WITHOUT_TABLE,
    literal_states,
    tiny_base,
    tiny_model,
)
from tiny_seq2seq import TINY
from tolerances import assert_differs, assert_equal


def test_every_family_is_tested():
    encoder_decoders = {tiny.model_type for tiny in TINY.values()}
    assert set(families()) == {*FAMILIES, *NOT_SERVED, *tiny_features.FAMILIES, *encoder_decoders}


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes(family):
    sizes = Dimensions.of(tiny_base(family))
    kv_heads = 2 if family in GROUPED else 4
    head_dim = 16 if family in WIDE_HEADS else 8
    assert (sizes.hidden_size, sizes.num_layers, sizes.num_heads) == (32, 2, 4)
    assert (sizes.num_kv_heads, sizes.head_dim) == (kv_heads, head_dim)
    assert (sizes.embedding_size, sizes.output_size) == (NARROW_WORDS.get(family, 32), 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_all_of_them_in_order(family):
    base = tiny_base(family, num_hidden_layers=3)
    known = family_of(base)
    whole = known.with_layer_index(base)
    layers = list(known.layers(whole))
    indices = [{m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")} for layer in layers]
    assert indices == [{0}, {1}, {2}]
    assert (known.layer_index is not None) == (family in WITHOUT_INDEX)
    # GPT-J's view has another table of angles.
    assert (whole is not base) == (family in (*WITHOUT_INDEX, "gptj"))
    if whole is not base:
        written = any(hasattr(m, "layer_idx") for m in base.modules())
        assert written == (known.layer_index is None), "the base was written to"
        batch = padded(text_rows(), "right")
        own, same = base(**batch.inputs).last_hidden_state, whole(**batch.inputs).last_hidden_state
        real = batch.attention_mask.bool()
        # Attention of their own gives way to the hook's, which adds in another order.
        assert_equal(same[real], own[real])
        assert torch.equal(same, own) or known.own_attention


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_families_do_not_see_ahead(family):
    base = tiny_base(family)
    ids = torch.randint(2, 40, (1, 6))
    changed = ids.clone()
    changed[0, -1] = 1 + ids[0, -1] % 38
    first, second = (base(x).last_hidden_state[:, :3] for x in (ids, changed))
    # Experts compute their tokens together: what one of them gets changes the others' rounding.
    same = torch.allclose(first, second, rtol=0, atol=1e-6)
    assert same == family_of(base).causal == (family not in ENCODERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_position_and_kind_of_positions(family):
    base = tiny_base(family)
    known = family_of(base)
    ids = torch.randint(2, 40, (1, 6))
    start = known.first_position(base)
    positions = torch.arange(start, start + 6)[None]
    own = base(ids).last_hidden_state
    torch.testing.assert_close(base(ids, position_ids=positions).last_hidden_state, own)
    moved = base(ids, position_ids=positions + 3).last_hidden_state
    # Rotary attention sees differences of positions only, and without a table nobody reads them.
    without = known.num_positions(base) is None
    assert torch.allclose(moved, own, atol=1e-4) == (known.rotary or without)
    assert without == (family in WITHOUT_TABLE)


def _odd(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """A subclass whose features are not what weight and bias say."""

    class Odd(kind):
        def forward(self, states):
            made = super().forward(states)
            return made * torch.linspace(0.5, 1.5, made.shape[-1], dtype=made.dtype)

    return Odd


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_that_are_not_plain_are_called_as_they_are(family):
    """A quantised or adapted layer's weight alone does not say what it computes."""
    model = tiny_model(family, "deep", exact=True)
    batch = padded(text_rows(), "right")
    plain = model(**batch.inputs).last_hidden_state
    known = family_of(model.backbone)
    for module in {one.module for layer in range(2) for one in known.projections(model.backbone, layer)}:
        module.__class__ = _odd(type(module))
    found, expected = model(**batch.inputs).last_hidden_state, literal_states(model, model.backbone, **batch.inputs)
    real = batch.attention_mask.bool()
    assert_equal(found[real], expected[real], "states")
    assert_differs(found[real], plain[real], "states")
    weights = torch.randn_like(found[real])
    prompts = model.adapters["default"].encoder.prompts
    grads = [torch.autograd.grad((states[real] * weights).sum(), prompts)[0] for states in (found, expected)]
    assert_equal(*grads, "gradient")


@pytest.mark.parametrize("family", tiny_features.FAMILIES)
def test_families_of_other_inputs_know_their_layers(family):
    base = tiny_features.tiny_base(family)
    known = family_of(base)
    sizes = known.sizes(base)
    assert (sizes.hidden_size, sizes.output_size, sizes.num_layers) == (32, 32, 2)
    assert (sizes.num_heads, sizes.num_kv_heads, sizes.head_dim) == (4, 4, 8)
    layers = known.layers(known.with_layer_index(base))
    indices = [{m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")} for layer in layers]
    assert indices == [{0}, {1}]
    attention = next(m for m in known.layers(base)[0].modules() if hasattr(m, "k_proj"))
    assert getattr(attention, "layer_idx", None) is None, "the base was written to"
    if family in tiny_features.FEATURES:
        assert known.reads == base.main_input_name == tiny_features.MAIN_INPUT[family]
