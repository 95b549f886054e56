"""What must hold for every family and injection, whatever the task."""

from __future__ import annotations

import pytest
import torch

from batches import packed, padded, text_rows
from ptv2_fast import HeadConfig
from ptv2_fast.families.registry import family_of
from ptv2_fast.inputs.cache import CACHE
from tiny_models import (
    DECODERS,
    DISTINCT,
    ENCODERS,
    FAMILIES,
    FROM_PADDING,
    HIDDEN,
    INJECTIONS,
    LABELS,
    VOCABULARY,
    tiny_base,
    tiny_model,
    tiny_prompts,
)
from tolerances import assert_differs, assert_equal, assert_same_bits

EVERY = [pytest.param(family, injection, id=f"{family}-{injection}") for family in FAMILIES for injection in INJECTIONS]
# A shallow prompt on an encoder is real rows of the batch, so it is shared by all of them.
PER_ROW = [p for p in EVERY if not (p.values[0] in ENCODERS and p.values[1] == "shallow")]
# What heads and pooling are tested on.
SOME = [p for p in EVERY if p.values[0] in DISTINCT]
TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def _task_of(family: str) -> str:
    return "CAUSAL_LM" if family in DECODERS else "TOKEN_CLS"


# 1. Padding is invisible.


@pytest.mark.parametrize(("family", "injection"), EVERY)
def test_a_padded_row_is_the_row_alone(family, injection):
    model = tiny_model(family, injection, _task_of(family))
    rows = text_rows()
    with torch.no_grad():
        alone = [model(input_ids=row[None]).logits[0] for row in rows]
        for side in ("left", "right", "holes"):
            batch = padded(rows, side)
            logits = model(**batch.inputs).logits
            for index, expected in enumerate(alone):
                assert_equal(batch.real(logits, index), expected, f"{side}, row {index}")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("family", "injection"), SOME)
def test_padding_is_invisible_to_the_base_heads(family, injection, task):
    """[CLS] and last-token heads of the base read the text's own token, on any side."""
    model = tiny_model(family, injection, task)
    rows = text_rows()
    with torch.no_grad():
        alone = [_logits(model(input_ids=row[None]))[0] for row in rows]
        for side in ("right", "left"):
            batch = padded(rows, side)
            logits = _logits(model(**batch.inputs))
            for index, expected in enumerate(alone):
                own = logits[index] if task == "SEQ_CLS" else batch.real(logits, index)
                assert_equal(own, expected, f"{side}, row {index}")


def _logits(output):
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return output.logits


@pytest.mark.parametrize(("family", "injection"), EVERY)
def test_a_row_of_padding_alone_is_finite_and_harmless(family, injection):
    model = tiny_model(family, injection)
    rows = text_rows(5)
    batch = padded([*rows, rows[0][:0]], "left")
    states = model(**batch.inputs).last_hidden_state
    assert torch.isfinite(states).all()
    assert_equal(batch.real(states, 0), model(input_ids=rows[0][None]).last_hidden_state[0])
    states[0].sum().backward()
    for parameter in model.adapters.parameters():
        assert torch.isfinite(parameter.grad).all()


# 2. Packed rows are separate rows.


@pytest.mark.parametrize(("family", "injection"), PER_ROW)
def test_packed_rows_are_separate_rows(family, injection):
    model = tiny_model(family, injection, _task_of(family), position_offset=None)
    rows = text_rows(5, 1, 7, 3)
    joined = packed(rows)
    if family in FROM_PADDING:
        joined["position_ids"] += 2
    logits = model(**joined).logits
    pieces = logits[0].split([len(row) for row in rows])
    loss = sum((piece**2).mean() for piece in pieces)
    alone = [model(input_ids=row[None]).logits[0] for row in rows]
    expected_loss = sum((one**2).mean() for one in alone)
    for piece, expected in zip(pieces, alone, strict=True):
        assert_equal(piece, expected)
    parameters = list(model.adapters.parameters())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    expected_grads = torch.autograd.grad(expected_loss, parameters, allow_unused=True)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_equal(grad, expected, "gradient")


