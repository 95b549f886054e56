"""What an encoder-decoder's decoder may be masked with, and what its configuration may say."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from ptv2_fast import PTuningV2Config, get_ptv2_model
from ptv2_fast.inputs.cache import CACHE
from tiny_seq2seq import KINDS, T5_SERVED, pair, tiny_base, tiny_model
from tolerances import assert_equal

INJECTIONS = ("deep", "prefix", "shallow")
SOME = [(kind, injection) for kind in ("t5", "bart", "mbart") for injection in INJECTIONS]


def whole(mask: Tensor, *, additive: bool) -> Tensor:
    """(B, 1, M, M) of a mask (B, M): causal, and each token at least sees itself."""
    length = mask.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None]
    seen = (seen | torch.eye(length, dtype=torch.bool))[:, None]
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min) if additive else seen


@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize(("kind", "injection"), SOME)
def test_a_whole_mask_of_the_decoder_is_served(kind, injection, additive):
    """The same padding as a (B, M) mask; in front too where distances alone count, a cache kept or not."""
    model = tiny_model(kind, injection)
    batch = pair("left", "right")
    real = batch.target.attention_mask.bool()
    expected = model(**batch.inputs, use_cache=False).logits[real]
    for side in ("right", "left") if kind == "t5" else ("right",):
        batch = pair("left", side)
        inputs = {**batch.inputs, "decoder_attention_mask": whole(batch.target.attention_mask, additive=additive)}
        for use_cache in (True, False):
            found = model(**inputs, use_cache=use_cache).logits[batch.target.attention_mask.bool()]
            assert_equal(found, expected, f"{side}, {use_cache}")


@pytest.mark.parametrize(("kind", "injection"), SOME)
def test_a_whole_mask_goes_on_with_a_cache(kind, injection):
    model, batch = tiny_model(kind, injection), pair("left", "right")
    inputs, ids = dict(batch.inputs), batch.target.input_ids
    expected = model(**{**inputs, "decoder_attention_mask": torch.ones_like(ids)}).logits
    mask = whole(torch.ones_like(ids), additive=False)
    first = model(**{**inputs, "decoder_input_ids": ids[:, :5], "decoder_attention_mask": mask[:, :, :5, :5]})
    rest = {"decoder_input_ids": ids[:, 5:], "decoder_attention_mask": mask[:, :, 5:]}
    second = model(**{**inputs, **rest, CACHE: first[CACHE]})
    assert_equal(torch.cat([first.logits, second.logits], dim=1), expected, "logits")


@pytest.mark.skipif(not T5_SERVED, reason="this transformers' T5 has an attention of its own")
def test_padding_around_a_target_is_served_while_a_cache_is_kept():
    model, batch = tiny_model("t5"), pair("left", "right")
    real = batch.target.attention_mask.bool()
    expected = model(**batch.inputs, use_cache=False).logits[real]
    ids, mask = (torch.nn.functional.pad(x, (2, 1)) for x in (batch.target.input_ids, batch.target.attention_mask))
    found = model(**{**batch.inputs, "decoder_input_ids": ids, "decoder_attention_mask": mask})
    assert_equal(found.logits[mask.bool()], expected, "logits")


def test_a_whole_mask_of_the_encoder_is_refused_by_shape():
    model, batch = tiny_model("bart"), pair()
    wrong = whole(batch.source.attention_mask, additive=False)
    with pytest.raises(ValueError, match=r"^attention_mask must have shape \(B, N\)"):
        model(**{**batch.inputs, "attention_mask": wrong})


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_that_says_decoder_is_that_of_both_stacks(kind):
    """Published configurations of encoder-decoders say is_decoder=True; their encoders are none the less encoders."""
    torch.manual_seed(0)
    said = tiny_base(kind, is_decoder=True)
    silent = tiny_base(kind)
    config = PTuningV2Config("SEQ_2_SEQ_LM", num_virtual_tokens=3)
    models = [get_ptv2_model(base, config).eval() for base in (said, silent)]
    models[1].load_state_dict(models[0].state_dict())
    batch = pair()
    assert_equal(models[0](**batch.inputs).logits, models[1](**batch.inputs).logits, "logits")


def test_a_stack_alone_that_is_a_decoder_is_still_refused():
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, is_decoder=True
    )
    with pytest.raises(ValueError, match="base must be an encoder; got BertModel configured with is_decoder=True"):
        get_ptv2_model(transformers.BertModel(config), PTuningV2Config("FEATURE_EXTRACTION"))


def test_an_encoder_decoder_that_is_not_listed_is_not_said_to_be_tried():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.PegasusConfig(vocab_size=9, d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8, **sizes)
    with pytest.raises(ValueError, match="it was not tried: an encoder-decoder must be of a listed family itself"):
        get_ptv2_model(transformers.PegasusForConditionalGeneration(config), PTuningV2Config("SEQ_2_SEQ_LM"))
