"""Images and sounds: savings of a step, the compiler and the kernels give the plain step's numbers."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from ptv2_fast import HeadConfig, StepOptions
from ptv2_fast.backbone.view import TRACES_VIEWS
from ptv2_fast.families.registry import family_of
from ptv2_fast.step import layers as step_layers
from tiny_features import HIDDEN, IMAGES, TASK, TOKENS, features, gradients, tiny_model
from tolerances import assert_equal

TARGETS = torch.tensor([2, 0, 1])


@pytest.mark.parametrize("injection", ["deep", "prefix"])
@pytest.mark.parametrize("family", IMAGES)
def test_the_last_layer_computes_the_class_tokens_alone(family, injection):
    heads = {"label": HeadConfig("IMAGE_CLS", 3)}
    model = tiny_model(family, injection, "IMAGE_CLS", heads=heads).train()
    layer = family_of(model.backbone).layers(model.backbone)[-1]
    seen = []
    first = next(module for module in layer.mlp.modules() if isinstance(module, torch.nn.Linear))
    first.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    found = {}
    for last_rows in (False, True):
        model.step_options = StepOptions(last_rows=last_rows)
        loss = model(**features(family), labels=TARGETS).loss
        found[last_rows] = {"loss": loss, **gradients(loss, model)}
    assert seen == [(3, TOKENS[family], HIDDEN), (1, 3, HIDDEN)]
    for name, value in found[True].items():
        assert_equal(value, found[False][name], name)


# Tracing takes its time, so a family is compiled with prompts in every layer, where its own projections make them, and
# with one of the other two, which reach its layers as rows or as ready keys and values.
OTHER = {
    "vit": "shallow",
    "dinov2": "prefix",
    "dinov2_with_registers": "shallow",
    "clip_vision_model": "prefix",
    "whisper": "shallow",
}
COMPILED = [pair for family, other in OTHER.items() for pair in ((family, "deep"), (family, other))]


def test_every_family_is_compiled():
    assert set(OTHER) == set(TASK)


@pytest.mark.parametrize(("family", "injection"), COMPILED)
def test_compiled_layers_and_fused_projections(family, injection, monkeypatch):
    monkeypatch.setattr(step_layers, "COMPILER", "aot_eager")
    torch.compiler.reset()
    counters.clear()
    model = tiny_model(family, injection, TASK[family]).train()
    found = {}
    for on in (False, True):
        model.step_options = StepOptions(compile_layers=on, fused_projections=on)
        loss = model(**features(family), labels=TARGETS).loss
        found[on] = {"loss": loss, **gradients(loss, model)}
    # Virtual tokens that are rows of the batch run through the layers as they are.
    assert bool(counters["stats"]) == (injection != "shallow")
    for name, value in found[True].items():
        assert_equal(value, found[False][name], name)


# Registers are rows as patches are, so where no rows are added the model is dinov2's.
WHOLE = [pair for pair in COMPILED if pair != ("dinov2_with_registers", "deep")]


@pytest.mark.parametrize(("family", "injection"), WHOLE)
def test_a_compiled_model_is_the_model(family, injection):
    torch.compiler.reset()
    layers = {"encoder_layers" if family == "whisper" else "num_hidden_layers": 2 if family == "vit" else 1}
    # While training, Whisper's encoder looks at a random number for its layerdrop in transformers up to 5.17.
    model = tiny_model(family, injection, TASK[family], base_changes=layers).train(family != "whisper")
    model(**features(family))  # transformers hooks the layers in its first run
    loss = model(**features(family), labels=TARGETS).loss
    expected = {"loss": loss, **gradients(loss, model)}
    # Whole graphs are found with any backend; what autograd makes of one is traced once for images, once for sounds.
    backend = "aot_eager" if injection == "deep" and family in ("vit", "whisper") else "eager"
    compiled = torch.compile(model, fullgraph=TRACES_VIEWS, backend=backend)
    loss = compiled(**features(family), labels=TARGETS).loss
    for name, value in {"loss": loss, **gradients(loss, model)}.items():
        assert_equal(value, expected[name], name)


@pytest.mark.parametrize(("family", "injection"), [("vit", "deep"), ("vit", "shallow"), ("whisper", "prefix")])
def test_the_kernels_give_the_references_numbers(family, injection):
    # Kernels serve head sizes from 16 on; the interpreter takes its time.
    heads = {"encoder_attention_heads": 2} if family == "whisper" else {"num_attention_heads": 2}
    model = tiny_model(family, injection, TASK[family], base_changes=heads)
    found = {}
    for backend in ("reference", "triton"):
        model.adapters["default"].config.backend = backend
        loss = model(**features(family), labels=TARGETS).loss
        found[backend] = {"loss": loss, **gradients(loss, model)}
    for name, value in found["triton"].items():
        assert_equal(value, found["reference"][name], name)
