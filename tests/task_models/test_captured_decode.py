"""Decode steps that `generate` captures, by a stand-in for CUDA graphs, against the same model's eager steps."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from functools import partial

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import tiny_seq2seq
from batches import padded, text_rows
from benchmarks.host.counts import python_calls
from benchmarks.stand_in import StandIn, captured_on_cpu
from ptv2_fast import StepOptions
from ptv2_fast.inputs.cache import CACHE
from ptv2_fast.step import slot_cache
from ptv2_fast.step.capture import WARM_UP_STEPS
from ptv2_fast.task_models import decode_steps
from tiny_models import DECODERS, INJECTIONS, tiny_model, tiny_prompts
from tolerances import assert_equal

NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
# The first token comes of the text itself.
REPLAYS = NEW - 1 - WARM_UP_STEPS


def _batch(*lengths, seed=3, width=9):
    return padded(text_rows(*(lengths or (5, 2, 7)), seed=seed), "left", width).inputs


def _eager(model, inputs, **options):
    """What `generate` gives with the cache that a caller chooses."""
    torch.manual_seed(1)
    return model.generate(**inputs, **{**GREEDY, **options}, cache_implementation="dynamic")


def _captured(model, inputs, **options):
    torch.manual_seed(1)
    return model.generate(**inputs, **{**GREEDY, **options})


@pytest.mark.parametrize("family", DECODERS)
def test_captured_tokens_are_the_eager_ones(counts, family):
    """Rows padded in front, with windows and without, one token for each row at a time and beams."""
    model = tiny_model(family, INJECTIONS[DECODERS.index(family) % len(INJECTIONS)], "CAUSAL_LM")
    expected = _eager(model, _batch())
    assert (counts.captures, counts.replays) == (0, 0)
    assert torch.equal(_captured(model, _batch()), expected)
    if not model.base_model._can_compile_fullgraph:  # ModernBERT's decoder, before transformers 5.17
        return
    assert (counts.warm_ups, counts.captures, counts.replays) == (WARM_UP_STEPS, 1, REPLAYS)
    options = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(_captured(model, _batch(), **options), _eager(model, _batch(), **options))
    assert counts.replays == 2 * REPLAYS


def test_logits_and_sampled_tokens_are_the_eager_ones(counts):
    model = tiny_model("qwen3", "prefix", "CAUSAL_LM", position_offset=3)
    options = {"do_sample": True, "num_return_sequences": 2, "return_dict_in_generate": True, "output_logits": True}
    found, expected = _captured(model, _batch(), **options), _eager(model, _batch(), **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert_equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert counts.replays == REPLAYS


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.5},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 3, "eos_token_id": 7},
        {"do_sample": True, "num_beams": 2, "top_k": 5, "temperature": 2.0},
        {"prefill_chunk_size": 4},
        {
            "generation_config": GenerationConfig(
                max_length=9 + NEW, pad_token_id=1, num_return_sequences=2, num_beams=2
            )
        },
        {"output_hidden_states": True, "return_dict_in_generate": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_other_settings_give_what_they_give_eagerly(counts, options):
    model = tiny_model("qwen3", "shallow", "CAUSAL_LM")
    if "generation_config" in options:
        found = model.generate(_batch()["input_ids"], options["generation_config"])
        model.generation_config.cache_implementation = "dynamic"
        expected = model.generate(_batch()["input_ids"], options["generation_config"])
    else:
        found, expected = _captured(model, _batch(), **options), _eager(model, _batch(), **options)
    if not isinstance(found, torch.Tensor):
        assert_equal(torch.stack(found.hidden_states[-1]), torch.stack(expected.hidden_states[-1]))
        found, expected = found.sequences, expected.sequences
    assert torch.equal(found, expected)
    assert bool(counts.replays) is ("output_hidden_states" not in options)


def test_embeddings_instead_of_words_and_a_streamer(counts):
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    row = text_rows(6)[0][None]
    streamed = []

    class Streamer(BaseStreamer):
        def put(self, value):
            streamed.append(value.flatten().tolist())

        def end(self):
            streamed.append("end")

    expected = _eager(model, {"input_ids": row})[:, 6:]
    found = _captured(model, {"inputs_embeds": model.get_input_embeddings()(row)})
    assert torch.equal(found, expected) and counts.replays == REPLAYS
    assert torch.equal(_captured(model, {"input_ids": row}, streamer=Streamer())[:, 6:], expected)
    assert streamed == [row[0].tolist(), *([token] for token in expected[0].tolist()), "end"]


def test_kernels_read_all_slots_as_they_read_the_text(counts, monkeypatch):
    monkeypatch.setattr(slot_cache, "_LEAST", 16)
    model = tiny_model("llama", "prefix", "CAUSAL_LM", base_changes={"head_dim": 16}, backend="triton")
    options = {"max_new_tokens": WARM_UP_STEPS + 2, "return_dict_in_generate": True, "output_logits": True}
    inputs = _batch(5, 3, width=5)
    found, expected = _captured(model, inputs, **options), _eager(model, inputs, **options)
    assert_equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert counts.replays == 1


class _Recorded(StandIn):
    """Runs a call once, and nothing at a replay: what is left is what the host does."""

    def __call__(self, call):
        kept = call()
        return lambda: kept


def test_a_replayed_token_costs_the_host_less_than_one_of_two_bare_layers():
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    with captured_on_cpu(_Recorded):
        _captured(model, _batch())
        ours, bare = (
            [python_calls(partial(one.generate, **_batch(), **GREEDY | {"max_new_tokens": new})) for new in (2, 12)]
            for one in (model, model.base_model)
        )
        assert model._captured_decode.captured == 1
    assert ours[1] - ours[0] < 0.5 * (bare[1] - bare[0])


def test_a_returned_cache_is_the_callers_own(counts):
    """It goes on like the one of an eager call, whatever is generated meanwhile."""
    model = tiny_model("mistral", "deep", "CAUSAL_LM")
    found = _captured(model, _batch(), return_dict_in_generate=True)
    expected = _eager(model, _batch(), return_dict_in_generate=True)
    assert type(found[CACHE]) is DynamicCache
    _captured(model, _batch(6, 3, 4, seed=8))
    more = torch.cat([found.sequences, torch.cat(text_rows(2, 2, 2)).view(3, 2)], 1)
    mask = torch.nn.functional.pad(_batch()["attention_mask"], (0, more.shape[1] - 9), value=1)
    turns = []
    for first in (found, expected):
        inputs = {"input_ids": more, "attention_mask": mask, CACHE: first[CACHE]}
        turns.append(model.generate(**inputs, **GREEDY))
    assert torch.equal(*turns)


def test_one_graph_serves_other_texts_prompts_and_weights(counts):
    """What is captured reads tokens, padding, prompts and the base's weights where they are now."""
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    model.add_adapter("other", tiny_prompts("prefix", "CAUSAL_LM"))
    model.eval()
    seen = []

    def check(**inputs):
        found = _captured(model, inputs)
        assert torch.equal(found, _eager(model, inputs))
        seen.append(found[:, -NEW:])

    check(**_batch())
    check(**_batch(3, 8, 1, seed=6, width=12))
    check(input_ids=_batch()["input_ids"], attention_mask=torch.ones(3, 9, dtype=torch.long))
    with torch.no_grad():
        model.adapters["default"].encoder.prompts.neg_()
    check(**_batch())
    model.set_adapter("other")
    check(**_batch())
    with torch.no_grad():
        model.base_model.get_output_embeddings().weight.mul_(-1)
    check(**_batch())
    assert counts.captures == 1
    assert len({tuple(tokens.flatten().tolist()) for tokens in seen}) == len(seen), "a change changed no token"


