"""What transformers hands the hook, and what the hook makes of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

from batches import padded, text_rows
from ptv2_fast.attention import hook
from ptv2_fast.attention.prompt_batch import LayerPrompt, PromptBatch
from ptv2_fast.inputs.cache import CACHE
from ptv2_fast.reference.attention import prompt_attention as judge
from tiny_models import tiny_base, tiny_model
from tolerances import assert_differs, assert_equal

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def _sizes(batch=2, queries=5, keys=5, offset=0, **options):
    return {
        "batch_size": batch,
        "q_length": queries,
        "kv_length": keys,
        "q_offset": offset,
        **options,
    }


# The mask function by itself.


@pytest.mark.parametrize("function", [causal_mask_function, bidirectional_mask_function])
def test_the_raw_mask_is_handed_through(function):
    mask = MASK.bool()
    out = hook.padding_mask(**_sizes(), mask_function=function, attention_mask=mask)
    assert torch.equal(out, mask) and out.data_ptr() == mask.data_ptr()
    assert hook.padding_mask(**_sizes(), mask_function=function) is None


def test_a_mask_shorter_than_the_keys_is_filled_with_padding():
    out = hook.padding_mask(**_sizes(queries=2, keys=7, offset=5), attention_mask=MASK.bool())
    assert torch.equal(out, torch.nn.functional.pad(MASK.bool(), (0, 2)))


def test_one_query_on_a_static_cache_sees_what_is_written():
    offset = torch.tensor(4)
    options = {"attention_mask": MASK.bool(), "device": torch.device("cpu")}
    out = hook.padding_mask(**_sizes(queries=1, keys=8, offset=offset), **options)
    expected = torch.zeros(2, 8, dtype=torch.bool)
    expected[:, :5] = MASK.bool()
    assert out.dim() == 2 and torch.equal(out, expected)
    bare = hook.padding_mask(**_sizes(queries=1, keys=8, offset=3), device=torch.device("cpu"))
    assert torch.equal(bare, torch.arange(8).expand(2, -1) <= 3)


def test_several_queries_on_a_static_cache_get_the_whole_mask():
    out = hook.padding_mask(
        **_sizes(queries=3, keys=8, offset=2),
        attention_mask=torch.ones(2, 8, dtype=torch.bool),
        device=torch.device("cpu"),
    )
    query, key = torch.arange(3)[:, None] + 2, torch.arange(8)[None]
    assert out.shape == (2, 1, 3, 8)
    assert torch.equal(out[1, 0], key <= query)


def test_a_mask_function_of_the_models_own_gets_the_whole_mask():
    def even_keys_only(batch, head, query, key):
        return key % 2 == 0

    function = and_masks(causal_mask_function, even_keys_only)
    out = hook.padding_mask(**_sizes(), mask_function=function, attention_mask=MASK.bool(), device=torch.device("cpu"))
    keys, queries = torch.arange(5)[None], torch.arange(5)[:, None]
    visible = (keys <= queries) & (keys % 2 == 0)
    assert torch.equal(out[:, 0], visible & MASK.bool()[:, None, :])


# As transformers calls it.


def _create(create, config, **changes):
    arguments = {
        "config": config,
        "inputs_embeds": torch.zeros(2, 5, 32),
        "attention_mask": MASK,
        CACHE: None,
        **changes,
    }
    return create(**arguments)


def _config(family, **changes):
    hook.register()
    config = tiny_base(family, **changes).config
    config._attn_implementation = hook.IMPLEMENTATION
    return config


def test_transformers_builds_no_mask_for_the_hook():
    for create, family in [(create_causal_mask, "llama"), (create_bidirectional_mask, "bert")]:
        mask = _create(create, _config(family))
        assert mask.shape == (2, 5) and torch.equal(mask, MASK.bool())
        assert _create(create, _config(family), attention_mask=None) is None


def test_a_sliding_window_is_the_layers_own_business():
    """The window reaches attention as a keyword, so the mask stays the raw one."""
    config = _config("qwen3", use_sliding_window=True, sliding_window=3, max_window_layers=0)
    mask = _create(create_sliding_window_causal_mask, config)
    assert mask.shape == (2, 5) and torch.equal(mask, MASK.bool())


def test_extra_mask_functions_are_not_lost():
    def not_the_first(batch, head, query, key):
        return key != 0

    ones = torch.ones_like(MASK)
    mask = _create(create_causal_mask, _config("llama"), attention_mask=ones, and_mask_function=not_the_first)
    assert mask.dim() == 4
    assert not mask[..., 0].any() and mask[0, 0, 4, 1:].all() and not mask[0, 0, 1, 2:].any()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_tokens(kind):
    config = _config("llama")
    cache = DynamicCache(config=config)
    if kind == "static":
        cache = StaticCache(config=config, max_cache_len=9)
    states = torch.zeros(2, 2, 3, 8)
    for layer in range(2):
        cache.update(states, states, layer)
    mask = torch.nn.functional.pad(MASK, (0, 3), value=1)
    got = _create(create_causal_mask, config, attention_mask=mask, **{CACHE: cache})
    if kind == "dynamic":
        assert torch.equal(got, mask.bool())
    else:
        assert got.shape == (2, 1, 5, 9) and not got[..., 8].any()


# The attention function by itself.


def _layer(**changes):
    return SimpleNamespace(**{"layer_idx": 1, "is_causal": False, **changes})


def _states(queries=5, keys=5, dtype=torch.float64):
    shapes = [(2, 4, queries, 8), (2, 2, keys, 8), (2, 2, keys, 8)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def _prompt(length=3, dtype=torch.float64):
    return LayerPrompt(*(torch.randn(2, length, 8, dtype=dtype) for _ in range(2)))


def _judge(states, prompt, **options):
    options.setdefault("scale", 8**-0.5)
    return judge(*states, prompt.keys[None], prompt.values[None], **options).transpose(1, 2)


def test_the_layer_index_picks_the_prompt():
    states, prompt = _states(), _prompt()
    batch = PromptBatch((None, prompt))
    out, weights = hook.attention_forward(_layer(), *states, MASK.bool(), ptv2_prompts=batch)
    assert weights is None
    assert_equal(out, _judge(states, prompt, key_mask=MASK))
    unprompted, _ = hook.attention_forward(_layer(layer_idx=0), *states, MASK.bool(), ptv2_prompts=batch)
    assert_equal(unprompted, _judge(states, _prompt(0), key_mask=MASK))
    assert_differs(out, unprompted)


@pytest.mark.parametrize("queries", [1, 5])
def test_causality_is_the_modules_unless_the_call_says_otherwise(queries):
    states, prompt = _states(queries), _prompt()
    batch = PromptBatch((None, prompt))
    for module, call, causal in [(True, None, True), (True, False, False), (False, True, True)]:
        layer = _layer(is_causal=module)
        out, _ = hook.attention_forward(layer, *states, None, is_causal=call, ptv2_prompts=batch)
        assert_equal(out, _judge(states, prompt, causal=causal))


def test_windows_softcaps_and_scales_reach_the_scores():
    states, prompt = _states(), _prompt()
    options = {"scaling": 0.7, "sliding_window": 2, "softcap": 1.5}
    layer = _layer(is_causal=True)
    batch = PromptBatch((None, prompt))
    out, _ = hook.attention_forward(layer, *states, None, **options, ptv2_prompts=batch)
    expected = _judge(states, prompt, causal=True, scale=0.7, window=2, softcap=1.5)
    assert_equal(out, expected)


def test_a_bidirectional_window_counts_as_transformers_masks_do():
    """A layer hands in its half-window plus one, as flash attention takes it; its mask has the half-window."""
    states, prompt = _states(), _prompt()
    batch = PromptBatch((None, prompt))
    out, _ = hook.attention_forward(_layer(), *states, None, sliding_window=2, ptv2_prompts=batch)
    assert_equal(out, _judge(states, prompt, window=1))


def test_virtual_tokens_are_in_every_window():
    states = _states()
    layer = _layer(is_causal=True)
    batch = PromptBatch((), windowed=False)
    out, _ = hook.attention_forward(layer, *states, None, sliding_window=2, ptv2_prompts=batch)
    whole, _ = hook.attention_forward(layer, *states, None)
    assert torch.equal(out, whole)


def test_a_packed_batch_with_a_mask_of_its_own_is_refused():
    bounds = torch.tensor([0, 5, 10], dtype=torch.int32)
    batch = PromptBatch((None, _prompt()), cu_seqlens=bounds)
    with pytest.raises(ValueError, match="a packed batch must need no mask but row boundaries"):
        hook.attention_forward(_layer(), *_states(), torch.ones(2, 1, 5, 5, dtype=torch.bool), ptv2_prompts=batch)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_of_four_dimensions_says_everything(kind):
    """It holds causality and windows already, so the layer's own are not applied on top."""
    states, prompt = _states(), _prompt()
    visible = torch.rand(2, 1, 5, 5) > 0.4
    additive = torch.zeros(2, 1, 5, 5, dtype=torch.float64).masked_fill(~visible, float("-inf"))
    mask = visible if kind == "bool" else additive
    layer = _layer(is_causal=True)
    batch = PromptBatch((None, prompt))
    out, _ = hook.attention_forward(layer, *states, mask, sliding_window=1, ptv2_prompts=batch)
    assert_equal(out, _judge(states, prompt, bias=additive))


