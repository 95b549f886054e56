"""What must hold for every encoder-decoder and injection, whatever the task."""

from __future__ import annotations

import logging

import pytest
import tiny_models as bert
import torch
import transformers
from batches import padded, text_rows
from shape_audit import ShapeAudit
from tiny_models import HIDDEN, INJECTIONS, LABELS, VOCABULARY, tiny_prompts
from tiny_seq2seq import (
    DECODER,
    ENCODER,
    KINDS,
    LAYERS,
    STACKS,
    Pair,
    literal,
    pair,
    rows,
    tiny_base,
    tiny_model,
)
from tolerances import assert_differs, assert_equal

from ptv2_fast import GraphRunner, HeadConfig, PTuningV2Config, PTuningV2Model, StepOptions, get_ptv2_model
from ptv2_fast.models.backbone import backbone_of
from ptv2_fast.models.cache import CACHE
from ptv2_fast.models.dimensions import Dimensions
from ptv2_fast.models.families import family_of

EVERY = [pytest.param(kind, injection, id=f"{kind}-{injection}") for kind in KINDS for injection in INJECTIONS]
SOME = [p for p in EVERY if p.values[0] in ("t5", "bart")]


def _model(kind, injection, *arguments, **config):
    stacks = {} if injection == "shallow" else {"stacks": STACKS}
    return tiny_model(kind, injection, *arguments, **stacks, **config)


def test_the_families_are_these():
    for kind in ("t5", "bart"):
        backbone = backbone_of(tiny_base(kind))
        sizes = family_of(backbone).sizes(backbone)
        assert (sizes.num_layers, sizes.decoder_layers, sizes.encoder_layers) == (LAYERS, DECODER, ENCODER)
        assert sizes.num_heads * sizes.head_dim == (24 if kind == "t5" else HIDDEN)
    places = [sizes.place(layer) for layer in range(LAYERS)]
    assert places == [(stack, i) for stack in STACKS for i in range(ENCODER if stack == "encoder" else DECODER)]
    assert Dimensions.of(bert.tiny_base("bert")).place(1) == ("encoder", 1)


# 1. Padding is invisible, in either text.


@pytest.mark.parametrize(("kind", "injection"), EVERY)
def test_a_padded_row_is_the_row_alone(kind, injection):
    model = _model(kind, injection)
    with torch.no_grad():
        alone = [model(input_ids=text[None], decoder_input_ids=target[None]) for text, target in rows()]
        for side in ("left", "right", "holes"):
            for target_side in ("right", "left", "holes"):
                batch = pair(side, target_side)
                output = model(**batch.inputs, use_cache=False)
                for index, expected in enumerate(alone):
                    logits = batch.target.real(output.logits, index)
                    assert_equal(logits, expected.logits[0], f"{side}, {target_side}, row {index}")
                    encoded = batch.source.real(output.encoder_last_hidden_state, index)
                    assert_equal(encoded, expected.encoder_last_hidden_state[0], f"{side}, row {index}")


@pytest.mark.parametrize(("kind", "injection"), SOME)
def test_padding_of_a_target_with_a_cache(kind, injection):
    """At the right it changes nothing, nor in front of a text whose distances alone count; else it is refused."""
    model, batch = _model(kind, injection), pair("left", "right")
    real = batch.target.attention_mask.bool()
    expected = model(**batch.inputs, use_cache=False).logits[real]
    assert_equal(model(**batch.inputs).logits[real], expected)
    left = pair("left", "left")
    if kind == "t5":
        assert_equal(model(**left.inputs).logits[left.target.attention_mask.bool()], expected)
    for side in ("left", "holes")[kind == "t5" :]:
        with pytest.raises(ValueError, match="decoder_attention_mask must have its padding at the right"):
            model(**pair("left", side).inputs)