@pytest.mark.parametrize("injection", ["deep", "prefix"])
def test_packed_rows_may_have_their_own_adapter(injection):
    model = tiny_model("llama", injection, "CAUSAL_LM")
    model.add_adapter("other", tiny_prompts(injection, "CAUSAL_LM", length=3))
    first, second = packed(text_rows(3, 4)), packed(text_rows(2, 5, seed=8))
    both = {name: torch.cat([first[name], second[name]]) for name in first}
    with torch.no_grad():
        mixed = model(**both, adapter_names=["other", "default"]).logits
        for index, (one, name) in enumerate([(first, "other"), (second, "default")]):
            model.set_adapter(name)
            assert_equal(mixed[index], model(**one).logits[0])


@pytest.mark.parametrize("family", ENCODERS)
def test_packing_is_refused_where_virtual_tokens_are_rows(family):
    model = tiny_model(family, "shallow")
    with pytest.raises(ValueError, match="position_ids .*must not pack rows"):
        model(**packed(text_rows(3, 4)))


# 3. Gradient checkpointing changes nothing.


@pytest.mark.parametrize(("family", "injection"), EVERY)
def test_checkpointed_gradients_are_plain_gradients(family, injection):
    task = _task_of(family)
    model = tiny_model(family, injection, task).train()
    if not model.backbone.supports_gradient_checkpointing:
        assert family in ("albert", "mpnet")
        with pytest.raises(ValueError, match="does not support (gradient|activation) checkpointing"):
            model.gradient_checkpointing_enable()
        return
    batch = padded(text_rows(), "left")
    labels = batch.input_ids if task == "CAUSAL_LM" else batch.input_ids % LABELS
    labels = labels.masked_fill(batch.attention_mask == 0, -100)
    calls = []
    layer = family_of(model.backbone).layers(model.backbone)[0]
    # A hook before its first part: the layer's own hooks stand outside of what is recomputed.
    next(layer.children()).register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        calls.clear()
        model.zero_grad()
        model(**batch.inputs, labels=labels).loss.backward()
        grads = {n: p.grad.clone() for n, p in model.adapters.named_parameters()}
        return grads, len(calls)

    plain, plain_calls = gradients()
    model.gradient_checkpointing_enable()
    recomputed, recomputed_calls = gradients()
    assert recomputed_calls > plain_calls, "nothing was recomputed"
    assert plain and all(grad.abs().max() > 0 for grad in plain.values())
    for name, grad in plain.items():
        assert_equal(recomputed[name], grad, name)


def test_reentrant_checkpointing_is_refused():
    model = tiny_model("bert", "deep", "TOKEN_CLS").train()
    with pytest.raises(ValueError, match="use_reentrant must be False"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    base = model.base_model
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="non-reentrant"):
        model(**padded(text_rows(), "left").inputs)


# 4. A disabled prompt is the bare model; an enabled one is not.


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "injection"), SOME)
def test_disabled_is_the_bare_model_bit_for_bit(family, injection, attention):
    task = _task_of(family)
    changes = {"attn_implementation": attention}
    base = tiny_base(family, task, **changes).requires_grad_(False)
    model = tiny_model(family, injection, task, base_changes=changes)
    batch = padded(text_rows(), "left")
    with torch.no_grad():
        bare = base(**batch.inputs).logits
        prompted = model(**batch.inputs).logits
        with model.disable_adapter():
            assert_same_bits(model(**batch.inputs).logits, bare)
            with model.disable_adapter():
                assert_same_bits(model(**batch.inputs).logits, bare)
            assert_same_bits(model(**batch.inputs).logits, bare)
        with pytest.raises(KeyError), model.disable_adapter():
            raise KeyError
        assert_same_bits(model(**batch.inputs).logits, prompted)
    real = batch.attention_mask.bool()
    alone = [base(input_ids=row[None]).logits[0] for row in text_rows()]
    assert_differs(prompted[real], torch.cat(alone))


