"""Our heads on encoder-decoders: they read the encoder's states, and the decoder does not run."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
import transformers

from batches import padded, text_rows
from ptv2_fast import GraphRunner, HeadConfig, PTuningV2Config, PTuningV2Model, StepOptions, get_ptv2_model
from ptv2_fast.adapter import Adapter
from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.inputs.cache import CACHE
from ptv2_fast.inputs.pooling import pool
from ptv2_fast.reference.float64 import to_exact_float64
from tiny_models import HIDDEN, INJECTIONS, LABELS, tiny_prompts
from tiny_seq2seq import ENCODER, KINDS, literal, pair, tiny_base, tiny_config, tiny_model
from tolerances import assert_equal, assert_same_bits

EVERY = [pytest.param(kind, injection, id=f"{kind}-{injection}") for kind in KINDS for injection in INJECTIONS]
SOME = [p for p in EVERY if p.values[0] in ("t5", "bart")]
SIDES = ("left", "right", "holes")
POOLINGS = ("first", "last", "mean")
CHOICES = 2
# Each kind of head, with what its loss compares.
HEADS = {
    **{f"SEQ_CLS-{how}": ("SEQ_CLS", HeadConfig("SEQ_CLS", LABELS, pooling=how)) for how in POOLINGS},
    "TOKEN_CLS": ("TOKEN_CLS", 4),
    "QUESTION_ANS": ("QUESTION_ANS", 2),
    "MULTIPLE_CHOICE": ("MULTIPLE_CHOICE", HeadConfig("MULTIPLE_CHOICE", 1, pooling="mean")),
}


def _model(kind, injection="deep", head="TOKEN_CLS", on="SEQ_2_SEQ_LM", **more):
    task, own = HEADS[head]
    return tiny_model(kind, injection, on, task_type=task, heads={"own": own}, **more)


def _call(head, side="left"):
    """A batch for a kind of head, with its targets."""
    batch = padded(text_rows(5, 2, 7, 4), side)
    inputs, labels = batch.inputs, torch.tensor([0, 2, 1, 1])
    if head == "MULTIPLE_CHOICE":
        inputs = {name: value.unflatten(0, (-1, CHOICES)) for name, value in inputs.items()}
        return {**inputs, "labels": torch.tensor([1, 0])}
    if head == "TOKEN_CLS":
        return {**inputs, "labels": (batch.input_ids % 4).masked_fill(batch.attention_mask == 0, -100)}
    if head == "QUESTION_ANS":
        return {**inputs, "start_positions": labels, "end_positions": labels + 3}
    return {**inputs, "labels": labels}


def _logits(output):
    both = getattr(output, "start_logits", None) is not None
    return torch.stack([output.start_logits, output.end_logits], dim=-1) if both else output.logits


def _gradients(model, output):
    parameters = dict(model.adapters["default"].named_parameters())
    return dict(zip(parameters, torch.autograd.grad(output.loss, list(parameters.values())), strict=True))


def _encoder_of(base, kind):
    """transformers' class of the encoder alone, with the weights of a model that has a decoder too."""
    auto = transformers.AutoModelForTextEncoding
    alone = to_exact_float64(auto.from_config(tiny_config(kind)).eval())
    weights = base.state_dict()
    alone.load_state_dict({name: weights[name] for name in alone.state_dict()})
    return alone


