"""ViT, DINOv2, CLIP's vision tower, Whisper's encoder: the fast path against the literal forms, and what must hold."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from ptv2_fast import HeadConfig, PTuningV2Model, StepOptions
from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.families.registry import family_of
from shape_audit import ShapeAudit
from tiny_features import (
    EVERY,
    FEATURES,
    HEADS,
    HIDDEN,
    IMAGES,
    TASK,
    TINY,
    TOKENS,
    features,
    gradients,
    literal_states,
    tiny_base,
    tiny_model,
)
from tiny_models import INJECTIONS, tiny_prompts
from tolerances import assert_differs, assert_equal, assert_same_bits

INSIDE = [p for p in EVERY if p.values[1] != "shallow"]
TARGETS = torch.tensor([2, 0, 1])


def _compare(model, backbone, family, **options):
    """Last states, all states and the gradients of everything trained, fast against literal."""
    inputs = features(family, dtype=backbone.dtype)
    weights = torch.randn(3, TOKENS[family], HIDDEN, dtype=backbone.dtype)
    output = model(**inputs, output_hidden_states=True)
    last, states = literal_states(model, backbone, *inputs.values(), **options)
    assert_equal(output.last_hidden_state, last, "last states")
    for index, (own, expected) in enumerate(zip(output.hidden_states[:-1], states, strict=False)):
        assert_equal(own, expected, f"states before layer {index}")
    fast = gradients((output.last_hidden_state * weights).sum(), model)
    slow = gradients((last * weights).sum(), model)
    for name, gradient in fast.items():
        assert gradient.abs().max() > 1e-6, f"{name} gets no gradient"
        assert_equal(gradient, slow[name], f"gradient of {name}")
    return last


# The literal forms.


@pytest.mark.parametrize("exact", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize(("family", "injection"), EVERY)
def test_the_literal_form(family, injection, exact):
    model = tiny_model(family, injection, exact=exact)
    prompted = _compare(model, tiny_base(family, exact=exact), family)
    bare = tiny_base(family, exact=exact)(**features(family, dtype=prompted.dtype)).last_hidden_state
    assert_differs(prompted, bare)


@pytest.mark.parametrize("length", [1, 17])
@pytest.mark.parametrize(("family", "injection"), EVERY)
def test_prompt_lengths(family, injection, length):
    _compare(tiny_model(family, injection, length=length, exact=True), tiny_base(family, exact=True), family)


@pytest.mark.parametrize("injection", ["deep", "shallow"])
@pytest.mark.parametrize("family", IMAGES)
def test_virtual_tokens_may_stand_behind_the_class_token(family, injection):
    """VPT puts them there; nothing has a position that would tell."""
    _compare(tiny_model(family, injection, exact=True), tiny_base(family, exact=True), family, behind=1)


@pytest.mark.parametrize(("family", "injection"), INSIDE)
def test_some_layers_a_gate_and_an_mlp(family, injection):
    base = tiny_base(family, exact=True)
    _compare(tiny_model(family, injection, exact=True, layers=(-1,)), base, family)
    model = tiny_model(family, injection, exact=True, prompt_init="gated", reparameterization=6)
    with torch.no_grad():
        model.adapters["default"].encoder.gate.normal_()
        model.adapters["default"].encoder.mlp[2].weight.mul_(3.0)
    _compare(model, base, family)


@pytest.mark.parametrize(("family", "injection"), EVERY)
def test_a_wrong_prompt_is_noticed(family, injection):
    model = tiny_model(family, injection, exact=True)
    inputs = features(family, dtype=torch.float64)
    expected, _ = literal_states(model, tiny_base(family, exact=True), *inputs.values())
    with torch.no_grad():
        model.adapters["default"].encoder.prompts.view(-1)[3] += 1e-3
    with pytest.raises(AssertionError, match="relative error"):
        assert_equal(model(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize("injection", ["deep", "shallow"])
@pytest.mark.parametrize("family", IMAGES)
def test_images_of_another_size(family, injection):
    inputs = {"pixel_values": torch.randn(2, 2, 12, 16)}
    model = tiny_model(family, injection, "IMAGE_CLS", base_changes={"image_size": 8}).train()
    if not TINY[family].any_size:
        with pytest.raises(ValueError, match=r"mage size .12\*16"):
            model(**inputs)
        inputs["interpolate_pos_encoding"] = True
    output = model(**inputs, output_hidden_states=True)
    assert output.hidden_states[-1].shape == (2, TINY[family].leading + 3 * 4, HIDDEN)
    model.step_options = StepOptions(last_rows=False)
    assert_equal(output.logits, model(**inputs).logits)


# Heads: the base's own, and ours.


def _pooled(base, family, last):
    """What a family's own classifier reads of the last states."""
    patches = last[:, TINY[family].leading :].mean(1)
    return {
        "vit": lambda: last[:, 0],
        "clip_vision_model": lambda: patches,
        "dinov2": lambda: torch.cat([last[:, 0], patches], dim=-1),
        "dinov2_with_registers": lambda: torch.cat([last[:, 0], patches], dim=-1),
        "whisper": lambda: base.projector(last).mean(1),
    }[family]()


