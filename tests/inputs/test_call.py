"""What is read of a call, and what is refused: the same for every way that a call may run."""

from __future__ import annotations

import pytest
import torch
import transformers

from batches import text_rows
from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.families.registry import family_of
from ptv2_fast.inputs.cache import CACHE
from ptv2_fast.inputs.call import FeatureCall, StackedCall, TextCall, named_inputs, read_call
from tiny_features import features
from tiny_features import tiny_base as feature_base
from tiny_models import tiny_base, tiny_model
from tiny_seq2seq import tiny_model as tiny_seq2seq

IDS = torch.stack(text_rows(6, 6, 6))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
PACKED = torch.arange(2, 16)[None]  # 5, 2 and 7 tokens
RESTARTING = torch.cat([torch.arange(n) for n in (5, 2, 7)])[None]
BOUNDS = torch.tensor([0, 5, 7, 14], dtype=torch.int32)


def _read(base, *, stacks=False, **inputs):
    backbone = backbone_of(base)
    return read_call(named_inputs(inputs, base.config), family_of(backbone), base, backbone, stacks=stacks)


def _cache(base, tokens: int, **kinds):
    cache = transformers.DynamicCache(config=base.config, **kinds)
    base(input_ids=torch.full((3, tokens), 5), past_key_values=cache)
    return cache


def test_a_text_alone():
    call = _read(tiny_base("bert"), input_ids=IDS, attention_mask=None, output_hidden_states=True)
    assert isinstance(call, TextCall) and (call.rows, call.tokens, call.length()) == (3, 6, 6)
    assert call.is_first and call.past_length == 0
    assert (call.mask, call.position_ids, call.packing) == (None, None, None)
    assert set(call.inputs) == {"input_ids", "output_hidden_states"} and call.inputs["input_ids"] is IDS
    assert call.positions(0, 0, IDS.device) is None
    assert call.positions(2, 3, IDS.device).tolist() == [list(range(5, 11))] * 3


def test_a_padded_text_of_words():
    words = torch.randn(3, 6, 32)
    call = _read(tiny_base("bert"), inputs_embeds=words, attention_mask=MASK, token_type_ids=IDS * 0)
    assert (call.rows, call.tokens) == (3, 6) and call.mask is MASK and call.packing is None
    assert set(call.inputs) == {"inputs_embeds", "token_type_ids"}
    assert call.positions(0, 0, IDS.device)[0].tolist() == [0, 0, 0, 1, 2, 3]


def test_a_mask_of_all_pairs_says_no_positions():
    mask = torch.ones(3, 1, 6, 6).tril().bool()
    call = _read(tiny_base("llama", "CAUSAL_LM"), input_ids=IDS, attention_mask=mask)
    assert call.mask is mask and call.positions(0, 0, IDS.device) is None


def test_positions_of_the_caller_are_the_callers():
    positions = torch.arange(3, 9)[None]
    call = _read(tiny_base("bert"), input_ids=IDS, position_ids=positions)
    assert call.position_ids is positions and "position_ids" not in call.inputs and call.packing is None
    assert torch.equal(call.positions(0, 4, IDS.device), positions + 4)


def test_packed_rows_are_seen_by_positions_and_by_boundaries():
    base = tiny_base("roberta")
    restarting = _read(base, input_ids=PACKED, position_ids=RESTARTING + 2)
    stated = _read(base, input_ids=PACKED, cu_seq_lens_q=BOUNDS, cu_seq_lens_k=BOUNDS, max_length_q=7, max_length_k=7)
    for call in (restarting, stated):
        assert call.packing.cu_seqlens.tolist() == BOUNDS.tolist() and call.packing.row_of.tolist() == [0, 0, 0]
        # The longest row is what has to fit, and each counts from the family's first position.
        assert call.packing.longest == 7 and call.length() == 7
        assert torch.equal(call.position_ids, RESTARTING + 2)
        assert set(call.inputs) == {"input_ids"}


def test_a_padded_batch_is_not_packed_whatever_its_positions():
    positions = torch.tensor([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0, 1, 2, 2, 2, 2]])
    assert _read(tiny_base("bert"), input_ids=IDS, position_ids=positions, attention_mask=MASK).packing is None


def test_what_a_cache_holds_counts():
    base = tiny_base("llama", "CAUSAL_LM")
    mask = torch.cat([MASK, torch.ones(3, 2, dtype=torch.long)], dim=1)
    call = _read(base, input_ids=IDS[:, :2], attention_mask=mask, **{CACHE: _cache(base, 6)})
    assert (call.tokens, call.past_length, call.length(), call.is_first) == (2, 6, 8, False)
    assert call.positions(0, 0, IDS.device).tolist() == [[4, 5], [6, 7], [3, 4]]
    # Positions that restart are those of another text's end, not of packed rows.
    going_on = torch.tensor([[6, 7], [6, 6], [6, 7]])
    call = _read(base, input_ids=IDS[:, :2], position_ids=going_on, **{CACHE: _cache(base, 6)})
    assert call.packing is None