# 1. The judges: the encoder alone where transformers has such a model, and the literal forms.


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_it_is_the_encoder_alone(kind, injection, head):
    """Logits, losses, states and every gradient are those of the same adapter on a T5EncoderModel."""
    model = _model(kind, injection, head, exact=True)
    encoder = _encoder_of(model.base_model, kind)
    alone = get_ptv2_model(encoder, PTuningV2Config.from_dict(model.ptv2_config["default"].to_dict())).eval()
    alone.adapters.double().load_state_dict(model.adapters.state_dict())
    for side in SIDES:
        call = _call(head, side)
        output, expected = (one(**call, output_hidden_states=True) for one in (model, alone))
        assert type(output) is type(expected)
        assert_equal(output.loss, expected.loss, side)
        real = call["attention_mask"].flatten(0, -2).bool()
        by_token = head in ("TOKEN_CLS", "QUESTION_ANS")
        logits, wanted = (_logits(one)[real] if by_token else _logits(one) for one in (output, expected))
        assert_equal(logits, wanted, side)
        assert len(output.hidden_states) == len(expected.hidden_states) == ENCODER + 1
        for got, state in zip(output.hidden_states, expected.hidden_states, strict=True):
            assert_equal(got[real], state[real], side)
        grads, wanted = _gradients(model, output), _gradients(alone, expected)
        for name, grad in grads.items():
            if name.endswith("linear.bias") and head in ("QUESTION_ANS", "MULTIPLE_CHOICE"):
                assert grad.abs().max() < 1e-12, "softmax does not see what all scores have in common"
                continue
            assert grad.abs().max() > 1e-9, f"{name} gets no gradient"
            assert_equal(grad, wanted[name], f"{side}, {name}")


@pytest.mark.parametrize("on", ["SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"])
@pytest.mark.parametrize(("kind", "injection"), EVERY)
def test_heads_read_the_literal_encoder(kind, injection, on):
    offset = {"position_offset": 3} if "bart" in kind and injection == "prefix" else {}
    model = _model(kind, injection, "SEQ_CLS-last", on, exact=True, **offset)
    assert model.adapters["default"].encoder.layers == tuple(range(ENCODER))
    backbone = backbone_of(tiny_base(kind, on, exact=True))
    linear = model.adapters["default"].heads["own"].linear
    for side in SIDES:
        call = _call("SEQ_CLS-last", side)
        states = literal(model, backbone, call["input_ids"], call["attention_mask"])[1]
        expected = linear(pool(states, call["attention_mask"], "last"))
        output = model(**call)
        assert_equal(output.logits, expected, side)
        prompts = model.adapters["default"].encoder.prompts
        wanted = torch.autograd.grad(F.cross_entropy(expected, call["labels"]), prompts)[0]
        assert wanted.abs().max() > 1e-9
        assert_equal(torch.autograd.grad(output.loss, prompts)[0], wanted, side)


# 2. The decoder.


@pytest.mark.parametrize(("kind", "injection"), SOME)
def test_the_decoder_does_not_run(kind, injection):
    model, ran = _model(kind, injection), []
    backbone = model.backbone
    for name in ("encoder", "decoder"):
        for module in getattr(backbone, name).modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    model.train()(**_call("TOKEN_CLS")).loss.backward()
    assert set(ran) == {"encoder"}
    model.run(model.base_model, pair().inputs)
    assert set(ran) == {"encoder", "decoder"}


