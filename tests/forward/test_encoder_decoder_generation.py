"""generate of encoder-decoders: the prompts are in the encoder and in every step of the decoder, never in a cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from batches import padded
from ptv2_fast.inputs.cache import CACHE
from tiny_models import INJECTIONS, tiny_prompts
from tiny_seq2seq import KINDS, STACKS, START, literal, literal_logits, pair, rows, tiny_base, tiny_model
from tolerances import assert_equal

EVERY = [pytest.param(kind, injection, id=f"{kind}-{injection}") for kind in KINDS for injection in INJECTIONS]
NEW = 5
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
TEXTS = [text for text, _ in rows()]


def _model(kind, injection, **config):
    stacks = {} if injection == "shallow" else {"stacks": STACKS}
    return tiny_model(kind, injection, **stacks, **config)


def _literal_greedy(model, base, row):
    """Greedy decoding without a cache, through the literal form."""
    ids = torch.tensor([[START]])
    for _ in range(NEW):
        states, _ = literal(model, getattr(base, "model", base), row[None], None, ids)
        ids = torch.cat([ids, literal_logits(base, states[:, -1:]).argmax(-1)], -1)
    return ids[0]


@pytest.mark.parametrize(("kind", "injection"), EVERY)
def test_greedy_tokens_are_those_of_the_literal_form(kind, injection):
    """Padding on any side, a dynamic cache, a static one and none: the same tokens."""
    model, base = _model(kind, injection), tiny_base(kind)
    expected = torch.stack([_literal_greedy(model, base, row) for row in TEXTS])
    bare = torch.stack([base.generate(row[None], **GREEDY)[0] for row in TEXTS])
    assert not torch.equal(expected, bare), "the prompt changes no token: the test could not fail"
    for index, row in enumerate(TEXTS):
        assert torch.equal(model.generate(row[None], **GREEDY)[0], expected[index])
    for side in ("left", "right", "holes"):
        batch = padded(TEXTS, side)
        for variant in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(**batch.inputs, **GREEDY, **variant), expected), (side, variant)


@pytest.mark.parametrize(("kind", "injection"), EVERY)
def test_beams_and_several_returned_sequences_are_rows_alone(kind, injection):
    model, batch = _model(kind, injection), padded(TEXTS, "left")
    options = {"num_beams": 3, "num_return_sequences": 2, **GREEDY}
    beams = model.generate(**batch.inputs, **options)
    assert torch.equal(model.generate(**batch.inputs, **options, use_cache=False), beams)
    for index, row in enumerate(TEXTS):
        assert torch.equal(model.generate(row[None], **options), beams[2 * index : 2 * index + 2])


@pytest.mark.parametrize("kind", ["t5", "bart", "mbart"])
def test_every_row_may_generate_with_its_own_adapter(kind):
    model = _model(kind, "deep")
    model.add_adapter("prefix", tiny_prompts("prefix", "SEQ_2_SEQ_LM", length=9))
    model.eval()
    names = ["prefix", "default", "__base__"]
    batch = padded(TEXTS, "left")
    for options in (GREEDY, {**GREEDY, "num_beams": 2}):
        mixed = model.generate(**batch.inputs, **options, adapter_names=names)
        assert len({tuple(row.tolist()) for row in mixed}) == 3
        for row, name, got in zip(TEXTS, names, mixed, strict=True):
            assert torch.equal(got, model.generate(row[None], **options, adapter_names=[name])[0]), name
        assert torch.equal(mixed[2], tiny_base(kind).generate(TEXTS[2][None], **options)[0])
    with pytest.raises(ValueError, match="adapter_names must name 3 rows; got 2 names"):
        model.generate(**batch.inputs, **GREEDY, adapter_names=names[:2])


@pytest.mark.parametrize(("kind", "injection"), EVERY)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_target_in_pieces_is_the_whole_target(kind, injection, cache):
    """A second forward on the cache that the first one returned, with the encoder's states or its text again."""
    model, batch = _model(kind, injection), pair("left")
    target = torch.stack([row.repeat(2)[:6] for _, row in rows()])
    inputs = batch.source.inputs
    kept = None
    if cache == "static":
        sizes = {"encoder": 9 + (5 if injection == "shallow" else 0), "decoder": 6}
        config = model.base_model.config.get_text_config(decoder=True)
        kept = EncoderDecoderCache(
            StaticCache(config=config, max_cache_len=sizes["decoder"]),
            StaticCache(config=config, max_cache_len=sizes["encoder"]),
        )
    with torch.no_grad():
        whole = model(**inputs, decoder_input_ids=target, use_cache=False).logits
        pieces, start = [], 0
        for size in (3, 2, 1):
            given = {"decoder_input_ids": target[:, start : start + size], "use_cache": True}
            output = model(**inputs, **given, **({} if kept is None else {CACHE: kept}))
            kept = output[CACHE]
            pieces.append(output.logits)
            start += size
    assert kept.get_seq_length() == 6
    assert_equal(torch.cat(pieces, dim=1), whole)
    if cache == "dynamic":
        assert isinstance(kept.self_attention_cache, DynamicCache)


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("kind", ["t5", "bart", "mbart"])
def test_given_beginnings_of_the_target_are_continued(kind, injection):
    model, batch = _model(kind, injection), padded(TEXTS, "left")
    begin = torch.tensor([[START, 7, 9]] * 3)
    tokens = model.generate(**batch.inputs, decoder_input_ids=begin, **GREEDY)
    assert torch.equal(tokens[:, :3], begin)
    for index, row in enumerate(TEXTS):
        assert torch.equal(tokens[index], model.generate(row[None], decoder_input_ids=begin[:1], **GREEDY)[0])