def test_an_empty_cache_is_one():
    call = _read(tiny_base("llama", "CAUSAL_LM"), input_ids=IDS, **{CACHE: transformers.DynamicCache()})
    assert (call.past_length, call.length(), call.is_first) == (0, 6, False)


def test_the_length_of_a_static_cache_is_the_devices():
    base = tiny_base("llama", "CAUSAL_LM")
    cache = transformers.StaticCache(config=base.config, max_cache_len=12)
    base(input_ids=IDS, past_key_values=cache)
    call = _read(base, input_ids=IDS[:, :1], attention_mask=torch.ones(3, 7), **{CACHE: cache})
    expected = None if isinstance(call.past_length, torch.Tensor) else 7
    assert int(call.past_length) == 6 and call.length() == expected


def test_the_mask_that_a_window_cut_is_whole_again():
    base = tiny_base("mistral", "CAUSAL_LM")
    cache = transformers.StaticCache(config=base.config, max_cache_len=12)
    base(input_ids=IDS, past_key_values=cache)
    positions = torch.full((3, 1), 6)
    call = _read(base, input_ids=IDS[:, :1], attention_mask=torch.ones(3, 4), position_ids=positions, **{CACHE: cache})
    if isinstance(call.past_length, int):
        assert call.mask.tolist() == [[0, 0, 0, 1, 1, 1, 1]] * 3


def test_images_and_sounds_have_rows_alone():
    base = feature_base("whisper", "backbone")
    given = features("whisper")
    call = _read(base, **given, attention_mask=torch.ones(3, 14))
    assert isinstance(call, FeatureCall) and call.rows == 3
    assert set(call.inputs) == {"input_features"}, "the mask of a spectrogram is read by nobody"


def test_an_encoder_decoder_is_read_stack_by_stack():
    model = tiny_seq2seq("t5")
    call = _read(model.base_model, stacks=True, input_ids=IDS, decoder_input_ids=IDS)
    assert (
        isinstance(call, StackedCall) and call.rows is None and set(call.inputs) == {"input_ids", "decoder_input_ids"}
    )


def test_inputs_are_named_as_transformers_names_them():
    config = tiny_base("bert").config
    cache = transformers.DynamicCache()
    assert named_inputs({"cache": cache, "labels": None}, config) == {CACHE: cache}
    assert named_inputs({"return_dict": False}, config) == {"return_dict": True}
    assert named_inputs({"return_dict": True}, config) == {}
    with pytest.raises(ValueError, match=f"{CACHE} must be given once; got cache and past_key_values"):
        named_inputs({"cache": cache, "past_key_values": cache}, config)


WORDS = torch.randn(3, 6, 32)
# What no way takes, and what each says of it.
NO_TEXTS = {
    "none": ({}, "exactly one of input_ids and inputs_embeds must be given"),
    "both": ({"input_ids": IDS, "inputs_embeds": WORDS}, "exactly one of input_ids and inputs_embeds must be given"),
    "list": ({"input_ids": IDS.tolist()}, "input_ids must be a tensor; got list"),
    "floats": ({"input_ids": IDS.float()}, r"input_ids must be integers of shape \(B, N\); got torch.float32 \(3, 6\)"),
    "one row": ({"input_ids": IDS[0]}, r"input_ids must be integers of shape \(B, N\); got torch.int64 \(6,\)"),
    "one row of words": ({"inputs_embeds": WORDS[0]}, r"inputs_embeds must have shape \(B, N, D\); got \(6, 32\)"),
    "no rows": ({"input_ids": IDS[:0]}, "input_ids must hold at least one row and one token; got 0 rows of 6 tokens"),
    "no tokens": ({"input_ids": IDS[:, :0]}, "input_ids must hold at least one row and one token; got 3 rows of 0"),
    "elsewhere": ({"input_ids": IDS.to("meta")}, "input_ids must be on the model's device cpu; got meta"),
    "short mask": (
        {"input_ids": IDS, "attention_mask": MASK[:, :4]},
        r"attention_mask must have shape \(3, 6\): 3 rows, 0 cached tokens and 6 new ones .*; got \(3, 4\)",
    ),
    "mask of another batch": (
        {"input_ids": IDS, "attention_mask": MASK[:2]},
        r"attention_mask must have shape \(3, 6\): .*; got \(2, 6\)",
    ),
    "list of masks": ({"input_ids": IDS, "attention_mask": MASK.tolist()}, "attention_mask must be a tensor; got list"),
    "mask elsewhere": (
        {"input_ids": IDS, "attention_mask": MASK.to("meta")},
        "attention_mask must be on the model's device cpu; got meta",
    ),
    "two caches": ({"input_ids": IDS, "cache": (), "past_key_values": ()}, f"{CACHE} must be given once"),
    "weights": ({"input_ids": IDS, "output_attentions": True}, "output_attentions must be False"),
    "head mask": ({"input_ids": IDS, "head_mask": torch.ones(2, 4)}, "head_mask must be None"),
    "names": ({"input_ids": IDS, "adapter_names": ["default"] * 2}, "adapter_names must name 3 rows; got 2 names"),
    "a name": ({"input_ids": IDS, "adapter_names": "default"}, "one name per row; got the string 'default'"),
    "unknown": ({"input_ids": IDS, "adapter_names": ["x"] * 3}, "adapter must be one of default; got 'x'"),
}
# What only a text has that an encoder-decoder counts itself.
NO_PLACES = {
    "short positions": ({"position_ids": torch.arange(5)[None]}, r"position_ids must have shape \(3, 6\), beside"),
    "positions": ({"position_ids": torch.arange(6)}, r"position_ids must have shape \(3, 6\), beside"),
    "list": ({"position_ids": [0, 1]}, "position_ids must be a tensor; got list"),
    "types": ({"token_type_ids": IDS[:, :3]}, r"token_type_ids must have shape \(3, 6\), beside"),
    "boundaries": ({"cu_seq_lens_q": BOUNDS.long()}, "cu_seq_lens_q must be int32 of shape"),
    "boundaries of rows": ({"cu_seq_lens_q": BOUNDS}, "cu_seq_lens_q must stand beside one row"),
}