@pytest.mark.parametrize(("kind", "injection"), SOME)
def test_a_row_of_padding_alone_is_finite_and_harmless(kind, injection):
    model = _model(kind, injection)
    (text, target), *_ = rows()
    batch = Pair(padded([text, text[:0]], "left"), padded([target, target[:0]], "right"))
    output = model(**batch.inputs, use_cache=False)
    assert torch.isfinite(output.logits).all()
    alone = model(input_ids=text[None], decoder_input_ids=target[None]).logits[0]
    assert_equal(batch.target.real(output.logits, 0), alone)
    output.logits[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.adapters.parameters() if p.grad is not None)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_decoder_inputs_that_bart_derives_from_the_text(injection):
    model = _model("bart", injection, "FEATURE_EXTRACTION")
    texts = text_rows()
    with torch.no_grad():
        alone = [model(input_ids=row[None], output_hidden_states=True) for row in texts]
        for side in ("left", "right", "holes"):
            batch = padded(texts, side)
            output = model(**batch.inputs, output_hidden_states=True)
            for index, expected in enumerate(alone):
                for name in ("last_hidden_state", "encoder_last_hidden_state"):
                    assert_equal(batch.real(output[name], index), expected[name][0], f"{name}, {side}, row {index}")
                for name in ("decoder_hidden_states", "encoder_hidden_states"):
                    for got, wanted in zip(output[name], expected[name], strict=True):
                        assert_equal(batch.real(got, index), wanted[0], f"{name}, {side}, row {index}")


# 2. Rows cannot be packed.


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids", "cu_seq_lens_q"])
def test_what_an_encoder_decoder_does_not_read_is_refused(name):
    for kind in ("t5", "bart"):
        model, batch = _model(kind, "deep"), pair()
        given = {name: torch.zeros_like(batch.source.input_ids)}
        with pytest.raises(ValueError, match=f"{name} must be None"):
            model(**batch.inputs, **given)


def test_packed_rows_in_the_encoder_of_t5_alone():
    model = tiny_model("t5", "deep", "ENCODER")
    texts = text_rows(5, 1, 7)
    positions = torch.cat([torch.arange(len(row)) for row in texts])[None]
    states = model(input_ids=torch.cat(texts)[None], position_ids=positions).last_hidden_state[0]
    for row, got in zip(texts, states.split([5, 1, 7])):
        assert_equal(got, model(input_ids=row[None]).last_hidden_state[0])


# 3. Gradient checkpointing changes nothing.


@pytest.mark.parametrize(("kind", "injection"), EVERY)
def test_checkpointed_gradients_are_plain_gradients(kind, injection):
    model = _model(kind, injection).train()
    batch, calls = pair(), []
    for stack in (getattr(model.base_model, "model", model.base_model).encoder, model.base_model.get_decoder()):
        layer = (stack.block if kind.startswith("t5") else stack.layers)[0]
        next(layer.children()).register_forward_pre_hook(lambda *_: calls.append(1))
        next(module for module in layer.modules() if isinstance(module, torch.nn.Linear)).register_forward_pre_hook(
            lambda *_: calls.append(1)
        )

    def gradients():
        calls.clear()
        model.zero_grad()
        model(**batch.source.inputs, labels=batch.labels).loss.backward()
        return {n: p.grad.clone() for n, p in model.adapters.named_parameters()}, len(calls)

    plain, plain_calls = gradients()
    model.gradient_checkpointing_enable()
    recomputed, recomputed_calls = gradients()
    assert recomputed_calls > plain_calls, "nothing was recomputed"
    assert plain and all(grad.abs().max() > 0 for grad in plain.values())
    for name, grad in plain.items():
        assert_equal(recomputed[name], grad, name)
    with pytest.raises(ValueError, match="use_reentrant must be False"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


# 4. A disabled prompt is the bare model; an enabled one is not.


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("kind", "injection"), EVERY)
def test_disabled_is_the_bare_model_bit_for_bit(kind, injection, attention):
    changes = {"attn_implementation": attention}
    base, model = tiny_base(kind, **changes), _model(kind, injection, base_changes=changes)
    batch = pair("right")
    with torch.no_grad():
        bare = base(**batch.inputs).logits
        prompted = model(**batch.inputs).logits
        with model.disable_adapter():
            assert torch.equal(model(**batch.inputs).logits, bare)
        assert torch.equal(model(**batch.inputs).logits, prompted)
        assert_differs(prompted, bare)
        returned = model.unload()
        assert torch.equal(returned(**batch.inputs).logits, bare)
    inner = [m.config._attn_implementation for m in returned.modules() if isinstance(m, transformers.PreTrainedModel)]
    assert set(inner) == {attention}