def test_a_position_bias_is_added_to_the_texts_scores():
    states, prompt = _states(), _prompt()
    bias = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    batch = PromptBatch((None, prompt))
    options = {"position_bias": bias, "ptv2_prompts": batch}
    out, _ = hook.attention_forward(_layer(), *states, MASK.bool(), **options)
    assert_equal(out, _judge(states, prompt, bias=bias, key_mask=MASK))
    whole = torch.randn(2, 1, 5, 5, dtype=torch.float64)
    out, _ = hook.attention_forward(_layer(), *states, whole, **options)
    assert_equal(out, _judge(states, prompt, bias=bias + whole))


def test_packed_rows():
    states, prompt = _states(), _prompt()
    bounds = torch.tensor([0, 2, 5, 10], dtype=torch.int32)
    batch = PromptBatch((None, prompt), cu_seqlens=bounds, max_seqlen=5)
    out, _ = hook.attention_forward(_layer(), *states, torch.ones(2, 5), ptv2_prompts=batch)
    assert out.shape == (2, 5, 4, 8)
    for row, part in [(0, slice(0, 2)), (0, slice(2, 5)), (1, slice(0, 5))]:
        one = [x[row : row + 1, :, part] for x in states]
        assert_equal(out[row : row + 1, part], _judge(one, prompt))