@pytest.mark.parametrize(("family", "injection"), EVERY)
def test_the_classifier_of_the_base(family, injection):
    model = tiny_model(family, injection, TASK[family], exact=True)
    base = tiny_base(family, "classifier", exact=True)
    inputs = features(family, dtype=torch.float64)
    last, _ = literal_states(model, backbone_of(base), *inputs.values())
    expected = base.classifier(_pooled(base, family, last))
    for training in (False, True):
        output = model.train(training)(**inputs, labels=TARGETS)
        assert_equal(output.logits, expected)
        assert_equal(output.loss, torch.nn.functional.cross_entropy(expected, TARGETS))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = ["classifier"] if family in IMAGES else ["classifier", "projector"]
    own = {f"adapters.default.base_heads.{head}.{part}" for head in heads for part in ("weight", "bias")}
    assert trained == own | {"adapters.default.encoder.prompts"}


@pytest.mark.parametrize("injection", INJECTIONS)
def test_the_weighted_sum_of_all_layers_reads_the_frames_alone(injection):
    changes = {"use_weighted_layer_sum": True}
    model = tiny_model("whisper", injection, "AUDIO_CLS", exact=True, base_changes=changes)
    base = tiny_base("whisper", "classifier", exact=True, **changes)
    inputs = features("whisper", dtype=torch.float64)
    last, states = literal_states(model, base.encoder, *inputs.values())
    stacked = torch.stack([*states[:-1], last], dim=1)
    summed = (stacked * base.layer_weights.softmax(-1)[:, None, None]).sum(1)
    expected = base.classifier(base.projector(summed).mean(1))
    assert_equal(model(**inputs).logits, expected)
    assert_differs(base.classifier(base.projector(last).mean(1)), expected)


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize(("family", "injection"), EVERY)
def test_own_heads(family, injection, pooling):
    heads = {"label": HeadConfig(TASK[family], 4, pooling=pooling)}
    model = tiny_model(family, injection, TASK[family], heads=heads)
    states = model.run(model.backbone, features(family)).last_hidden_state
    pooled = states[:, 0] if pooling == "first" else states.mean(1)
    expected = model.adapters["default"].heads["label"].linear(pooled)
    for training in (False, True):
        output = model.train(training)(**features(family), labels=TARGETS)
        assert_equal(output.logits, expected)
        assert_equal(output.loss, torch.nn.functional.cross_entropy(expected, TARGETS))


@pytest.mark.parametrize("family", FEATURES)
def test_features_with_heads_of_several_kinds(family):
    heads = {"row": HeadConfig(TASK[family], 4, pooling="mean"), "each": HeadConfig("TOKEN_CLS", 2)}
    model = tiny_model(family, "deep", heads=heads)
    assert model(**features(family)).last_hidden_state.shape == (3, TOKENS[family], HIDDEN)
    assert model(**features(family), task="row").logits.shape == (3, 4)
    labels = torch.zeros(3, TOKENS[family], dtype=torch.long)
    each = model(**features(family), task="each", labels=labels)
    assert each.logits.shape == (3, TOKENS[family], 2) and each.loss.requires_grad


