"""One encoder-decoder that writes, tags and classifies: its encoder runs once for all rows."""

from __future__ import annotations

import copy

import pytest
import torch

from batches import padded, text_rows
from ptv2_fast import PTuningV2Model, get_ptv2_model
from ptv2_fast.task_models.classes import MODEL_CLASSES
from tiny_models import tiny_prompts
from tiny_seq2seq import TINY, tiny_base
from tolerances import assert_equal, assert_same_bits

CONFIGS = {
    "write": tiny_prompts("deep", "SEQ_2_SEQ_LM", length=4, stacks=("encoder", "decoder", "cross")),
    "other": tiny_prompts("prefix", "SEQ_2_SEQ_LM", length=2),
    "ner": tiny_prompts("prefix", "TOKEN_CLS", length=6, heads={"ner": 9}),
    "spam": tiny_prompts("deep", "SEQ_CLS", length=3, heads={"spam": {"num_labels": 2, "pooling": "mean"}}),
    "find": tiny_prompts("deep", "SENTENCE_RETRIEVAL", length=5),
}
NAMES = ["ner", "write", "spam", "__base__", "find", "other"]
WRITERS, OTHERS = [1, 3, 5], [0, 2, 4]
BATCH = padded(text_rows(5, 2, 7, 6, 3, 4), "right")
DECODER = torch.arange(2, 20).view(6, 3)
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def _holding(family, first="ner"):
    torch.manual_seed(3)
    model = get_ptv2_model(tiny_base(family, exact=True), CONFIGS[first], first)
    for name in CONFIGS:
        if name != first:
            model.add_adapter(name, CONFIGS[name])
    return model.double().eval()


def _part(rows, inputs):
    return {key: value[rows] for key, value in inputs.items()}


def _alone(model, name):
    alone = get_ptv2_model(copy.deepcopy(model.base_model), CONFIGS[name], name)
    alone.adapters[name] = copy.deepcopy(model.adapters[name])
    return alone.eval()


@pytest.mark.parametrize("family", TINY)
def test_one_forward_serves_rows_that_write_and_rows_that_are_read(family):
    model = _holding(family)
    inputs = {**BATCH.inputs, "decoder_input_ids": DECODER}
    mixed = model(**inputs, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                expected = model(**inputs).logits[row]
        elif name in ("write", "other"):
            expected = _alone(model, name)(**inputs).logits[row]
        else:
            output = _alone(model, name)(**BATCH.inputs)
            expected = (output.embeddings if name == "find" else output.logits)[row]
        rows = BATCH.attention_mask[row].bool() if name == "ner" else slice(None)
        assert_equal(mixed.logits[row][rows], expected[rows], name)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=("greedy", "beams"))
@pytest.mark.parametrize("family", TINY)
def test_generate_writes_beside_rows_that_are_read(family, how, monkeypatch):
    model = _holding(family)
    passes = []
    encoder = type(model.backbone.encoder)
    original = encoder.forward

    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        passes.append(output[0].shape[0])
        return output

    names = [NAMES[row] for row in WRITERS]
    alone = model.generate(**_part(WRITERS, BATCH.inputs), adapter_names=names, **GREEDY, **how)
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "forward", forward)
        found = model.generate(**BATCH.inputs, adapter_names=NAMES, **GREEDY, **how)
    # T5's decoder is of the same class, and has the rows that write alone.
    assert passes[0] == 6 and passes.count(6) == 1
    assert torch.equal(found.sequences, alone)
    assert found.rows.tolist() == [row for row in WRITERS for _ in range(how.get("num_return_sequences", 1))]
    expected = model(**BATCH.inputs, decoder_input_ids=DECODER, adapter_names=NAMES).logits
    for row in OTHERS:
        rows = BATCH.attention_mask[row].bool() if NAMES[row] == "ner" else slice(None)
        assert_equal(found.logits[row][rows], expected[row][rows], NAMES[row])


