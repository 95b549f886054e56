"""Heads of encoder-decoders' own, heads on the encoder of T5, and the bases that are refused."""

from __future__ import annotations

import pytest
import torch
import transformers

from batches import padded, text_rows
from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model
from ptv2_fast.backbone.locate import backbone_of
from tiny_models import INJECTIONS, LABELS, tiny_prompts
from tiny_seq2seq import ENCODER, literal, tiny_base, tiny_model
from tolerances import assert_equal, assert_same_bits


def _ended(side):
    """Rows that end in the one token that classifiers read."""
    texts = [torch.cat([row[row != 3], torch.tensor([3])]) for row in text_rows()]
    return texts, padded(texts, side)


BASES = [
    *[(kind, task) for kind in ("t5", "mt5") for task in ("SEQ_CLS", "TOKEN_CLS")],
    *[(kind, task) for kind in ("bart", "mbart") for task in ("SEQ_CLS", "QUESTION_ANS")],
]
HEADS = [pytest.param(kind, task, id=f"{kind}-{task}") for kind, task in BASES]


def _logits(output):
    both = getattr(output, "start_logits", None) is not None
    return torch.stack([output.start_logits, output.end_logits], dim=-1) if both else output.logits


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize(("kind", "task"), HEADS)
def test_heads_of_the_base(kind, task, injection):
    """A padded row is the row alone; head and prompts train; the disabled model is the base."""
    changes = {"eos_token_id": 3}
    model = tiny_model(kind, injection, task, base_changes=changes)
    texts, _ = _ended("left")
    with torch.no_grad():
        alone = [_logits(model(input_ids=row[None], output_hidden_states=True))[0] for row in texts]
        for side in ("left", "right", "holes"):
            _, batch = _ended(side)
            output = model(**batch.inputs, output_hidden_states=True)
            for index, expected in enumerate(alone):
                own = _logits(output)[index] if task == "SEQ_CLS" else batch.real(_logits(output), index)
                assert_equal(own, expected, f"{side}, row {index}")
                states = output.hidden_states if task == "TOKEN_CLS" else output.encoder_hidden_states
                row = model(input_ids=texts[index][None], output_hidden_states=True)
                row = row.hidden_states if task == "TOKEN_CLS" else row.encoder_hidden_states
                assert_equal(batch.real(states[1], index), row[1][0], f"states, {side}, row {index}")
        with model.disable_adapter():
            bare = tiny_base(kind, task, **changes).requires_grad_(False)(**batch.inputs)
            assert_same_bits(_logits(model(**batch.inputs)), _logits(bare))
    _, batch = _ended("left")
    last = torch.tensor([8, 8, 8])
    targets = {
        "SEQ_CLS": {"labels": torch.tensor([0, 2, 1])},
        "TOKEN_CLS": {"labels": batch.input_ids % LABELS},
        "QUESTION_ANS": {"start_positions": last - 1, "end_positions": last},
    }[task]
    output = model(**batch.inputs, **targets)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.adapters.parameters())
    if task == "QUESTION_ANS":
        sides = zip(_logits(output).unbind(-1), targets.values(), strict=True)
        assert_equal(output.loss, sum(torch.nn.functional.cross_entropy(*side) for side in sides) / 2)
    if task != "TOKEN_CLS":
        with pytest.raises(ValueError, match="decoder_input_ids must be None"):
            model(**batch.inputs, decoder_input_ids=batch.input_ids)


@pytest.mark.parametrize("kind", ["bart", "mbart"])
def test_own_heads_on_a_model_that_has_one(kind):
    """Its backbone's encoder is read: what the model's own head reads is the decoder."""
    changes = {"eos_token_id": 3}
    model = tiny_model(kind, "deep", "SEQ_CLS", task_type="TOKEN_CLS", heads={"own": 4}, base_changes=changes)
    call = padded(text_rows(), "left").inputs
    backbone = backbone_of(tiny_base(kind, "SEQ_CLS", **changes))
    states = literal(model, backbone, call["input_ids"], call["attention_mask"])[1]
    real = call["attention_mask"].bool()
    assert_equal(model(**call).logits[real], model.adapters["default"].heads["own"].linear(states)[real])


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_own_heads_on_the_encoder_of_t5(injection, pooling):
    heads = {"label": HeadConfig("SEQ_CLS", 4, pooling=pooling)}
    model = tiny_model("t5", injection, "ENCODER", task_type="SEQ_CLS", heads=heads)
    texts = text_rows()
    head = model.adapters["default"].heads["label"].linear
    for side in ("left", "right", "holes"):
        logits = model(**padded(texts, side).inputs).logits
        for index, row in enumerate(texts):
            states = model.run(model.backbone, {"input_ids": row[None]}).last_hidden_state[0]
            pooled = {"first": states[0], "last": states[-1], "mean": states.mean(0)}[pooling]
            assert_equal(logits[index], head(pooled))


def test_one_adapter_per_row_on_the_encoder_of_t5():
    model = tiny_model("t5", "deep", "ENCODER", task_type="TOKEN_CLS", heads={"tags": 3})
    model.add_adapter("prefix", tiny_prompts("prefix", "TOKEN_CLS", length=9, heads={"tags": 3}))
    model.eval()
    names, texts = ["prefix", "default", "prefix"], text_rows()
    for side in ("left", "right"):
        batch = padded(texts, side)
        mixed = model(**batch.inputs, adapter_names=names).logits
        for index, (row, name) in enumerate(zip(texts, names, strict=True)):
            assert_equal(batch.real(mixed, index), model(input_ids=row[None], adapter_names=[name]).logits[0], name)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_checkpointed_gradients_of_the_encoder_of_t5(injection):
    model = tiny_model("t5", injection, "ENCODER").train()
    batch = padded(text_rows(), "left")
    real, grads, calls = batch.attention_mask.bool(), [], []
    projection = model.backbone.encoder.block[0].layer[0].SelfAttention.q
    projection.register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(2):
        model.zero_grad()
        model(**batch.inputs).last_hidden_state[real].pow(2).sum().backward()
        grads.append(model.adapters["default"].encoder.prompts.grad.clone())
        model.gradient_checkpointing_enable()
    assert len(calls) == 3 and grads[0].abs().max() > 0
    assert_equal(grads[1], grads[0])