@pytest.mark.parametrize("injection", INJECTIONS)
def test_clip_poolers_and_projections_read_the_class_token(injection):
    model = tiny_model("clip_vision_model", injection, kind="projection")
    base = tiny_base("clip_vision_model", "projection")
    inputs = features("clip_vision_model")
    last, _ = literal_states(model, base.vision_model, *inputs.values())
    expected = base.visual_projection(base.vision_model.post_layernorm(last[:, 0]))
    output = PTuningV2Model.forward(model, **inputs)
    assert_equal(output.image_embeds, expected)
    assert_equal(output.last_hidden_state, last)
    assert_equal(model(**inputs).pooler_output, base.vision_model.post_layernorm(last[:, 0]))


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov2_with_registers"])
def test_poolers_read_the_class_token(family, injection):
    model, base = tiny_model(family, injection), tiny_base(family)
    last, _ = literal_states(model, base, *features(family).values())
    expected = base.pooler(last) if family == "vit" else last[:, 0]
    assert_equal(model(**features(family)).pooler_output, expected)


# What must hold.


@pytest.mark.parametrize(("family", "injection"), EVERY)
def test_checkpointed_gradients_are_plain_gradients(family, injection):
    model = tiny_model(family, injection, TASK[family]).train()
    calls = []
    layer = family_of(model.backbone).layers(model.backbone)[0]
    next(layer.children()).register_forward_pre_hook(lambda *_: calls.append(1))

    def step():
        calls.clear()
        model.zero_grad()
        model(**features(family), labels=TARGETS).loss.backward()
        return {n: p.grad.clone() for n, p in model.adapters.named_parameters()}, len(calls)

    plain, plain_calls = step()
    model.gradient_checkpointing_enable()
    recomputed, recomputed_calls = step()
    assert recomputed_calls > plain_calls, "nothing was recomputed"
    assert plain and all(grad.abs().max() > 0 for grad in plain.values())
    for name, grad in plain.items():
        assert_equal(recomputed[name], grad, name)


@pytest.mark.parametrize(("family", "injection"), EVERY)
def test_reentrant_checkpointing_is_refused(family, injection):
    model = tiny_model(family, injection, TASK[family]).train()
    base = model.base_model
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)({"use_reentrant": True})
    with pytest.raises(ValueError, match="non-reentrant"):
        model(**features(family))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "injection"), EVERY)
def test_disabled_is_the_bare_model_bit_for_bit(family, injection, attention):
    changes = {"attn_implementation": attention}
    base = tiny_base(family, "classifier", **changes).requires_grad_(False)
    model = tiny_model(family, injection, TASK[family], base_changes=changes)
    inputs = features(family)
    with torch.no_grad():
        bare, prompted = base(**inputs).logits, model(**inputs).logits
        with model.disable_adapter():
            assert_same_bits(model(**inputs).logits, bare)
        assert_same_bits(model(**inputs).logits, prompted)
        assert_same_bits(model.unload()(**inputs).logits, bare)
    assert_differs(prompted, bare)


@pytest.mark.parametrize("family", FEATURES)
def test_one_adapter_per_row(family):
    heads = {"label": 3}
    model = tiny_model(family, "deep", TASK[family], heads=heads)
    model.add_adapter("long", tiny_prompts("prefix", TASK[family], length=11, heads=heads))
    model.add_adapter("top", tiny_prompts("deep", TASK[family], length=2, layers=(1,), heads=heads))
    model.add_adapter("shallow", tiny_prompts("shallow", TASK[family], heads=heads))
    names = ["long", "default", "top", "long"]
    inputs = features(family, rows=4)
    with torch.no_grad():
        mixed = model.eval()(**inputs, adapter_names=names).logits
        for index, name in enumerate(names):
            row = {key: value[index : index + 1] for key, value in inputs.items()}
            assert_equal(mixed[index], model(**row, adapter_names=[name]).logits[0], name)
        with pytest.raises(ValueError, match="adapter_names must not mix a shallow prompt"):
            model(**inputs, adapter_names=["shallow", "default", "top", "long"])
        with pytest.raises(ValueError, match="adapter_names must name 4 rows; got 3"):
            model(**inputs, adapter_names=names[:3])