# 5. A batch of different adapters is each adapter alone.


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_per_row(kind):
    task = "SEQ_2_SEQ_LM"
    model = _model(kind, "deep")
    model.add_adapter("long", tiny_prompts("prefix", task, length=11))
    model.add_adapter("cross", tiny_prompts("deep", task, length=2, layers=(1,), stacks=("cross",)))
    model.add_adapter("gated", tiny_prompts("deep", task, length=4, prompt_init="gated"))
    torch.nn.init.normal_(model.adapters["gated"].encoder.gate)
    names = ["long", "default", "cross", "gated", "__base__"]
    if kind.startswith("bart"):
        model.add_adapter("shifted", tiny_prompts("prefix", task, length=3, position_offset=3, stacks=("decoder",)))
        names.append("shifted")
    model.eval().adapters.requires_grad_(True)
    texts, targets = text_rows(5, 2, 7, 4, 3, 6)[: len(names)], text_rows(4, 6, 3, 2, 5, 4, seed=5)[: len(names)]
    batch = Pair(padded(texts, "left"), padded(targets, "right"))
    mixed = model(**batch.inputs, adapter_names=names).logits
    mixed[batch.target.attention_mask.bool()].sum().backward()
    grads = {name: p.grad.clone() for name, p in model.adapters.named_parameters()}
    model.zero_grad()
    for index, name in enumerate(names):
        alone = model(input_ids=texts[index][None], decoder_input_ids=targets[index][None], adapter_names=[name]).logits
        assert_equal(batch.target.real(mixed, index), alone[0], name)
        if name != "__base__":
            alone.sum().backward()
    for name, parameter in model.adapters.named_parameters():
        assert_equal(grads[name], parameter.grad, name)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_adapter_names_that_cannot_be(kind):
    model, batch = _model(kind, "shallow"), pair()
    model.add_adapter("deep", tiny_prompts("deep", "SEQ_2_SEQ_LM"))
    with pytest.raises(ValueError, match="adapter_names must not mix a shallow prompt"):
        model(**batch.inputs, adapter_names=["default", "deep", "deep"])
    with pytest.raises(ValueError, match="adapter_names must name 3 rows; got 2 names"):
        model(**batch.inputs, adapter_names=["default", "default"])
    with pytest.raises(ValueError, match="adapter_names must be one name per row; got 'deep'"):
        model(**batch.inputs, adapter_names="deep")
    with pytest.raises(ValueError, match="adapter must be one of"):
        model(**batch.inputs, adapter_names=["deep", "none", "deep"])
    same = model(**batch.inputs, adapter_names=["default"] * 3).logits
    assert torch.equal(same, model(**batch.inputs).logits)


# 6. Every output has the rows of its text.


@pytest.mark.parametrize(("kind", "injection"), EVERY)
def test_outputs_have_the_rows_of_their_texts(kind, injection):
    model, batch = _model(kind, injection), pair("left")
    output = model(**batch.inputs, output_hidden_states=True)
    assert output.logits.shape == (3, 8, VOCABULARY)
    assert output.encoder_last_hidden_state.shape == (3, 9, HIDDEN)
    assert [tuple(h.shape) for h in output.encoder_hidden_states] == [(3, 9, HIDDEN)] * (ENCODER + 1)
    assert [tuple(h.shape) for h in output.decoder_hidden_states] == [(3, 8, HIDDEN)] * (DECODER + 1)
    assert output[CACHE].get_seq_length() == 8
    real = batch.source.attention_mask.bool()
    assert_equal(output.encoder_hidden_states[-1][real], output.encoder_last_hidden_state[real])
    as_tuple = model(**batch.inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.logits)


