"""Encoder-decoders against their literal forms: outputs and prompt gradients, in float64."""

from __future__ import annotations

import pytest
import torch

from ptv2_fast import PTuningV2Config, get_ptv2_model
from ptv2_fast.families.registry import family_of
from tiny_folders import tiny_tokenizer
from tiny_models import INJECTIONS
from tiny_seq2seq import (
    DECODER,
    ENCODER,
    KINDS,
    LAYERS,
    STACKS,
    literal,
    literal_logits,
    pair,
    tiny_base,
    tiny_model,
)
from tolerances import assert_differs, assert_equal, assert_same_bits

EVERY = [pytest.param(kind, injection, id=f"{kind}-{injection}") for kind in KINDS for injection in INJECTIONS]
SIDES = [("left", "right"), ("right", "left"), ("holes", "holes")]


def _compare(model, base, batch):
    """Logits, encoder states and the gradients of everything trained, fast against literal."""
    parameters = dict(model.adapters["default"].encoder.named_parameters())
    source, target = batch.source.attention_mask.bool(), batch.target.attention_mask.bool()
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(*target.shape, 40, dtype=base.dtype, generator=generator)[target]

    def gradients(logits):
        return torch.autograd.grad((logits[target] * weights).sum(), list(parameters.values()))

    fast = model(**batch.inputs, use_cache=False)
    states, encoded = literal(model, getattr(base, "model", base), *batch.inputs.values())
    logits = literal_logits(base, states)
    assert_equal(fast.logits[target], logits[target], "logits")
    assert_equal(fast.encoder_last_hidden_state[source], encoded[source], "encoder states")
    for name, grad, expected in zip(parameters, gradients(fast.logits), gradients(logits), strict=True):
        assert grad.abs().max() > 1e-6, f"{name} gets no gradient"
        assert_equal(grad, expected, f"gradient of {name}")
    return fast.logits[target]


@pytest.mark.parametrize(("side", "target_side"), SIDES, ids=["left", "right", "holes"])
@pytest.mark.parametrize(("kind", "injection"), EVERY)
def test_float64(kind, injection, side, target_side):
    model = tiny_model(kind, injection, exact=True)
    _compare(model, tiny_base(kind, exact=True), pair(side, target_side))


@pytest.mark.parametrize(("kind", "injection"), EVERY)
def test_float32(kind, injection):
    model = tiny_model(kind, injection)
    _compare(model, tiny_base(kind), pair())


@pytest.mark.parametrize("stacks", [("encoder",), ("decoder",), ("cross",), STACKS], ids="+".join)
@pytest.mark.parametrize("injection", ["deep", "prefix"])
@pytest.mark.parametrize("kind", KINDS)
def test_stacks(kind, injection, stacks):
    """Each attention alone, and all of them; what is not named has no prompt."""
    model = tiny_model(kind, injection, exact=True, stacks=stacks)
    sizes = {"encoder": ENCODER, "decoder": DECODER, "cross": DECODER}
    assert len(model.adapters["default"].encoder.layers) == sum(sizes[stack] for stack in stacks)
    some = _compare(model, tiny_base(kind, exact=True), pair())
    batch = pair()
    bare = tiny_base(kind, exact=True)(**batch.inputs, use_cache=False).logits[batch.target.attention_mask.bool()]
    assert_differs(some, bare)