def _each(cases, *ways):
    return [pytest.param(way, *case, id=f"{way}-{name}") for way in ways for name, case in cases.items()]


def _model(way: str):
    """A model whose calls run that way, whose encoder-decoder is asked for its decoder's tokens too."""
    if way == "encoder_decoder":
        return tiny_seq2seq("bart"), {"decoder_input_ids": IDS}
    return tiny_model("bert", "shallow" if way == "inline" else "deep"), {}


@pytest.mark.parametrize(("way", "inputs", "message"), _each(NO_TEXTS, "plain", "inline", "encoder_decoder"))
def test_every_way_refuses_what_is_no_text_by_the_same_words(way, inputs, message):
    model, beside = _model(way)
    with pytest.raises(ValueError, match=message):
        model(**inputs, **beside)


@pytest.mark.parametrize(("way", "inputs", "message"), _each(NO_PLACES, "plain", "inline"))
def test_every_way_of_a_text_refuses_what_does_not_stand_beside_it(way, inputs, message):
    with pytest.raises(ValueError, match=message):
        _model(way)[0](input_ids=IDS, **inputs)


@pytest.mark.parametrize("way", ["plain", "inline", "encoder_decoder"])
def test_every_way_refuses_a_text_that_does_not_fit(way):
    model, beside = _model(way)
    longer = torch.full((3, 65), 5)
    with pytest.raises(ValueError, match="input_ids must leave the text's last position within the model's 6"):
        model(input_ids=longer, **beside)


@pytest.mark.parametrize("way", ["plain", "inline", "encoder_decoder"])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_runs_and_nothing_is_made_for_a_call_that_is_refused(way, training, monkeypatch):
    """Prompts are made, weights move and views are copied for calls that run."""
    model, beside = _model(way)
    model.train(training)

    def never(*_, **__):
        raise AssertionError("something was done")

    if way != "encoder_decoder":  # whose stacks read their own texts, when they are called
        monkeypatch.setattr(model.adapters["default"].encoder, "forward", never)
        monkeypatch.setattr(model._frozen.layers, "stand_ins", never)
        monkeypatch.setattr(model._frozen.hooked, "attention", never)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", never)
    for inputs in ({"input_ids": IDS, "attention_mask": MASK[:, :4]}, {"input_ids": torch.full((3, 65), 5)}):
        with pytest.raises(ValueError):
            model(**inputs, **beside)


@pytest.mark.parametrize(
    ("family", "injection"), [("bert", "deep"), ("bert", "shallow"), ("llama", "deep"), ("roberta", "prefix")]
)
def test_a_call_is_read_once(family, injection, monkeypatch):
    """Its rows, its masks and what stands beside it, by the one reading of all ways."""
    from ptv2_fast.inputs import call

    counts = dict.fromkeys(("check_inputs", "check_beside", "packing_from_cu_seqlens", "packing_from_positions"), 0)
    for name in counts:
        original = getattr(call, name)

        def counted(*args, name=name, original=original, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(call, name, counted)
    model = tiny_model(family, injection)
    model(input_ids=IDS, attention_mask=MASK)
    assert set(counts.values()) == {1}, counts