@pytest.mark.parametrize(
    "given",
    [
        {"decoder_input_ids": torch.ones(4, 3).long()},
        {"decoder_inputs_embeds": torch.ones(4, 3, HIDDEN)},
        {"decoder_attention_mask": torch.ones(4, 3).long()},
        {"encoder_outputs": (torch.ones(4, 9, HIDDEN),)},
        {CACHE: transformers.DynamicCache()},
    ],
    ids=lambda given: next(iter(given)),
)
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_what_only_a_decoder_reads_is_refused(kind, given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be None: the encoder's states are read"):
        _model(kind)(**_call("TOKEN_CLS"), **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_ids": torch.zeros(4, 9).long()}, "position_ids must be None"),
        ({"token_type_ids": torch.zeros(4, 9).long()}, "token_type_ids must be None"),
        ({"attention_mask": torch.ones(4, 1, 9, 9)}, r"attention_mask must have shape \(B, N\)"),
        ({"attention_mask": torch.ones(4, 7)}, r"attention_mask must have shape \(4, 9\)"),
        ({"input_ids": None}, "input_ids"),
        ({"output_attentions": True}, "output_attentions must be False"),
        ({"labels": torch.full((4, 9), 4)}, r"labels must lie in \[0, 3\]"),
        ({"task": "other"}, "task must be one of own"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_inputs_that_are_refused(kind, change, message):
    with pytest.raises(ValueError, match=message):
        _model(kind)(**{**_call("TOKEN_CLS"), **change})


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_what_is_called_says_how_it_runs(kind, injection):
    """A base that is called writes with the prompts in its encoder, whatever the task of the adapter that is active."""
    model = _model(kind, injection)
    stacks = {} if injection == "shallow" else {"stacks": ("encoder",)}
    writing = tiny_model(kind, injection, **stacks)
    writing.adapters["default"].encoder.load_state_dict(model.adapters["default"].encoder.state_dict())
    batch = pair()
    expected = writing(**batch.inputs, use_cache=False).logits
    assert_equal(model.run(model.base_model, {**batch.inputs, "use_cache": False}).logits, expected)


# 3. Rows: padding, embeddings, adapters.


@pytest.mark.parametrize("head", ["SEQ_CLS-first", "SEQ_CLS-last", "SEQ_CLS-mean", "TOKEN_CLS"])
@pytest.mark.parametrize(("kind", "injection"), SOME)
def test_a_padded_row_is_the_row_alone(kind, injection, head):
    model, texts = _model(kind, injection, head), text_rows()
    with torch.no_grad():
        alone = [model(input_ids=row[None], output_hidden_states=True) for row in texts]
        for side in SIDES:
            batch = padded(texts, side)
            output = model(**batch.inputs, output_hidden_states=True)
            words = model.get_input_embeddings()(batch.input_ids)
            embedded = model(inputs_embeds=words, attention_mask=batch.attention_mask).logits
            assert_equal(embedded, output.logits, side)
            assert [tuple(states.shape) for states in output.hidden_states] == [(3, 9, HIDDEN)] * (ENCODER + 1)
            for index, row in enumerate(alone):
                logits = batch.real(output.logits, index) if head == "TOKEN_CLS" else output.logits[index]
                assert_equal(logits, row.logits[0], f"{side}, row {index}")
                for got, states in zip(output.hidden_states, row.hidden_states, strict=True):
                    assert_equal(batch.real(got, index), states[0], f"{side}, row {index}")


@pytest.mark.parametrize("kind", ["t5", "mt5", "bart", "mbart"])
def test_one_adapter_per_row(kind):
    model = _model(kind)
    model.add_adapter("long", tiny_prompts("prefix", "TOKEN_CLS", length=9, heads={"tags": 4}))
    model.add_adapter("gated", tiny_prompts("deep", "TOKEN_CLS", prompt_init="gated", heads={"tags": 4}, layers=(1,)))
    torch.nn.init.normal_(model.adapters["gated"].encoder.gate)
    names = ["long", "default", "gated", "long"]
    if "bart" in kind:
        model.add_adapter("shifted", tiny_prompts("prefix", "TOKEN_CLS", position_offset=3, heads={"tags": 4}))
        names[3] = "shifted"
    model.add_adapter("rows", tiny_prompts("deep", "SEQ_CLS", heads={"label": HeadConfig("SEQ_CLS", 2, "last")}))
    model.add_adapter("shallow", tiny_prompts("shallow", "TOKEN_CLS", heads={"tags": 4}))
    model.eval()
    texts = text_rows(5, 2, 7, 4)
    for side in ("left", "right"):
        batch = padded(texts, side)
        alone = [
            model(input_ids=text[None], adapter_names=[name]).logits[0] for text, name in zip(texts, names, strict=True)
        ]
        mixed = model(**batch.inputs, adapter_names=names).logits
        with model.frozen_prompts(), torch.no_grad():
            kept = [model(**batch.inputs, adapter_names=names).logits for _ in range(2)][1]
        for index, (name, expected) in enumerate(zip(names, alone, strict=True)):
            assert_equal(batch.real(mixed, index), expected, name)
            assert_equal(batch.real(kept, index), expected, name)
        kinds = model(**batch.inputs, adapter_names=[*names[:3], "rows"]).logits
        assert_equal(kinds[3], model(input_ids=texts[3][None], adapter_names=["rows"]).logits[0])
        assert_equal(batch.real(mixed, 0), kinds[0][batch.attention_mask[0].bool()])
    with pytest.raises(ValueError, match="adapter_names must not mix a shallow prompt on an encoder-decoder"):
        model(**batch.inputs, adapter_names=["shallow", *names[1:]])
    with pytest.raises(ValueError, match="adapter_names must name 4 rows; got 3 names"):
        model(**batch.inputs, adapter_names=names[:3])
    whole = model(**batch.inputs, adapter_names=["shallow"] * 4).logits
    model.set_adapter("shallow")
    assert_equal(whole, model(**batch.inputs).logits)


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("on", ["SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"])
def test_several_heads_and_the_states_they_read(kind, injection, on):
    heads = {
        "tags": HeadConfig("TOKEN_CLS", 4),
        "label": HeadConfig("SEQ_CLS", 2),
        "span": HeadConfig("QUESTION_ANS", 2),
    }
    model = tiny_model(kind, injection, on, task_type="FEATURE_EXTRACTION", heads=heads)
    batch = padded(text_rows(), "left")
    states = model(**batch.inputs)
    assert not hasattr(states, "encoder_last_hidden_state")
    assert states.last_hidden_state.shape == (3, 9, HIDDEN)
    own = model.adapters["default"].heads
    for task in ("tags", "span"):
        logits = _logits(model(**batch.inputs, task=task))
        assert_equal(logits, own[task].linear(states.last_hidden_state), task)
    first = batch.attention_mask.argmax(1)
    pooled = states.last_hidden_state[torch.arange(3), first]
    assert_equal(model(**batch.inputs, task="label").logits, own["label"].linear(pooled))
    as_tuple = model(**batch.inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert_same_bits(as_tuple[0], states.last_hidden_state)
    if injection != "shallow":
        named = model(**batch.inputs, adapter_names=["default", "__base__", "default"]).last_hidden_state
        assert_equal(named[[0, 2]], states.last_hidden_state[[0, 2]])
        bare = model.backbone.encoder(input_ids=text_rows()[1][None]).last_hidden_state
        assert_equal(batch.real(named, 1), bare[0])


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_states_of_either_stack_are_not_mixed(kind):
    heads = {"tags": HeadConfig("TOKEN_CLS", 4)}
    model = tiny_model(kind, "deep", "FEATURE_EXTRACTION", heads=heads)
    plain = Adapter(model.base_model, tiny_prompts("deep", "FEATURE_EXTRACTION", stacks=("encoder",)))
    plain.encoder.load_state_dict(model.adapters["default"].encoder.state_dict())
    model._register("plain", plain)
    batch = pair()
    states = model(**batch.source.inputs).last_hidden_state
    output = model(**batch.inputs, adapter_names=["plain"] * 3, use_cache=False)
    real = batch.source.attention_mask.bool()
    assert_equal(output.encoder_last_hidden_state[real], states[real])
    assert output.last_hidden_state.shape == (3, 8, HIDDEN), "the decoder's"
    with pytest.raises(ValueError, match=r"adapter_names must not mix adapters .* got \['default', 'plain'\]"):
        model(**batch.source.inputs, adapter_names=["plain", "default", "plain"])


# 4. What belongs to a model.


@pytest.mark.parametrize(("kind", "injection"), EVERY)
def test_checkpointed_gradients_are_plain_gradients(kind, injection):
    model, call, calls = _model(kind, injection).train(), _call("TOKEN_CLS"), []
    layers = model.backbone.encoder.block if "t5" in kind else model.backbone.encoder.layers
    *_, linear = (module for module in layers[0].modules() if isinstance(module, torch.nn.Linear))
    linear.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = _gradients(model, model(**call))
    model.gradient_checkpointing_enable()
    recomputed = _gradients(model, model(**call))
    assert len(calls) == 3, "nothing was recomputed"
    for name, grad in plain.items():
        assert grad.abs().max() > 0
        assert_equal(recomputed[name], grad, name)


@pytest.mark.parametrize(("kind", "injection"), EVERY)
def test_it_learns_and_leaves_the_base(kind, injection, tmp_path):
    base = tiny_base(kind)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model, call = (
        get_ptv2_model(base, tiny_prompts(injection, "TOKEN_CLS", heads={"own": 4})).train(),
        _call("TOKEN_CLS"),
    )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**call, use_cache=True).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    for name, value in base.state_dict().items():
        assert_same_bits(value, before[name], name)
    model.save_pretrained(tmp_path)
    loaded = PTuningV2Model.from_pretrained(tiny_base(kind), tmp_path)
    assert type(loaded) is type(model) and loaded.ptv2_config == model.ptv2_config
    model.eval().requires_grad_(False)
    assert_same_bits(loaded(**call).logits, model(**call).logits)
    with pytest.raises(ValueError, match="the heads own are ours"):
        model.save_pretrained(tmp_path / "peft", format="peft")


@pytest.mark.parametrize(("kind", "injection"), SOME)
def test_disabled_is_the_bare_model_bit_for_bit(kind, injection):
    """With its decoder, which wants a text of its own."""
    model, base, batch = _model(kind, injection), tiny_base(kind).requires_grad_(False), pair("right")
    with torch.no_grad():
        prompted = model(**batch.source.inputs).logits
        with model.disable_adapter():
            assert_same_bits(model(**batch.inputs).logits, base(**batch.inputs).logits)
        assert_same_bits(model(**batch.source.inputs).logits, prompted)
        assert_same_bits(model.unload()(**batch.inputs).logits, base(**batch.inputs).logits)


def test_texts_past_the_table_of_positions_are_refused():
    ids = torch.ones(1, 64).long()
    for injection, more, room in (("deep", {}, 64), ("shallow", {}, 59), ("prefix", {"position_offset": 5}, 59)):
        model = _model("bart", injection, **more)
        assert model.text_limit() == room
        assert model(input_ids=ids[:, :room]).logits.shape == (1, room, 4)
        with pytest.raises(ValueError, match="input_ids must leave .* 64 learned positions"):
            model(input_ids=ids[:, : room + 1] if room < 64 else torch.ones(1, 65).long())
    with pytest.raises(ValueError, match="position_offset must be None on T5ForConditionalGeneration"):
        _model("t5", "prefix", position_offset=5)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_rows_run_padded_and_the_log_says_so(kind, caplog):
    reason = "an encoder-decoder runs its padded rows as they are"
    model, call = _model(kind).train(), _call("TOKEN_CLS")
    model.step_options = StepOptions(unpad=True, fused_projections=True, last_rows=True)
    assert model.why_not_packed() == reason
    with torch.no_grad():
        expected = model(**call).loss
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with caplog.at_level(logging.INFO, logger="ptv2_fast"):
        runner = GraphRunner(model, optimizer)
        assert_equal(runner.step(call), expected)
    assert reason in caplog.text
    assert runner.step(call) < expected


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_encoder_that_is_handed_out_is_the_one_that_heads_read(kind):
    model, batch = _model(kind), padded(text_rows(), "left")
    states = model.get_encoder()(**batch.inputs).last_hidden_state
    assert_equal(model.adapters["default"].heads["own"].linear(states), model(**batch.inputs).logits)