@pytest.mark.parametrize(("kind", "injection"), SOME)
def test_encoder_outputs_may_be_given_again(kind, injection):
    """The encoder's states in place of its text; a shallow prompt's virtual rows are part of them."""
    model, batch = _model(kind, injection), pair("left")
    output = model(**batch.inputs)
    given = {name: value for name, value in batch.inputs.items() if name != "input_ids"}
    given["encoder_outputs"] = (output.encoder_last_hidden_state,)
    if injection == "shallow":
        with pytest.raises(ValueError, match="encoder_outputs and attention_mask .*5 virtual tokens"):
            model(**given)
    else:
        assert_equal(model(**given).logits, output.logits)
    with pytest.raises(ValueError, match="must be given"):
        model(encoder_outputs=given["encoder_outputs"], attention_mask=batch.source.attention_mask)


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "input_ids"),
        ({"decoder_input_ids": torch.rand(3, 8)}, "decoder_input_ids must be integers"),
        ({"decoder_attention_mask": torch.ones(3, 9)}, r"decoder_attention_mask must have shape \(3, 8\)"),
        ({"attention_mask": torch.ones(3, 7)}, r"attention_mask must have shape \(3, 9\)"),
        ({"attention_mask": torch.ones(3, 1, 9, 9)}, r"attention_mask must have shape \(B, N\)"),
        ({"decoder_input_ids": torch.ones(4, 8).long(), "decoder_attention_mask": None}, "decoder's 4 rows"),
        ({"labels": torch.full((3, 8), VOCABULARY)}, "labels must lie in"),
        ({"labels": torch.ones(3, 5).long()}, r"labels must have shape \(3, 8\)"),
        ({"output_attentions": True}, "output_attentions must be False"),
        ({"task": "x"}, "task must be None"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_inputs_that_are_refused(kind, change, message):
    with pytest.raises(ValueError, match=message):
        _model(kind, "deep")(**{**pair().inputs, **change})


def test_texts_past_the_table_of_positions_are_refused():
    model = _model("bart", "shallow")
    ids = torch.ones(1, 60).long()
    model(input_ids=ids[:, :59], decoder_input_ids=ids)
    with pytest.raises(ValueError, match="input_ids must leave .* 64 learned positions"):
        model(input_ids=ids, decoder_input_ids=ids)
    shifted = tiny_model("bart", "prefix", position_offset=5)
    with pytest.raises(ValueError, match="decoder_input_ids must leave .* 64 learned positions"):
        shifted(input_ids=ids[:, :59], decoder_input_ids=ids)
    assert _model("t5", "shallow").text_limit() is None and model.text_limit() == 59
    _model("t5", "shallow")(input_ids=ids.repeat(1, 3), decoder_input_ids=ids)


# 7. is in test_encoder_decoder_generation.py. 8. Heads read the text's own tokens.


def _ended(side):
    """Rows that end in the one token that classifiers read."""
    texts = [torch.cat([row[row != 3], torch.tensor([3])]) for row in text_rows()]
    return texts, padded(texts, side)


HEADS = [
    pytest.param(kind, task, id=f"{kind}-{task}")
    for kind, task in [("t5", "SEQ_CLS"), ("t5", "TOKEN_CLS"), ("bart", "SEQ_CLS"), ("bart", "QUESTION_ANS")]
]


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
            bare = tiny_base(kind, task, **changes)(**batch.inputs)
            assert torch.equal(_logits(model(**batch.inputs)), _logits(bare))
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
        sides = zip(_logits(output).unbind(-1), targets.values())
        assert_equal(output.loss, sum(torch.nn.functional.cross_entropy(*side) for side in sides) / 2)
    if task != "TOKEN_CLS":
        with pytest.raises(ValueError, match="decoder_input_ids must be None"):
            model(**batch.inputs, decoder_input_ids=batch.input_ids)


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


def _refused():
    config = PTuningV2Config
    yield "t5", "QUESTION_ANS", config("QUESTION_ANS"), "T5ForQuestionAnswering"
    yield "t5", "FEATURE_EXTRACTION", config("SEQ_CLS", heads={"x": 2}), "heads must be None on T5Model"
    yield "t5", "FEATURE_EXTRACTION", config("SEQ_2_SEQ_LM"), "encoder-decoder of type ...ForConditionalGeneration"
    yield "t5", "ENCODER", config("SEQ_2_SEQ_LM"), "got T5EncoderModel"
    yield "t5", "ENCODER", config("FEATURE_EXTRACTION", stacks=("encoder",)), "stacks must be None"
    yield "t5", "SEQ_2_SEQ_LM", config("FEATURE_EXTRACTION"), "task_type must be 'SEQ_2_SEQ_LM'"
    yield "t5", "SEQ_2_SEQ_LM", config("CAUSAL_LM"), "task_type must be 'SEQ_2_SEQ_LM'"
    yield "bart", "SEQ_2_SEQ_LM", config("CAUSAL_LM"), "must be a causal language model"
    yield "bart", "SEQ_2_SEQ_LM", config("SEQ_CLS"), "must be of type ...ForSequenceClassification"
    yield "t5", "SEQ_2_SEQ_LM", config("SEQ_2_SEQ_LM", layers=(2,)), r"layers must lie in \[-2, 1\]"


@pytest.mark.parametrize(("kind", "task", "config", "message"), [pytest.param(*x, id=x[3]) for x in _refused()])
def test_bases_and_tasks_that_do_not_fit(kind, task, config, message):
    base = tiny_base(kind, task)
    with pytest.raises(ValueError, match=message):
        get_ptv2_model(base, config)
    assert all(parameter.requires_grad for parameter in base.parameters()), "the base was touched"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_attention_heads": 2}, "as many heads in its decoder"),
        ({"encoder_layerdrop": 0.1}, "encoder_layerdrop 0"),
        ({"decoder_layerdrop": 0.1}, "decoder_layerdrop 0"),
    ],
)
def test_barts_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        get_ptv2_model(tiny_base("bart", **changes), PTuningV2Config("SEQ_2_SEQ_LM"))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_stack_alone_is_refused(kind):
    for stack in (tiny_base(kind, "FEATURE_EXTRACTION").encoder, tiny_base(kind, "FEATURE_EXTRACTION").decoder):
        with pytest.raises(ValueError, match="base must"):
            get_ptv2_model(stack, PTuningV2Config("FEATURE_EXTRACTION"))