@pytest.mark.parametrize("layers", [(0,), (-1, 0)], ids=str)
@pytest.mark.parametrize("injection", ["deep", "prefix"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_layers_count_inside_each_stack(kind, injection, layers):
    model = tiny_model(kind, injection, exact=True, layers=layers, stacks=STACKS)
    starts = {0: (0, ENCODER, ENCODER + DECODER), -1: (ENCODER - 1, ENCODER + DECODER - 1, LAYERS - 1)}
    assert model.adapters["default"].encoder.layers == tuple(sorted(i for layer in layers for i in starts[layer]))
    _compare(model, tiny_base(kind, exact=True), pair())


@pytest.mark.parametrize("injection", ["deep", "prefix"])
@pytest.mark.parametrize("kind", ["t5", "bart", "mbart"])
def test_mlp_and_gate(kind, injection):
    model = tiny_model(kind, injection, exact=True, reparameterization=12, prompt_init="gated", stacks=STACKS)
    base, batch = tiny_base(kind, exact=True), pair("right")
    with torch.no_grad():
        bare = base(**batch.inputs, use_cache=False).logits[batch.target.attention_mask.bool()]
        closed = model(**batch.inputs, use_cache=False).logits[batch.target.attention_mask.bool()]
        # T5 does not scale its scores, so that e^-10 of the mass is not as little as elsewhere.
        assert 0 < (closed - bare).norm() / bare.norm() < 0.2
        model.adapters["default"].encoder.mlp[2].weight.mul_(3.0)
        model.adapters["default"].encoder.gate.copy_(torch.randn(LAYERS, 4, 5))
    assert_differs(_compare(model, base, batch), bare)


@pytest.mark.parametrize("length", [1, 17])
@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("kind", ["t5", "bart", "mbart"])
def test_prompt_lengths(kind, injection, length):
    model = tiny_model(kind, injection, exact=True, length=length)
    _compare(model, tiny_base(kind, exact=True), pair())


@pytest.mark.parametrize("stacks", [None, ("encoder",), ("decoder",)], ids=str)
def test_position_offset_shifts_the_learned_positions_of_the_stacks(stacks):
    model = tiny_model("bart", "prefix", exact=True, position_offset=5, stacks=stacks)
    shifted = _compare(model, tiny_base("bart", exact=True), pair())
    plain = tiny_model("bart", "prefix", exact=True, stacks=stacks)
    plain.adapters["default"].load_state_dict(model.adapters["default"].state_dict())
    batch = pair()
    logits = plain(**batch.inputs, use_cache=False).logits[batch.target.attention_mask.bool()]
    assert_differs(shifted, logits)


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("kind", ["t5", "bart-scaled", "mbart"])
def test_embeddings_in_place_of_ids(kind, injection):
    model, batch = tiny_model(kind, injection, exact=True), pair()
    words = model.backbone.get_input_embeddings()
    given = {**batch.inputs, "inputs_embeds": words(batch.source.input_ids)}
    given["decoder_inputs_embeds"] = words(batch.target.input_ids)
    by_ids = model(**batch.inputs, use_cache=False).logits
    for name in ("input_ids", "decoder_input_ids"):
        del given[name]
    assert_equal(model(**given, use_cache=False).logits, by_ids)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("injection", INJECTIONS)
def test_the_encoder_of_t5_alone(injection, side):
    model, base = tiny_model("t5", injection, "ENCODER", exact=True), tiny_base("t5", "ENCODER", exact=True)
    batch = pair(side).source
    real = batch.attention_mask.bool()
    output = model(**batch.inputs, output_hidden_states=True)
    _, expected = literal(model, base, *batch.inputs.values())
    assert_equal(output.last_hidden_state[real], expected[real])
    assert [tuple(states.shape) for states in output.hidden_states] == [(3, 9, 32)] * (ENCODER + 1)
    parameter = model.adapters["default"].encoder.prompts
    weights = torch.randn_like(expected[real])
    fast, slow = (
        torch.autograd.grad((states[real] * weights).sum(), parameter)[0]
        for states in (output.last_hidden_state, expected)
    )
    assert_equal(fast, slow, "gradient")


def test_a_far_prompt_has_the_last_bucket_of_a_really_far_token():
    """What is defined as far is what T5's own buckets make of any distance past its largest."""
    base = tiny_base("t5")
    known = family_of(base)
    far = {"encoder": 0, "decoder": ENCODER}
    for stack, layer in far.items():
        attention = getattr(base, stack).block[0].layer[0].SelfAttention
        _, bias = known.far_keys_and_bias(base, layer + 1, torch.zeros(4, 3, 6))
        own = attention.compute_bias(100, 100)[0, :, -1, 0]
        assert torch.equal(bias, own[:, None].expand(4, 3))
        assert not torch.equal(own, attention.compute_bias(100, 100)[0, :, -1, -2])
    assert not known.far_keys_and_bias(base, LAYERS - 1, torch.zeros(4, 3, 6))[1].any()


def test_a_wrong_prompt_is_noticed():
    for kind in ("t5", "bart", "mbart"):
        for injection in INJECTIONS:
            model = tiny_model(kind, injection, exact=True)
            base, batch = tiny_base(kind, exact=True), pair()
            states, _ = literal(model, getattr(base, "model", base), *batch.inputs.values())
            expected = literal_logits(base, states)
            with torch.no_grad():
                model.adapters["default"].encoder.prompts.view(-1)[3] += 1e-3
            real = batch.target.attention_mask.bool()
            with pytest.raises(AssertionError, match="relative error"):
                assert_equal(model(**batch.inputs, use_cache=False).logits[real], expected[real])


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("kind", ["t5", "bart", "mbart"])
def test_prompts_start_as_what_the_model_computes_for_a_text(kind, injection):
    """The text is the encoder's and the decoder's; a prompt holds what enters the layer, or its keys and values."""
    base, tokenizer = tiny_base(kind), tiny_tokenizer()
    stacks = None if injection == "shallow" else STACKS
    config = PTuningV2Config("SEQ_2_SEQ_LM", 4, injection, prompt_init="text", stacks=stacks)
    model = get_ptv2_model(base, config, tokenizer=tokenizer, init_text="ada likes the good film of rome")
    ids = torch.tensor([tokenizer("ada likes the good film of rome", add_special_tokens=False)["input_ids"][:4]])
    prompts = model.adapters["default"].encoder.prompts
    bare = tiny_base(kind)
    words = bare.get_input_embeddings()(ids)
    if injection == "shallow":
        return assert_equal(prompts, words[0])
    seen = {}
    for name, module in bare.named_modules():
        part = name.split(".")[-1]
        if part in ("k", "v", "k_proj", "v_proj"):
            module.register_forward_hook(lambda module, args, made, name=name: seen.update({name: (args[0], made)}))
    backbone = bare if kind == "t5" else bare.model
    output = backbone(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True)
    path = ("model.{}.layers.{}.self_attn.{}_proj", "model.decoder.layers.{1}.encoder_attn.{2}_proj")
    if kind == "t5":
        path = ("{}.block.{}.layer.0.SelfAttention.{}", "decoder.block.{1}.layer.1.EncDecAttention.{2}")
    for layer in range(LAYERS):
        stack, index = family_of(model.backbone).sizes(model.backbone).place(layer)
        key, value = (seen[path[stack == "cross"].format(stack, index, part)] for part in "kv")
        if injection == "prefix":
            for side, (_, made) in enumerate((key, value)):
                assert_equal(prompts[layer, side], made[0].unflatten(-1, (4, -1)).transpose(0, 1), f"{stack} {index}")
        elif stack == "cross":
            assert_equal(prompts[layer], output.encoder_last_hidden_state[0])
        else:
            assert_equal(prompts[layer], getattr(output, f"{stack}_hidden_states")[index][0])


@pytest.mark.parametrize("injection", ["deep", "prefix", "shallow"])
@pytest.mark.parametrize("kind", ["t5", "bart", "mbart"])
def test_the_encoder_by_itself_has_its_prompts(kind, injection):
    model, batch = tiny_model(kind, injection), pair()
    source, target = batch.source.inputs, {k: v for k, v in batch.inputs.items() if k.startswith("decoder_")}
    encoder = model.get_encoder()
    for _ in range(2):
        with torch.no_grad():
            encoded = encoder(**source)
            given = model(attention_mask=source["attention_mask"], encoder_outputs=encoded, **target)
            assert_same_bits(given.logits, model(**batch.inputs).logits)
        model.adapters["default"].encoder.prompts.data.mul_(-1)
    with model.disable_adapter(), torch.no_grad():
        assert_same_bits(encoder(**source)[0], model.base_model.get_encoder()(**source)[0])
