"""generate and caches: the prompt is in every step, and never in the cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from batches import padded, text_rows
from ptv2_fast.inputs.cache import CACHE
from tiny_models import (
    DECODERS,
    DISTINCT,
    INJECTIONS,
    VOCABULARY,
    literal_logits,
    literal_states,
    tiny_base,
    tiny_model,
    tiny_prompts,
)
from tolerances import assert_differs, assert_equal

EVERY = [pytest.param(family, injection, id=f"{family}-{injection}") for family in DECODERS for injection in INJECTIONS]
SOME = [p for p in EVERY if p.values[0] in DISTINCT]
NEW = 5
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def _literal_greedy(model, base, row):
    """Greedy decoding without a cache, through the literal form."""
    ids = row[None]
    for _ in range(NEW):
        states = literal_states(model, base.base_model, ids)
        ids = torch.cat([ids, literal_logits(base, states[:, -1]).argmax(-1)[:, None]], -1)
    return ids[0, len(row) :]


@pytest.mark.parametrize(("family", "injection"), EVERY)
def test_greedy_tokens_are_those_of_the_literal_form(family, injection):
    """Left-padded rows, a dynamic cache, a static one and none: the same tokens."""
    rows = text_rows(5, 2, 7)
    batch = padded(rows, "left")
    # What random weights say is another thing in each version of transformers, now and then one token for ever.
    for seed in range(5):
        model = tiny_model(family, injection, "CAUSAL_LM", seed=seed)
        base = tiny_base(family, "CAUSAL_LM", seed=seed)
        expected = torch.stack([_literal_greedy(model, base, row) for row in rows])
        bare = base.generate(**batch.inputs, **GREEDY)[:, 9:]
        if not torch.equal(expected, bare):
            break
    assert not torch.equal(expected, bare), "the prompt changes no token: the test could not fail"
    for index, row in enumerate(rows):
        assert torch.equal(model.generate(row[None], **GREEDY)[0, len(row) :], expected[index])
    variants = [{}, {"use_cache": False}, {"cache_implementation": "static"}]
    for variant in variants:
        tokens = model.generate(**batch.inputs, **GREEDY, **variant)[:, 9:]
        assert torch.equal(tokens, expected), variant


@pytest.mark.parametrize(("family", "injection"), SOME)
def test_beam_search_and_several_returned_sequences(family, injection):
    model = tiny_model(family, injection, "CAUSAL_LM")
    rows = text_rows(5, 7)
    batch = padded(rows, "left")
    options = {"num_beams": 3, "num_return_sequences": 2, **GREEDY}
    beams = model.generate(**batch.inputs, **options)[:, 9:]
    assert torch.equal(model.generate(**batch.inputs, **options, use_cache=False)[:, 9:], beams)
    for index, row in enumerate(rows):
        alone = model.generate(row[None], **options)[:, len(row) :]
        assert torch.equal(beams[2 * index : 2 * index + 2], alone)


def test_sampling_follows_the_seed():
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    batch = padded(text_rows(), "left")
    options = {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 3}

    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(**batch.inputs, **options)

    first = sample(1)
    assert first.shape == (9, 15)
    assert torch.equal(first, sample(1))
    assert not torch.equal(first, sample(2))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("family", DECODERS)
def test_prompt_lookup_decoding_gives_the_greedy_tokens(family):
    """Assisted decoding checks several candidates against the cache at once, and crops it."""
    model = tiny_model(family, "deep", "CAUSAL_LM")
    row = text_rows(4)[0].repeat(3)[None]
    # transformers 5.10 looks texts up only where there is a token that ends them.
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": VOCABULARY - 1}
    expected = model.generate(row, **options)
    found = model.generate(row, **options, prompt_lookup_num_tokens=3)
    # 5.10 may also say a token more than it was asked for, with and without prompts.
    assert torch.equal(found[:, : expected.shape[1]], expected)


@pytest.mark.parametrize(("family", "injection"), EVERY)
def test_a_second_turn_on_a_returned_cache_is_a_fresh_run(family, injection):
    model = tiny_model(family, injection, "CAUSAL_LM")
    batch = padded(text_rows(), "left")
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    first = model.generate(**batch.inputs, **options)
    more = torch.cat(text_rows(4, 4, 4, seed=9)).view(3, 4)
    ids = torch.cat([first.sequences, more], dim=-1)
    mask = torch.nn.functional.pad(batch.attention_mask, (0, ids.shape[1] - 9), value=1)
    text = {"input_ids": ids, "attention_mask": mask}
    again = model.generate(**text, **options, **{CACHE: first[CACHE]})
    fresh = model.generate(**text, **options)
    assert torch.equal(again.sequences, fresh.sequences)
    assert_equal(torch.stack(again.logits), torch.stack(fresh.logits))
    assert again[CACHE].get_seq_length() == ids.shape[1] + NEW - 1


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(("family", "injection"), SOME)
def test_text_in_pieces_is_the_whole_text(family, injection, kind):
    model = tiny_model(family, injection, "CAUSAL_LM")
    batch = padded(text_rows(5, 8), "left")
    config = model.base_model.config
    cache = DynamicCache(config=config)
    if kind == "static":
        cache = StaticCache(config=config, max_cache_len=16)
    with torch.no_grad():
        whole = model(**batch.inputs, use_cache=False).logits
        pieces, start = [], 0
        for size in (4, 3, 1, 1):
            end = start + size
            inputs = {
                "input_ids": batch.input_ids[:, start:end],
                "attention_mask": batch.attention_mask[:, :end],
                CACHE: cache,
            }
            pieces.append(model(**inputs, use_cache=True).logits)
            start = end
    real = batch.attention_mask.bool()
    assert_equal(torch.cat(pieces, dim=1)[real], whole[real])


@pytest.mark.parametrize("family", DECODERS)
def test_every_row_may_generate_with_its_own_adapter(family):
    model = tiny_model(family, "deep", "CAUSAL_LM")
    model.add_adapter("prefix", tiny_prompts("prefix", "CAUSAL_LM", length=9))
    model.eval()
    rows = text_rows(5, 2, 7)
    names = ["prefix", "default", "__base__"]
    batch = padded(rows, "left")
    for options in (GREEDY, {**GREEDY, "num_beams": 2}):
        mixed = model.generate(**batch.inputs, **options, adapter_names=names)[:, 9:]
        for index, (row, name) in enumerate(zip(rows, names, strict=True)):
            alone = model.generate(row[None], **options, adapter_names=[name])[0, len(row) :]
            assert torch.equal(mixed[index], alone), name
        bare = tiny_base(family, "CAUSAL_LM").generate(rows[2][None], **options)[0, 7:]
        assert torch.equal(mixed[2], bare)


def test_generate_leaves_the_base_alone():
    model = tiny_model("gpt2", "shallow", "CAUSAL_LM")
    base = tiny_base("gpt2", "CAUSAL_LM")
    row = text_rows(5)[0][None]
    prompted = model.generate(row, **GREEDY)
    with model.disable_adapter():
        assert torch.equal(model.generate(row, **GREEDY), base.generate(row, **GREEDY))
    assert torch.equal(model.generate(row, **GREEDY), prompted)
    assert "forward" not in vars(model.base_model)
    assert type(model.base_model) is type(base)


def test_generation_while_training_keeps_the_mode():
    model = tiny_model("llama", "deep", "CAUSAL_LM", prompt_dropout=0.5)
    row = text_rows(5)[0][None]
    expected = model.generate(row, **GREEDY)
    model.train()
    model.generate(row, **GREEDY)
    assert model.training and model.adapters.training
    model.eval()
    assert torch.equal(model.generate(row, **GREEDY), expected)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_sliding_windows_never_hide_the_prompt(injection):
    """Queries far behind the window still see every virtual token, padded or not, cached or not."""
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    model = tiny_model("qwen3", injection, "CAUSAL_LM", base_changes=window)
    rows = text_rows(12, 7)
    batch = padded(rows, "left", width=12)
    with torch.no_grad():
        logits = model(**batch.inputs).logits
        for index, row in enumerate(rows):
            alone = model(input_ids=row[None]).logits[0]
            assert_equal(batch.real(logits, index), alone)
        with model.disable_adapter():
            bare = model(input_ids=rows[0][None]).logits
        assert_differs(logits[:1, -1], bare[:, -1])
        model.adapters["default"].encoder.prompts[..., -1, :] += 1.0
        assert_differs(model(**batch.inputs).logits[:, -1], logits[:, -1])
    if injection == "deep":
        full = tiny_model("qwen3", injection, "CAUSAL_LM")(input_ids=rows[0][None]).logits
        assert_differs(logits[:1, -1], full[:, -1])
    tokens = model.generate(**batch.inputs, **GREEDY)
    assert torch.equal(model.generate(**batch.inputs, **GREEDY, use_cache=False), tokens)


def test_generate_refuses_what_needs_attention_weights():
    model = tiny_model("llama", task="CAUSAL_LM")
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model.generate(
            torch.tensor([[4, 5, 6]]), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True
        )