def test_every_row_may_have_its_own_adapter(counts):
    """Banks of several adapters, of other lengths, in another order, with positions of their own."""
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    model.add_adapter("long", tiny_prompts("prefix", "CAUSAL_LM", length=9, position_offset=9))
    model.eval()
    for names in (["long", "default", "__base__"], ["__base__", "long", "default"], ["__base__"] * 3):
        for options in ({"num_beams": 2}, {}):
            found = _captured(model, _batch(), adapter_names=names, **options)
            assert torch.equal(found, _eager(model, _batch(), adapter_names=names, **options)), (names, options)
    # Two banks have the same sizes; the bare rows have none.
    assert counts.captures == 4


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_text_outgrows_its_slots(counts, family, monkeypatch):
    """16, 24 and 32 slots, in the place of 128, 192 and 256."""
    monkeypatch.setattr(slot_cache, "_LEAST", 8)
    model = tiny_model(family, "deep", "CAUSAL_LM")
    for new in (12, 6):
        assert torch.equal(_captured(model, _batch(), max_new_tokens=new), _eager(model, _batch(), max_new_tokens=new))
    assert counts.captures == 2
    assert torch.equal(_captured(model, _batch(), max_new_tokens=20), _eager(model, _batch(), max_new_tokens=20))
    # Nobody had asked for so much before: the memory is other memory, and what reads the old one is gone.
    assert counts.captures == 3 and model._captured_decode.captured == 1