@pytest.mark.parametrize("task", TASKS)
def test_disabled_has_the_heads_of_the_base(task):
    base, model = tiny_base("bert", task).requires_grad_(False), tiny_model("bert", "deep", task)
    with torch.no_grad():
        for parameter in model.adapters["default"].base_heads.parameters():
            parameter += 1.0
        batch = padded(text_rows(), "right")
        with model.disable_adapter():
            assert_same_bits(_logits(model(**batch.inputs)), _logits(base(**batch.inputs)))


def test_unloaded_is_the_bare_model():
    base = tiny_base("llama", "CAUSAL_LM").requires_grad_(False)
    returned = tiny_model("llama", "prefix", "CAUSAL_LM").unload()
    batch = padded(text_rows(), "right")
    assert_same_bits(returned(**batch.inputs).logits, base(**batch.inputs).logits)


# 5. A batch of different adapters is each adapter alone.


@pytest.mark.parametrize("family", FAMILIES)
def test_one_adapter_per_row(family):
    task = _task_of(family)
    heads = None if task == "CAUSAL_LM" else {"tags": 3}
    task_model = "FEATURE_EXTRACTION" if heads else task
    model = tiny_model_with(family, task, task_model, heads, length=5)
    model.add_adapter("long", tiny_prompts("prefix", task, length=11, heads=heads))
    model.add_adapter("top", tiny_prompts("deep", task, length=2, layers=(1,), heads=heads))
    model.add_adapter("gated", _opened_gate(task, heads))
    torch.nn.init.normal_(model.adapters["gated"].encoder.gate)
    names = ["long", "default", "top", "gated", "long"]
    if family in DECODERS:
        model.add_adapter("shallow", tiny_prompts("shallow", task, length=7))
        names += ["shallow", "__base__"]
    model.eval()
    rows = text_rows(5, 2, 7, 4, 3, 6, 5)[: len(names)]
    for side in ("left", "right"):
        batch = padded(rows, side)
        with torch.no_grad():
            mixed = model(**batch.inputs, adapter_names=names).logits
            for index, name in enumerate(names):
                alone = model(input_ids=rows[index][None], adapter_names=[name]).logits[0]
                assert_equal(batch.real(mixed, index), alone, f"{side}: {name}")


def tiny_model_with(family, task, base_task, heads, length):
    from ptv2_fast import get_ptv2_model

    base = tiny_base(family, base_task)
    return get_ptv2_model(base, tiny_prompts("deep", task, length=length, heads=heads)).eval()


def _opened_gate(task, heads):
    return tiny_prompts("deep", task, length=4, heads=heads, prompt_init="gated")


@pytest.mark.parametrize("family", DECODERS)
def test_a_base_row_is_the_bare_model(family):
    model = tiny_model(family, "deep", "CAUSAL_LM")
    rows = text_rows(5, 6)
    batch = padded(rows, "left")
    with torch.no_grad():
        mixed = model(**batch.inputs, adapter_names=["default", "__base__"]).logits
        bare = tiny_base(family, "CAUSAL_LM")(input_ids=rows[1][None]).logits[0]
        assert_equal(batch.real(mixed, 1), bare)
        everywhere = model(input_ids=rows[1][None], adapter_names=["__base__"]).logits[0]
        assert_equal(everywhere, bare)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_mixed_rows_reach_every_adapter(family):
    model = tiny_model(family, "deep")
    model.add_adapter("other", tiny_prompts("prefix", length=3))
    model.adapters.requires_grad_(True)
    batch = padded(text_rows(), "right")
    names = ["other", "default", "other"]
    real = batch.attention_mask.bool()
    model(**batch.inputs, adapter_names=names).last_hidden_state[real].sum().backward()
    mixed = {n: p.grad.clone() for n, p in model.adapters.named_parameters()}
    model.zero_grad()
    for index, name in enumerate(names):
        row = text_rows()[index][None]
        model(input_ids=row, adapter_names=[name]).last_hidden_state.sum().backward()
    for name, parameter in model.adapters.named_parameters():
        assert_equal(mixed[name], parameter.grad, name)