def test_a_record_keeps_keys_and_values():
    states, record = _states(), []
    hook.attention_forward(_layer(), *states, None, ptv2_record=record)
    assert record[0][0] is states[1] and record[0][1] is states[2]


def test_under_autocast_everything_has_its_dtype():
    states, prompt = _states(dtype=torch.float32), _prompt(dtype=torch.float32)
    batch = PromptBatch((None, prompt))
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = hook.attention_forward(_layer(), *states, None, ptv2_prompts=batch)
    assert out.dtype == torch.bfloat16
    assert_equal(out, _judge([x.double() for x in states], LayerPrompt(prompt.keys.double(), prompt.values.double())))


# A whole model with the caller's own masks.


@pytest.mark.parametrize("injection", ["deep", "prefix"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_callers_mask_of_four_dimensions(family, injection):
    model = tiny_model(family, injection)
    batch = padded(text_rows(5, 9), "right")
    visible = batch.attention_mask.bool()[:, None, None, :].expand(-1, 1, 9, -1)
    if family != "bert":
        visible = visible & torch.ones(9, 9, dtype=torch.bool).tril()
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = model(**batch.inputs).last_hidden_state
    for mask in (visible, additive):
        states = model(input_ids=batch.input_ids, attention_mask=mask).last_hidden_state
        for row in range(2):
            assert_equal(batch.real(states, row), batch.real(expected, row))


def test_registering_twice_changes_nothing():
    from transformers import AttentionInterface

    hook.register()
    before = AttentionInterface()[hook.IMPLEMENTATION]
    hook.register()
    assert AttentionInterface()[hook.IMPLEMENTATION] is before is hook.attention_forward