@pytest.mark.skipif(hasattr(transformers.models.t5.modeling_t5, "ALL_ATTENTION_FUNCTIONS"), reason="it is served")
def test_a_t5_with_an_attention_of_its_own_is_refused():
    config = transformers.T5Config(vocab_size=9, d_model=8, d_kv=2, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="attention interface, which T5 does in later versions"):
        get_ptv2_model(transformers.T5ForConditionalGeneration(config), PTuningV2Config("SEQ_2_SEQ_LM"))


# 9. Save, load, train on.


@pytest.mark.parametrize(("kind", "injection"), EVERY)
def test_saved_and_loaded(kind, injection, tmp_path):
    model, batch = _model(kind, injection), pair()
    model.save_pretrained(tmp_path)
    loaded = PTuningV2Model.from_pretrained(tiny_base(kind), tmp_path, is_trainable=True)
    assert type(loaded) is type(model) and loaded.ptv2_config == model.ptv2_config
    assert torch.equal(loaded(**batch.inputs).logits, model(**batch.inputs).logits)
    for one in (model, loaded):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            one.train()(**batch.source.inputs, labels=batch.labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        one.eval()
    assert torch.equal(loaded(**batch.inputs).logits, model(**batch.inputs).logits)


def test_another_split_of_layers_is_another_base(tmp_path):
    tiny_model("t5", "deep").save_pretrained(tmp_path)
    other = tiny_base("t5", num_layers=1, num_decoder_layers=3)
    with pytest.raises(ValueError, match="trained on another base: decoder_layers 2"):
        PTuningV2Model.from_pretrained(other, tmp_path)


@pytest.mark.parametrize(("kind", "injection"), SOME)
def test_trainer(kind, injection, tmp_path):
    """Labels alone train: the base derives the decoder's inputs; predictions are generated with the prompts."""
    pytest.importorskip("accelerate")
    model, batch = _model(kind, injection), pair()
    examples = [
        {**{name: value[i] for name, value in batch.source.inputs.items()}, "labels": batch.labels[i]} for i in range(3)
    ]
    arguments = transformers.Seq2SeqTrainingArguments(
        tmp_path, max_steps=8, learning_rate=5e-2, per_device_train_batch_size=3, predict_with_generate=True,
        generation_max_length=6, report_to=[], save_strategy="steps", save_steps=8, use_cpu=True, logging_steps=1,
    )  # fmt: skip
    trainer = transformers.Seq2SeqTrainer(model, arguments, train_dataset=examples, eval_dataset=examples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    predicted = trainer.predict(examples).predictions
    expected = model.eval().generate(**batch.source.inputs, max_length=6)
    assert torch.equal(torch.from_numpy(predicted)[:, : expected.shape[1]], expected)
    loaded = PTuningV2Model.from_pretrained(tiny_base(kind), tmp_path / "checkpoint-8")
    assert torch.equal(loaded(**batch.inputs).logits, model(**batch.inputs).logits)


# No tensor of P + N rows, and no saving of a step that is not one.

ROWS, TOKENS, TARGETS, LENGTH = 3, 13, 7, 10
FORBIDDEN = (TOKENS + LENGTH, TARGETS + LENGTH, ROWS * (TOKENS + LENGTH), ROWS * (TARGETS + LENGTH))


def _audited():
    return Pair(padded(text_rows(9, 4, 13), "left", TOKENS), padded(text_rows(7, 3, 5, seed=5), "right", TARGETS))


def _inside_attention(shape):
    """Keys and values (B, H, P + M, d), and masks or biases (1 or B, 1 or H, 1 or N, P + M) of PyTorch's kernel."""
    return len(shape) == 4 and shape[1] in (1, 4) and (shape[3] in (6, 8) or shape[2] in (1, TOKENS, TARGETS))


@pytest.mark.parametrize("injection", ["deep", "prefix"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_p_plus_n_rows(kind, injection):
    model, batch = _model(kind, injection, length=LENGTH).train(), _audited()
    audit = ShapeAudit(*FORBIDDEN, allowed=_inside_attention)
    with audit:
        model(**batch.inputs, labels=batch.labels, output_hidden_states=True).loss.backward()
    assert audit.hits == [] and audit.calls["cat"] > 0
    generating = ShapeAudit(*FORBIDDEN, allowed=_inside_attention)
    with generating:
        model.eval().generate(**batch.source.inputs, max_new_tokens=2, do_sample=False)
    assert generating.hits == []
    literally = ShapeAudit(*FORBIDDEN, allowed=_inside_attention)
    base = tiny_base(kind)
    with literally:
        literal(model, getattr(base, "model", base), *batch.inputs.values())[0].sum().backward()
    assert literally.hits, "the audit could not fail"


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_shallow_rows_are_joined_once(kind):
    """They are real rows of the encoder, whatever the number of its layers."""
    joined = []
    for layers in (2, 4):
        changes = {"num_layers" if kind == "t5" else "encoder_layers": layers}
        model, batch = _model(kind, "shallow", length=LENGTH, base_changes=changes).train(), _audited()
        audit = ShapeAudit(*FORBIDDEN)
        with audit:
            model(**batch.inputs, labels=batch.labels).loss.backward()
        assert audit.hits
        joined.append({name: audit.calls[name] for name in ("cat", "slice", "slice_backward", "index")})
    assert joined[0] == joined[1]


def test_savings_of_a_step_are_off_and_say_why(caplog):
    options = StepOptions(unpad=True, fused_projections=True, compile_layers=True, last_rows=True)
    for kind in ("t5", "bart"):
        model, batch = _model(kind, "deep"), pair()
        model.step_options = options
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="ptv2_fast"):
            expected = model(**batch.inputs, use_cache=False).logits
            logits = model.train()(**batch.inputs).logits
        assert torch.equal(logits, expected)
        assert "unpad off (an encoder-decoder runs its padded rows as they are)" in caplog.text
        assert " on (" not in caplog.text


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_graph_runner_runs_padded_steps(kind, caplog):
    model, batch = _model(kind, "deep").train(), {**pair().source.inputs, "labels": pair().labels}
    with torch.no_grad():
        expected = model(**batch).loss
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with caplog.at_level(logging.INFO, logger="ptv2_fast"):
        runner = GraphRunner(model, optimizer)
        assert_equal(runner.step(batch), expected)
    assert "an encoder-decoder runs its padded rows as they are" in caplog.text
    assert runner.step(batch) < expected


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_triton_backend_is_not_replaced(kind):
    """A backend that was asked for serves, or says that it cannot."""
    model = _model(kind, "deep", backend="reference")
    assert_equal(model(**pair().inputs).logits, _model(kind, "deep")(**pair().inputs).logits)