@pytest.mark.parametrize("family", ENCODERS)
def test_shallow_on_an_encoder_refuses_mixed_rows(family):
    model = tiny_model(family, "shallow")
    model.add_adapter("deep", tiny_prompts("deep"))
    batch = padded(text_rows(), "right")
    with pytest.raises(ValueError, match="adapter_names must not mix a shallow prompt"):
        model(**batch.inputs, adapter_names=["default", "deep", "deep"])
    same = model(**batch.inputs, adapter_names=["default"] * 3).last_hidden_state
    assert_same_bits(same, model(**batch.inputs).last_hidden_state)


# 6. Every output has the text's N rows.


@pytest.mark.parametrize(("family", "injection"), SOME)
def test_outputs_have_the_rows_of_the_text(family, injection):
    batch = padded(text_rows(), "left")
    states = {"output_hidden_states": True}
    model = tiny_model(family, injection)
    output = model(**batch.inputs, **states)
    assert output.last_hidden_state.shape == (3, 9, HIDDEN)
    assert [tuple(h.shape) for h in output.hidden_states] == [(3, 9, HIDDEN)] * 3
    real = batch.attention_mask.bool()
    assert_equal(output.hidden_states[-1][real], output.last_hidden_state[real])
    expected = {"SEQ_CLS": (3, LABELS), "TOKEN_CLS": (3, 9, LABELS), "QUESTION_ANS": (3, 9, 2)}
    for task, shape in expected.items():
        model = tiny_model(family, injection, task)
        assert _logits(model(**batch.inputs)).shape == shape
    if family in DECODERS:
        output = tiny_model(family, injection, "CAUSAL_LM")(**batch.inputs, **states)
        assert output.logits.shape == (3, 9, VOCABULARY)
        assert [tuple(h.shape) for h in output.hidden_states] == [(3, 9, HIDDEN)] * 3
        assert output[CACHE].get_seq_length() == 9


@pytest.mark.parametrize(("family", "injection"), SOME)
def test_hidden_states_are_those_of_the_text(family, injection):
    """Every layer's states at the text's rows, whatever the padding: none is shifted by P."""
    model = tiny_model(family, injection)
    rows = text_rows()
    batch = padded(rows, "left")
    with torch.no_grad():
        states = model(**batch.inputs, output_hidden_states=True).hidden_states
        for index, row in enumerate(rows):
            alone = model(input_ids=row[None], output_hidden_states=True).hidden_states
            for layer, expected in enumerate(alone):
                assert_equal(batch.real(states[layer], index), expected[0], f"layer {layer}")


# 8. Pooling reads the text's own tokens.


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
@pytest.mark.parametrize(("family", "injection"), SOME)
def test_own_heads_pool_the_texts_own_tokens(family, injection, pooling):
    heads = {"label": HeadConfig("SEQ_CLS", 4, pooling=pooling)}
    model = _backbone_model(family, injection, heads)
    rows = text_rows()
    head = model.adapters["default"].heads["label"].linear
    pool = {"first": lambda states: states[0], "last": lambda states: states[-1], "mean": lambda states: states.mean(0)}
    with torch.no_grad():
        alone = [model.run(model.backbone, {"input_ids": row[None]}).last_hidden_state[0] for row in rows]
        for side in ("left", "right", "holes"):
            logits = model(**padded(rows, side).inputs).logits
            for index, states in enumerate(alone):
                assert_equal(logits[index], head(pool[pooling](states)), f"{side}, row {index}")


def _backbone_model(family, injection, heads):
    from ptv2_fast import get_ptv2_model

    config = tiny_prompts(injection, "SEQ_CLS", heads=heads)
    return get_ptv2_model(tiny_base(family), config).eval()
