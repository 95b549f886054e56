"""What must hold for every encoder-decoder and injection, whatever the task."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
import transformers

import tiny_models as bert
from batches import padded, text_rows
from ptv2_fast import PTuningV2Model
from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.families.dimensions import Dimensions
from ptv2_fast.families.registry import family_of
from ptv2_fast.inputs.cache import CACHE
from tiny_models import HIDDEN, INJECTIONS, VOCABULARY, tiny_prompts
from tiny_seq2seq import (
    DECODER,
    ENCODER,
    KINDS,
    LAYERS,
    STACKS,
    Pair,
    pair,
    rows,
    tiny_base,
    tiny_model,
)
from tolerances import assert_differs, assert_equal, assert_same_bits

EVERY = [pytest.param(kind, injection, id=f"{kind}-{injection}") for kind in KINDS for injection in INJECTIONS]
SOME = [p for p in EVERY if p.values[0] in ("t5", "bart", "mbart")]


def _model(kind, injection, *arguments, **config):
    stacks = {} if injection == "shallow" else {"stacks": STACKS}
    return tiny_model(kind, injection, *arguments, **stacks, **config)


def test_the_families_are_these():
    for kind in ("t5", "bart", "mbart"):
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
@pytest.mark.parametrize("kind", ["bart", "mbart"])
def test_decoder_inputs_that_the_base_derives_from_the_text(kind, injection):
    """BART starts them with one token, mBART with the text's last one; ids in slots of padding change nothing."""
    model = _model(kind, injection, "FEATURE_EXTRACTION")
    texts = text_rows()
    with torch.no_grad():
        alone = [model(input_ids=row[None], output_hidden_states=True) for row in texts]
        for side in ("left", "right", "holes"):
            batch = padded(texts, side)
            batch.input_ids[batch.attention_mask == 0] = 7
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
    for row, got in zip(texts, states.split([5, 1, 7]), strict=True):
        assert_equal(got, model(input_ids=row[None]).last_hidden_state[0])


# 3. Gradient checkpointing changes nothing.


@pytest.mark.parametrize(("kind", "injection"), EVERY)
def test_checkpointed_gradients_are_plain_gradients(kind, injection):
    model = _model(kind, injection).train()
    batch, calls = pair(), []
    for stack in (getattr(model.base_model, "model", model.base_model).encoder, model.base_model.get_decoder()):
        layer = (stack.block if "t5" in kind else stack.layers)[0]
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
    base.requires_grad_(False)
    batch = pair("right")
    with torch.no_grad():
        bare = base(**batch.inputs).logits
        prompted = model(**batch.inputs).logits
        with model.disable_adapter():
            assert_same_bits(model(**batch.inputs).logits, bare)
        assert_same_bits(model(**batch.inputs).logits, prompted)
        assert_differs(prompted, bare)
        returned = model.unload()
        assert_same_bits(returned(**batch.inputs).logits, bare)
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
    if "bart" in kind:
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
    with pytest.raises(ValueError, match="adapter_names must be one name per row; got the string 'deep'"):
        model(**batch.inputs, adapter_names="deep")
    with pytest.raises(ValueError, match="adapter must be one of"):
        model(**batch.inputs, adapter_names=["deep", "none", "deep"])
    same = model(**batch.inputs, adapter_names=["default"] * 3).logits
    assert_same_bits(same, model(**batch.inputs).logits)


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
    assert isinstance(as_tuple, tuple)
    assert_same_bits(as_tuple[0], output.logits)


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
    words = model.get_input_embeddings()(batch.source.input_ids)
    for text in ({"encoder_outputs": given["encoder_outputs"]}, {"inputs_embeds": words}):
        with pytest.raises(ValueError, match=f"decoder_input_ids must be given with {next(iter(text))}"):
            model(**text, attention_mask=batch.source.attention_mask)


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


# 7. is in test_encoder_decoder_generation.py, 8. in test_encoder_decoder_heads.py.


# 9. Save, load, train on.


@pytest.mark.parametrize(("kind", "injection"), EVERY)
def test_saved_and_loaded(kind, injection, tmp_path):
    model, batch = _model(kind, injection), pair()
    model.save_pretrained(tmp_path)
    loaded = PTuningV2Model.from_pretrained(tiny_base(kind), tmp_path, is_trainable=True).eval()
    assert type(loaded) is type(model) and loaded.ptv2_config == model.ptv2_config
    assert_same_bits(loaded(**batch.inputs).logits, model(**batch.inputs).logits)
    for one in (model, loaded):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            one.train()(**batch.source.inputs, labels=batch.labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        one.eval()
    assert_same_bits(loaded(**batch.inputs).logits, model(**batch.inputs).logits)


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
    # Trainer switches the cache off, out of which keys come in another layout.
    inputs = {**batch.inputs, "use_cache": False}
    assert_same_bits(loaded(**inputs).logits, model.requires_grad_(False)(**inputs).logits)


@pytest.mark.parametrize("kind", ["t5", "bart", "mbart"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_prompt_that_does_not_reach_its_layer_is_noticed(kind, stack):
    """A base that drops the keyword argument would run as if there were no prompt."""
    model, batch = _model(kind, "deep"), pair()
    part = getattr(backbone_of(model.base_model), stack)
    layer = (part.block if kind == "t5" else part.layers)[1]
    attend = type(layer).forward
    layer.forward = MethodType(lambda self, *args, ptv2_prompts=None, **kwargs: attend(self, *args, **kwargs), layer)
    missing = r"\[1\]" if stack == "encoder" else r"\[4, 6\]"
    for call in (lambda: model(**batch.inputs), lambda: model.generate(**batch.source.inputs, max_new_tokens=2)):
        with pytest.raises(RuntimeError, match=f"did not reach layers {missing}"):
            call()
    attend = layer.forward
    layer.forward = lambda *args, **kwargs: attend(*args, **kwargs)
    with pytest.raises(RuntimeError, match="the forward of a .* was set to a function"):
        model(**batch.inputs)
    del layer.forward
    model(**batch.inputs)