def test_what_no_step_captured_fits_is_captured_anew(counts, said):
    """The base's weights are elsewhere, its modules compute with other numbers, or other memory was needed."""
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    _captured(model, _batch())
    layer = model.base_model.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(-layer.weight.detach(), requires_grad=False)
    assert torch.equal(_captured(model, _batch()), _eager(model, _batch()))
    assert said("dropped: weights were moved") and counts.captures == 2
    model.base_model.model.layers[1].self_attn.scaling *= 3
    assert torch.equal(_captured(model, _batch()), _eager(model, _batch()))
    assert said("drop or scale otherwise") and counts.captures == 3
    model.double()
    assert model._captured_decode.captured == 0
    assert torch.equal(_captured(model, _batch()), _eager(model, _batch()))
    wide = _batch(5, 2, 7, 4, 4, 4)
    assert torch.equal(_captured(model, wide), _eager(model, wide))
    assert counts.captures == 5 and model._captured_decode.captured == 1


def _experts(model):
    for module in model.base_model.modules():
        if "top_k" in vars(module):
            module.top_k = 1


def _kinds_of_layers(model):
    model.base_model.config.layer_types[0] = "full_attention"


@pytest.mark.parametrize(("family", "change"), [("mixtral", _experts), ("gemma3_text", _kinds_of_layers)])
def test_a_setting_that_is_no_fraction_changes_the_next_text(counts, family, change):
    """To how many experts a token goes, or what stands in a list of the configuration: a graph keeps what it was."""
    model = tiny_model(family, "deep", "CAUSAL_LM")
    for _ in range(2):
        _captured(model, _batch())
    assert counts.captures == 1
    change(model)
    assert torch.equal(_captured(model, _batch()), _eager(model, _batch()))
    assert counts.captures == 2


def test_who_chooses_something_else_gets_it(counts):
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    config = model.base_model.config
    for options in (
        {"cache_implementation": "static"},
        {"use_cache": False},
        {CACHE: DynamicCache(config=config)},
        {"prompt_lookup_num_tokens": 2, "eos_token_id": 1},
        {"assistant_model": model.base_model},
    ):
        row = {"input_ids": text_rows(7)[0][None]}
        assert model.generate(**row, **GREEDY, **options)[0, :7].tolist() == row["input_ids"][0].tolist()
    model.generation_config.cache_implementation = "static"
    model.generate(**_batch(), **GREEDY)
    model.generation_config.cache_implementation = None
    model.step_options = StepOptions(cuda_graphs=False)
    model.generate(**_batch(), **GREEDY)
    assert counts.warm_ups == 0


def _with_hook(model):
    model.base_model.model.layers[0].register_forward_hook(lambda *_: None)
    return model


def _with_own_layer(model):
    class Own(torch.nn.SiLU):
        pass

    model.base_model.model.layers[0].mlp.act_fn = Own()
    return model


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda model: model.train(), "in training mode"),
        (_with_hook, "has hooks"),
        (_with_own_layer, "decide by what a replay cannot see"),
    ],
)
def test_what_cannot_be_captured_runs_as_before_and_one_line_says_why(counts, said, change, why):
    model = change(tiny_model("llama", "deep", "CAUSAL_LM"))
    expected = _eager(model, _batch())
    for _ in range(2):
        assert torch.equal(_captured(model, _batch()), expected)
    assert counts.warm_ups == 0
    assert len(said("generate: decode steps are not captured")) == len(said(why)) == 1


