"""What the package knows of each family, against the models themselves."""

from __future__ import annotations

import pytest
import torch
from batches import padded, text_rows
from tiny_models import ENCODERS, FAMILIES, GROUPED, NARROW_WORDS, WIDE_HEADS, WITHOUT_INDEX, tiny_base, tiny_model
from tiny_seq2seq import KINDS

from ptv2_fast.models.dimensions import Dimensions
from ptv2_fast.models.families import family_of, supported_families


def test_every_family_is_tested():
    encoder_decoders = {kind.split("-")[0] for kind in KINDS}
    assert set(supported_families()) == {*FAMILIES, *encoder_decoders}


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
    whole = base if known.indexed is None else known.indexed(base)
    layers = list(known.layers(whole))
    indices = [{m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")} for layer in layers]
    assert indices == [{0}, {1}, {2}]
    assert (known.indexed is not None) == (family in WITHOUT_INDEX)
    if known.indexed is not None:
        assert not any(hasattr(m, "layer_idx") for m in base.modules()), "the base was written to"
        batch = padded(text_rows(), "right")
        assert torch.equal(whole(**batch.inputs).last_hidden_state, base(**batch.inputs).last_hidden_state)


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
    # Rotary attention sees differences of positions only.
    assert torch.allclose(moved, own, atol=1e-4) == known.rotary


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_that_are_not_plain_are_refused(family):
    """A quantised or adapted layer's weight alone does not say what it computes."""
    model = tiny_model(family, "deep")
    names = ("c_attn", "key", "k_proj", "k_lin", "qkv_proj", "Wqkv", "query_key_value")
    owner, name = next((m, n) for m in model.backbone.modules() for n in names if hasattr(m, n))

    class Odd(type(getattr(owner, name))):
        pass

    getattr(owner, name).__class__ = Odd
    with pytest.raises(ValueError, match="base must project keys and values by .*got Odd"):
        model(input_ids=torch.randint(2, 40, (1, 4)))
