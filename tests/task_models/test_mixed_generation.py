"""generate of rows that write text beside rows that want a class, tags or a vector: one pass reads all prompts."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from batches import padded, text_rows
from benchmarks.stand_in import captured_on_cpu
from ptv2_fast import PTuningV2Config, get_ptv2_model
from ptv2_fast.task_models.mixed_generation import MixedGeneration
from tiny_models import DECODERS, DISTINCT, tiny_base, tiny_prompts
from tolerances import assert_equal

CONFIGS = {
    "chat": tiny_prompts("deep", "CAUSAL_LM", length=4),
    "other": tiny_prompts("prefix", "CAUSAL_LM", length=2),
    "ner": tiny_prompts("prefix", "TOKEN_CLS", length=6, heads={"ner": 9}),
    "spam": tiny_prompts("deep", "SEQ_CLS", length=3, heads={"spam": {"num_labels": 2, "pooling": "last"}}),
    "find": tiny_prompts("deep", "SENTENCE_RETRIEVAL", length=5),
}
NAMES = ["ner", "chat", "spam", "__base__", "find", "other"]
WRITERS, OTHERS = [1, 3, 5], [0, 2, 4]
BATCH = padded(text_rows(5, 2, 7, 6, 3, 4), "left")
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}


def _holding(family="llama", exact=True):
    torch.manual_seed(3)
    base = tiny_base(family, "CAUSAL_LM", exact=exact)
    model = get_ptv2_model(base, CONFIGS["ner"], "ner")
    for name in CONFIGS:
        if name != "ner":
            model.add_adapter(name, CONFIGS[name])
    return (model.double() if exact else model).eval()


def _rows(rows, **inputs):
    return {key: value[rows] for key, value in {**BATCH.inputs, **inputs}.items()}


def _check_others(model, found, inputs=None):
    """The rows that write nothing have what a forward gives for them."""
    expected = model(**(inputs or BATCH.inputs), adapter_names=NAMES).logits
    for row in OTHERS:
        rows = BATCH.attention_mask[row].bool() if NAMES[row] == "ner" else slice(None)
        assert_equal(found.logits[row][rows], expected[row][rows], NAMES[row])
    assert all(found.logits[row] is None for row in WRITERS)


@pytest.fixture
def passes(monkeypatch):
    """The rows of every pass of a Llama's backbone."""
    seen = []
    original = transformers.LlamaModel.forward

    def forward(self, input_ids=None, **kwargs):
        text = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        seen.append(tuple(text.shape[:2]))
        return original(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    return seen


@pytest.mark.parametrize("family", [family for family in DECODERS if family in DISTINCT])
def test_rows_that_write_are_as_they_are_without_the_others(family):
    model = _holding(family)
    found = model.generate(**BATCH.inputs, adapter_names=NAMES, **GREEDY)
    assert type(found) is MixedGeneration and found.rows.tolist() == WRITERS and found.generated is None
    alone = model.generate(**_rows(WRITERS), adapter_names=[NAMES[row] for row in WRITERS], **GREEDY)
    assert torch.equal(found.sequences, alone)
    _check_others(model, found)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=lambda how: "-".join(how) or "greedy",
)
def test_the_first_pass_reads_all_rows_once(how, passes, exact=True):
    model = _holding(exact=exact)
    alone = model.generate(**_rows(WRITERS), adapter_names=[NAMES[row] for row in WRITERS], **GREEDY, **how)
    sequences = alone if isinstance(alone, torch.Tensor) else alone.sequences
    copies = how.get("num_beams", 1)
    without = [*passes]
    passes.clear()
    found = model.generate(**BATCH.inputs, adapter_names=NAMES, **GREEDY, **how)
    assert without[0] == (3 * copies, 9) and passes == [(3 * copies + 3, 9), *without[1:]]
    assert torch.equal(found.sequences, sequences)
    assert found.rows.tolist() == [row for row in WRITERS for _ in range(how.get("num_return_sequences", 1))]
    if found.generated is not None:
        for theirs, own in zip(found.generated.scores, alone.scores, strict=True):
            assert_equal(theirs, own)
        for theirs, own in zip(found.generated.hidden_states[0], alone.hidden_states[0], strict=True):
            real = BATCH.attention_mask[WRITERS].bool()
            assert_equal(theirs[real], own[real])
    passes.clear()
    _check_others(model, found)


def test_the_first_pass_reads_all_rows_once_where_steps_are_captured(passes):
    with captured_on_cpu() as counts:
        test_the_first_pass_reads_all_rows_once({"num_beams": 3}, passes, exact=False)
    assert counts.replays