def test_an_encoder_decoder_generates_as_before(counts):
    model = tiny_seq2seq.tiny_model("bart", "prefix")
    _captured(model, _batch())
    assert counts.warm_ups == 0


def test_a_refused_capture_leaves_the_tokens_as_they_are(said):
    class Refusal(StandIn):
        def __call__(self, call):
            raise RuntimeError("operation not permitted when stream is capturing")

    model = tiny_model("llama", "deep", "CAUSAL_LM")
    with captured_on_cpu(Refusal) as counts:
        for _ in range(2):
            assert torch.equal(_captured(model, _batch()), _eager(model, _batch()))
    assert counts.warm_ups == WARM_UP_STEPS and len(said("not permitted when stream is capturing")) == 1


def test_another_thread_and_a_call_within_a_call_run_eagerly(counts):
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    other = _batch(4, 4, seed=9)
    expected, expected_other = _eager(model, _batch()), _eager(model, other)
    inner, outside = [], []

    class Within(LogitsProcessor):
        def __call__(self, input_ids, scores):
            inner.append(model.generate(**other, **GREEDY))
            thread = threading.Thread(target=lambda: outside.append(model.generate(**other, **GREEDY)))
            thread.start()
            thread.join()
            return scores

    found = _captured(model, _batch(), logits_processor=LogitsProcessorList([Within()]))
    assert torch.equal(found, expected)
    assert len(inner) == len(outside) == NEW and all(torch.equal(one, expected_other) for one in inner + outside)
    assert counts.replays == REPLAYS


def test_a_call_that_ends_in_an_exception_spoils_nothing(counts):
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    expected = _eager(model, _batch())

    def stop(input_ids, scores, **_):
        if input_ids.shape[1] == 9 + NEW - 1:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            _captured(model, _batch(6, 6, 3, seed=2), stopping_criteria=StoppingCriteriaList([stop]))
        assert torch.equal(_captured(model, _batch()), expected)
    assert counts.captures == 1


def test_a_text_that_is_too_long_is_refused_as_ever(counts):
    model = tiny_model("gpt2", "shallow", "CAUSAL_LM")
    inputs = _batch(55, 50, width=55)
    messages = []
    for generate in (_eager, _captured):
        with pytest.raises(ValueError, match="learned positions") as error:
            generate(model, inputs, max_new_tokens=9)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and counts.replays


def test_inference_mode_and_autocast_around_the_call(counts):
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    for _ in range(2):
        expected = _eager(model, _batch())
        with torch.inference_mode():
            assert torch.equal(_captured(model, _batch()), expected)
        assert torch.equal(_captured(model, _batch()), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(_captured(model, _batch()), _eager(model, _batch()))
    # Autocast's keys are of another dtype, and so in other memory.
    assert counts.captures >= 2


def test_sizes_that_were_not_used_for_long_go(counts, monkeypatch):
    monkeypatch.setattr(decode_steps, "MAX_GRAPHS", 2)
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    batches = [_batch(*[4] * rows) for rows in (3, 2, 1, 3)]
    for batch in batches:
        assert torch.equal(_captured(model, batch), _eager(model, batch))
    assert counts.captures == 4 and model._captured_decode.captured == 2


@pytest.mark.parametrize(
    "give_back",
    [
        lambda model: model.train(),
        lambda model: model.to(torch.float64),
        lambda model: (setattr(model, "step_options", StepOptions(cuda_graphs=False)), _captured(model, _batch())),
        lambda model: vars(model).clear(),
    ],
    ids=["training", "moving", "switching off", "deleting"],
)
def test_memory_is_given_back(counts, give_back):
    """Without waiting for somebody who looks for cycles."""
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    _captured(model, _batch())
    memory = weakref.ref(model._captured_decode._steps.cache)
    gc.disable()
    try:
        give_back(model)
        assert memory() is None
    finally:
        gc.enable()


def test_a_copy_captures_its_own(counts):
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    expected = _captured(model, _batch())
    other = copy.deepcopy(model)
    assert other._captured_decode.captured == 0
    assert torch.equal(_captured(other, _batch()), expected)
    assert counts.captures == 2