@pytest.mark.parametrize("family", FEATURES)
def test_a_base_row_is_the_bare_model(family):
    model, base = tiny_model(family, "prefix"), tiny_base(family)
    with torch.no_grad():
        mixed = model(**features(family), adapter_names=["default", "__base__", "default"]).last_hidden_state
        bare = base(**features(family)).last_hidden_state
    assert_equal(mixed[1], bare[1])
    assert_differs(mixed[0], bare[0])


@pytest.mark.parametrize("config", [{}, {"prompt_init": "gated"}], ids=["plain", "gated"])
@pytest.mark.parametrize(("family", "injection"), EVERY)
def test_loaded_is_saved(tmp_path, family, injection, config):
    if config and injection == "shallow":
        pytest.skip("a shallow prompt has no gate")
    model = tiny_model(family, injection, TASK[family], **config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    untrained = model(**features(family)).logits
    for _ in range(2):
        model(**features(family), labels=TARGETS).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path)
    loaded = PTuningV2Model.from_pretrained(tiny_base(family, "classifier"), tmp_path)
    assert type(loaded) is type(model) and loaded.ptv2_config == model.ptv2_config
    model.requires_grad_(False)
    with torch.no_grad():
        assert_same_bits(loaded(**features(family)).logits, model(**features(family)).logits)
    assert_differs(untrained, loaded(**features(family)).logits)


@pytest.mark.parametrize(("family", "injection"), EVERY)
def test_tuples_where_they_are_asked_for(family, injection):
    model = tiny_model(family, injection, TASK[family])
    expected = model(**features(family)).logits
    assert_same_bits(model(**features(family), return_dict=False)[0], expected)


# No tensor of P + N rows.

LENGTH = 12


def _in_attention(total):
    """Keys and values (B, H, P + N, d), and their mask."""
    return lambda shape: len(shape) == 4 and (shape[1:] == (HEADS, total, HIDDEN // HEADS) or shape[-1] == total)


@pytest.mark.parametrize(("family", "injection"), INSIDE)
def test_keys_and_values_alone_are_joined(family, injection):
    model = tiny_model(family, injection, TASK[family], length=LENGTH).train()
    total = LENGTH + TOKENS[family]
    audit = ShapeAudit(total, 3 * total, allowed=_in_attention(total))
    with audit:
        model(**features(family), labels=TARGETS, output_hidden_states=True).loss.backward()
    assert audit.hits == [] and audit.calls["addmm"] > 10
    literal = ShapeAudit(total, 3 * total, allowed=_in_attention(total))
    with literal:
        literal_states(model, tiny_base(family), *features(family).values())
    assert literal.hits, "the audit cannot fail"


@pytest.mark.parametrize("family", FEATURES)
def test_shallow_rows_are_joined_once(family):
    counts = []
    for layers in (2, 4):
        name = "encoder_layers" if family == "whisper" else "num_hidden_layers"
        model = tiny_model(family, "shallow", TASK[family], length=LENGTH, base_changes={name: layers}).train()
        total = LENGTH + TOKENS[family]
        audit = ShapeAudit(total, 3 * total)
        with audit:
            model(**features(family), labels=TARGETS).loss.backward()
        assert audit.hits, "there are no virtual rows at all"
        names = ("cat", "slice", "slice_backward", "constant_pad_nd")
        counts.append(Counter({name: audit.calls[name] for name in names}))
    assert counts[0] == counts[1] and counts[0]["cat"] >= 1