@pytest.mark.parametrize(
    "how",
    [
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 4},
        {"past_key_values": "given"},
    ],
    ids=lambda how: next(iter(how)),
)
def test_where_the_first_pass_has_no_place_for_them_they_have_one_of_their_own(how, passes):
    model = _holding()
    names = [NAMES[row] for row in WRITERS]

    def asked():
        if how != {"past_key_values": "given"}:
            return how
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=BATCH.input_ids[WRITERS][:, :5], attention_mask=BATCH.attention_mask[WRITERS][:, :5],
                  adapter_names=names, past_key_values=cache, use_cache=True)  # fmt: skip
        return {"past_key_values": cache}

    alone = model.generate(**_rows(WRITERS), adapter_names=names, **GREEDY, **asked())
    given = asked()
    passes.clear()
    found = model.generate(**BATCH.inputs, adapter_names=NAMES, **GREEDY, **given)
    assert passes.count((3, 9)) >= 1 and not any(rows == 6 for rows, _ in passes)
    assert torch.equal(found.sequences, alone)
    _check_others(model, found)


def test_embeddings_positions_and_no_mask_are_read_too():
    model = _holding()
    row = text_rows(9, 9, 9, 9, 9, 9)
    ids = torch.stack(row)
    names = [NAMES[index] for index in WRITERS]
    words = model.get_input_embeddings()(ids).detach()
    positions = torch.arange(9).expand(6, -1) + torch.arange(6)[:, None]
    mask = torch.ones_like(ids)
    for inputs in (
        {"input_ids": ids},
        {"inputs": ids},
        {"inputs_embeds": words, "attention_mask": mask},
        {"input_ids": ids, "attention_mask": mask, "position_ids": positions},
    ):
        found = model.generate(**inputs, adapter_names=NAMES, **GREEDY)
        part = {key: value[WRITERS] for key, value in inputs.items()}
        assert torch.equal(found.sequences, model.generate(**part, adapter_names=names, **GREEDY)), list(inputs)
        given = {"input_ids" if key == "inputs" else key: value for key, value in inputs.items()}
        expected = model(**given, adapter_names=NAMES).logits
        for other in OTHERS:
            assert_equal(found.logits[other], expected[other], f"{list(inputs)} {NAMES[other]}")


def test_sampling_draws_what_it_draws_without_the_others():
    model = _holding()
    how = {"max_new_tokens": 4, "do_sample": True, "pad_token_id": 1, "temperature": 1.5}
    torch.manual_seed(5)
    found = model.generate(**BATCH.inputs, adapter_names=NAMES, **how)
    torch.manual_seed(5)
    alone = model.generate(**_rows(WRITERS), adapter_names=[NAMES[row] for row in WRITERS], **how)
    assert torch.equal(found.sequences, alone)


def test_one_kind_of_rows_is_generate_as_it_is():
    model = _holding()
    expected = get_ptv2_model(copy.deepcopy(model.base_model), CONFIGS["chat"], "chat")
    expected.adapters["chat"] = copy.deepcopy(model.adapters["chat"])
    tokens = expected.generate(**BATCH.inputs, **GREEDY)
    assert torch.equal(model.generate(**BATCH.inputs, adapter_names=["chat"] * 6, **GREEDY), tokens)
    model.set_adapter("chat")
    assert torch.equal(model.generate(**BATCH.inputs, **GREEDY), tokens)
    model.set_adapter("spam")
    bare = model.generate(**BATCH.inputs, adapter_names=["__base__"] * 6, **GREEDY)
    with model.disable_adapter():
        assert torch.equal(model.generate(**BATCH.inputs, **GREEDY), bare)
        assert torch.equal(model.generate(**BATCH.inputs, adapter_names=NAMES, **GREEDY), bare)


def test_wrong_calls_are_refused():
    model = _holding()
    call = {**BATCH.inputs, **GREEDY}
    for wrong, message in (
        ({"adapter_names": None}, "the active adapter 'ner' must be for a task that writes text; got TOKEN_CLS"),
        (
            {"adapter_names": ["ner", "spam"] * 3},
            "adapter_names must be for a task that writes text; got TOKEN_CLS, SEQ",
        ),
        ({"adapter_names": NAMES[:5]}, "adapter_names must have 6 rows, as input_ids has; got 5"),
        ({"adapter_names": [*NAMES[:5], "nobody"]}, "adapter must be one of .*; got 'nobody'"),
        ({"attention_mask": BATCH.attention_mask[:5]}, "attention_mask must have 6 rows, as input_ids has; got 5"),
        ({"input_ids": None}, "input_ids must be given with rows of several tasks"),
        ({"inputs": BATCH.input_ids}, "input_ids must be given once"),
        ({"task": "other"}, "task must be one of ner; got 'other'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**{**call, "adapter_names": NAMES, **wrong})
    for base in (tiny_base("bert"), tiny_base("llama")):
        encoder = get_ptv2_model(base, PTuningV2Config("TOKEN_CLS", 3, heads={"ner": 2}))
        for names in (None, ["default", "__base__"], ["__base__"] * 2):
            with pytest.raises(ValueError, match="must be for a task that writes text"):
                encoder.generate(BATCH.input_ids[:2], adapter_names=names)