@pytest.mark.parametrize("family", ("t5", "bart"))
@pytest.mark.parametrize(
    "how",
    [
        {"encoder_repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 1},
        {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
    ],
    ids=lambda how: next(iter(how)),
)
def test_what_asks_for_the_encoders_text_or_states_has_them(family, how):
    model = _holding(family)
    names = [NAMES[row] for row in WRITERS]
    alone = model.generate(**_part(WRITERS, BATCH.inputs), adapter_names=names, **GREEDY, **how)
    found = model.generate(**BATCH.inputs, adapter_names=NAMES, **GREEDY, **how)
    assert torch.equal(found.sequences, alone if isinstance(alone, torch.Tensor) else alone.sequences)
    if "return_dict_in_generate" in how:
        real = BATCH.attention_mask[WRITERS].bool()
        states = zip(found.generated.encoder_hidden_states, alone.encoder_hidden_states, strict=True)
        assert all(torch.allclose(theirs[real], own[real]) for theirs, own in states)
    else:
        plain = model.generate(**_part(WRITERS, BATCH.inputs), adapter_names=names, **GREEDY)
        assert not torch.equal(alone, plain)


def test_without_a_mask_padding_is_read_off_the_padding_id():
    model = _holding("bart")
    found = model.generate(BATCH.input_ids, adapter_names=NAMES, **GREEDY)
    expected = model.generate(**BATCH.inputs, adapter_names=NAMES, **GREEDY)
    assert torch.equal(found.sequences, expected.sequences)
    for row in OTHERS:
        assert_equal(found.logits[row], expected.logits[row])


@pytest.mark.parametrize("first", ("write", "ner", "find"))
def test_the_class_follows_the_adapter_and_a_folder_holds_all(first, tmp_path):
    model = _holding("bart", first)
    assert type(model) is MODEL_CLASSES[CONFIGS[first].task_type]
    for name in ("spam", "write", "ner"):
        model.set_adapter(name)
        assert type(model) is type(_alone(model, name))
        inputs = {**BATCH.inputs, **({"decoder_input_ids": DECODER} if name == "write" else {})}
        assert_same_bits(model(**inputs).logits, _alone(model, name)(**inputs).logits)
    model.save_pretrained(tmp_path)
    loaded = PTuningV2Model.from_pretrained(tiny_base("bart", exact=True), tmp_path).double()
    inputs = {**BATCH.inputs, "decoder_input_ids": DECODER, "adapter_names": NAMES}
    for found, expected in zip(loaded(**inputs).logits, model(**inputs).logits, strict=True):
        assert_same_bits(found, expected)


def test_wrong_calls_are_refused():
    model = _holding("bart")
    with pytest.raises(ValueError, match="decoder_input_ids must be given for the rows that write text"):
        model(**BATCH.inputs, adapter_names=NAMES)
    with pytest.raises(ValueError, match="decoder_input_ids must have 6 rows, as input_ids has; got 5"):
        model.generate(**BATCH.inputs, decoder_input_ids=DECODER[:5], adapter_names=NAMES)
    for wrong in (
        {"decoder_input_ids": DECODER[:3]},
        {"decoder_input_ids": torch.cat([DECODER, DECODER])},
        {"decoder_input_ids": DECODER, "decoder_attention_mask": torch.ones(7, 3)},
    ):
        with pytest.raises(ValueError, match=r"decoder_\w+ must have 6 rows, as input_ids has; got (3|12|7)$"):
            model(**BATCH.inputs, **wrong, adapter_names=NAMES)
    encoded = model.get_encoder()(**BATCH.inputs, adapter_names=NAMES)
    with pytest.raises(ValueError, match="encoder_outputs must be None with rows of several tasks"):
        model.generate(**BATCH.inputs, encoder_outputs=encoded, adapter_names=NAMES)
    model.add_adapter("before", tiny_prompts("shallow", "SEQ_2_SEQ_LM"))
    with pytest.raises(ValueError, match="must not mix a shallow prompt on an encoder-decoder with other adapters"):
        model(**BATCH.inputs, decoder_input_ids=DECODER, adapter_names=["before", *NAMES[:5]])