def _refused():
    config = PTuningV2Config
    yield "t5", "QUESTION_ANS", config("QUESTION_ANS"), "T5ForQuestionAnswering"
    yield "t5", "SEQ_2_SEQ_LM", config("SEQ_CLS"), "'SEQ_2_SEQ_LM' for T5ForConditionalGeneration without heads"
    yield "t5", "FEATURE_EXTRACTION", config("SEQ_CLS"), "heads must be given for task_type='SEQ_CLS' on the backbone"
    yield "t5", "FEATURE_EXTRACTION", config("SEQ_2_SEQ_LM"), "encoder-decoder of type ...ForConditionalGeneration"
    yield "t5", "ENCODER", config("SEQ_2_SEQ_LM"), "got T5EncoderModel"
    yield "t5", "ENCODER", config("FEATURE_EXTRACTION", stacks=("encoder",)), "stacks must be None"
    yield "t5", "SEQ_2_SEQ_LM", config("FEATURE_EXTRACTION"), "task_type must be 'SEQ_2_SEQ_LM'"
    yield "t5", "SEQ_2_SEQ_LM", config("CAUSAL_LM"), "task_type must be 'SEQ_2_SEQ_LM'"
    yield "bart", "SEQ_2_SEQ_LM", config("CAUSAL_LM"), "must be a causal language model"
    yield "bart", "SEQ_2_SEQ_LM", config("SEQ_CLS"), "must be of type ...ForSequenceClassification"
    yield "t5", "SEQ_2_SEQ_LM", config("SEQ_2_SEQ_LM", position_offset=3), "position_offset must be None on T5ForCond"
    yield "t5", "ENCODER", config("FEATURE_EXTRACTION", position_offset=3), "position_offset must be None on T5Encoder"
    yield "t5", "SEQ_2_SEQ_LM", config("SEQ_2_SEQ_LM", layers=(2,)), r"layers must lie in \[-2, 1\]"


@pytest.mark.parametrize(("kind", "task", "config", "message"), [pytest.param(*x, id=x[3]) for x in _refused()])
def test_bases_and_tasks_that_do_not_fit(kind, task, config, message):
    base = tiny_base(kind, task)
    with pytest.raises(ValueError, match=message):
        get_ptv2_model(base, config)
    assert all(parameter.requires_grad for parameter in base.parameters()), "the base was touched"


@pytest.mark.parametrize("stacks", [("decoder",), ("cross",), ("encoder", "decoder")], ids="+".join)
@pytest.mark.parametrize("on", ["SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_prompts_elsewhere_are_refused(kind, on, stacks):
    base = tiny_base(kind, on)
    for reader, more in (("heads", {"task_type": "SEQ_CLS", "heads": {"own": 2}}), ("task_type='SENTENCE", {})):
        config = PTuningV2Config(**{"task_type": "SENTENCE_RETRIEVAL", "stacks": stacks, **more})
        message = rf"stacks must be None or \('encoder',\) with {reader}.*got \('{stacks[0]}"
        with pytest.raises(ValueError, match=message):
            get_ptv2_model(base, config)
    assert all(parameter.requires_grad for parameter in base.parameters()), "the base was touched"
    model = get_ptv2_model(base, PTuningV2Config("SEQ_CLS", heads={"own": 2}, stacks=("encoder",), layers=(-1,)))
    assert model.adapters["default"].encoder.layers == (ENCODER - 1,)
    with pytest.raises(ValueError, match="stacks must be None or"):
        model.add_adapter("other", PTuningV2Config("SEQ_CLS", heads={"own": 2}, stacks=stacks))
    assert list(model.adapters) == ["default"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_attention_heads": 2}, "as many heads in its decoder"),
        ({"encoder_layerdrop": 0.1}, "encoder_layerdrop 0"),
        ({"decoder_layerdrop": 0.1}, "decoder_layerdrop 0"),
    ],
)
def test_barts_that_are_refused(changes, message):
    for kind in ("bart", "mbart"):
        with pytest.raises(ValueError, match=message):
            get_ptv2_model(tiny_base(kind, **changes), PTuningV2Config("SEQ_2_SEQ_LM"))


@pytest.mark.parametrize("kind", ["t5", "bart", "mbart"])
def test_a_stack_alone_is_refused(kind):
    for stack in (tiny_base(kind, "FEATURE_EXTRACTION").encoder, tiny_base(kind, "FEATURE_EXTRACTION").decoder):
        with pytest.raises(ValueError, match="base must"):
            get_ptv2_model(stack, PTuningV2Config("FEATURE_EXTRACTION"))


@pytest.mark.skipif(hasattr(transformers.models.t5.modeling_t5, "ALL_ATTENTION_FUNCTIONS"), reason="it is served")
def test_a_t5_with_an_attention_of_its_own_is_refused():
    config = transformers.T5Config(vocab_size=9, d_model=8, d_kv=2, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="attention interface, which T5 uses in later versions"):
        get_ptv2_model(transformers.T5ForConditionalGeneration(config), PTuningV2Config("SEQ_2_SEQ_LM"))