def test_sampling_follows_the_seed():
    model, batch = _model("t5", "deep"), padded(TEXTS, "left")

    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(**batch.inputs, do_sample=True, max_new_tokens=6, num_return_sequences=3)

    first = sample(1)
    assert first.shape == (9, 7)
    assert torch.equal(first, sample(1)) and not torch.equal(first, sample(2))


def test_generate_leaves_the_base_alone():
    for kind in ("t5", "bart", "mbart"):
        model, base = _model(kind, "shallow"), tiny_base(kind)
        row = TEXTS[0][None]
        prompted = model.generate(row, **GREEDY)
        with model.disable_adapter():
            assert torch.equal(model.generate(row, **GREEDY), base.generate(row, **GREEDY))
        assert torch.equal(model.generate(row, **GREEDY), prompted)
        assert not any("forward" in vars(module) for module in model.base_model.modules())
        assert not any(hasattr(module, "prompt_layer") for module in model.base_model.modules())


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("kind", ["t5", "bart", "mbart"])
def test_returned_encoder_states_are_those_of_the_text(kind, injection):
    model, batch = _model(kind, injection), padded(TEXTS, "left")
    options = {**GREEDY, "return_dict_in_generate": True, "output_hidden_states": True}
    states = model.generate(**batch.inputs, **options).encoder_hidden_states
    assert {tuple(one.shape) for one in states} == {(3, 9, 32)}
    with torch.no_grad():
        output = model(**batch.inputs, decoder_input_ids=torch.full((3, 1), START), output_hidden_states=True)
    for got, expected in zip(states, output.encoder_hidden_states, strict=True):
        real = batch.attention_mask.bool()
        assert_equal(got[real], expected[real])


def test_generate_refuses_what_needs_attention_weights():
    model = _model("t5", "deep")
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model.generate(TEXTS[0][None], **GREEDY, output_attentions=True, return_dict_in_generate=True)


@pytest.mark.parametrize("kind", ["t5", "bart", "mbart"])
def test_generation_while_training_keeps_the_mode(kind):
    model = _model(kind, "deep", prompt_dropout=0.5)
    expected = model.generate(TEXTS[0][None], **GREEDY)
    model.train()
    model.generate(TEXTS[0][None], **GREEDY)
    assert model.training and model.adapters.training
    model.eval()
    assert torch.equal(model.generate(TEXTS[0][None], **GREEDY), expected)
