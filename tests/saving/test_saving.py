"""Saved and loaded is the same model; loaded and trained is as never having stopped."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from safetensors.torch import save_file

from batches import padded, text_rows
from ptv2_fast import HeadConfig, PTuningV2Model, get_ptv2_model
from tiny_models import FAMILIES, INJECTIONS, LABELS, WITHOUT_TABLE, tiny_base, tiny_model, tiny_prompts
from tolerances import assert_differs, assert_equal, assert_same_bits

BATCH = padded(text_rows(), "right")
LABELLED = {**BATCH.inputs, "labels": BATCH.input_ids % LABELS}
VARIANTS = [
    pytest.param(injection, {}, id=injection) for injection in INJECTIONS
] + [
    pytest.param("deep", {"reparameterization": 6}, id="deep-mlp"),
    pytest.param("prefix", {"reparameterization": 6, "layers": (1,)}, id="prefix-mlp-layer"),
    pytest.param("prefix", {"prompt_init": "gated"}, id="prefix-gated"),
    pytest.param("prefix", {"position_offset": 5}, id="prefix-offset"),
]  # fmt: skip


def _trained(model, steps, optimizer=None):
    """Train in place; the optimizer that was used."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=3e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**LABELLED).loss.backward()
        optimizer.step()
    model.eval()
    return optimizer


@torch.no_grad()
def _logits(model):
    return model(**BATCH.inputs).logits


# What is saved of a family is its prompts' shapes and its head: with each injection. How prompts are made is the same
# in all: in an encoder, a decoder with grouped heads, one model whose layers are shared and one without positions.
LOADED = [
    *itertools.product(FAMILIES, VARIANTS[: len(INJECTIONS)]),
    *itertools.product(("bert", "llama", "albert", "deberta-v2"), VARIANTS[len(INJECTIONS) :]),
]


@pytest.mark.parametrize(
    ("family", "injection", "config"),
    [pytest.param(family, *how.values, id=f"{family}-{how.id}") for family, how in LOADED],
)
def test_loaded_is_saved(tmp_path, family, injection, config):
    if "position_offset" in config and family in WITHOUT_TABLE:
        pytest.skip("it has no positions to shift")
    model = tiny_model(family, injection, "TOKEN_CLS", **config)
    untrained = _logits(model)
    _trained(model, 2)
    model.save_pretrained(tmp_path)
    base = tiny_base(family, "TOKEN_CLS")
    loaded = PTuningV2Model.from_pretrained(base, tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert loaded.ptv2_config == model.ptv2_config
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    saved = model.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    for name, tensor in loaded.state_dict().items():
        assert_same_bits(tensor, saved[name], name)
    # PyTorch takes another product for a weight that needs a gradient.
    assert_equal(_logits(loaded), _logits(model), "frozen and trained")
    assert_same_bits(_logits(loaded), _logits(model.requires_grad_(False)), "both frozen")
    assert_differs(_logits(loaded), untrained)


@pytest.mark.parametrize(("injection", "config"), VARIANTS)
def test_going_on_is_as_never_having_stopped(tmp_path, injection, config):
    straight = tiny_model("bert", injection, "TOKEN_CLS", **config)
    stopped = tiny_model("bert", injection, "TOKEN_CLS", **config)
    stopped.load_state_dict(straight.state_dict())
    _trained(straight, 5)
    optimizer = _trained(stopped, 2)
    stopped.save_pretrained(tmp_path)
    base = tiny_base("bert", "TOKEN_CLS")
    resumed = PTuningV2Model.from_pretrained(base, tmp_path, is_trainable=True)
    again = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=3e-2)
    again.load_state_dict(optimizer.state_dict())
    _trained(resumed, 3, again)
    assert_same_bits(_logits(resumed), _logits(straight))
    for name, tensor in straight.adapters.state_dict().items():
        assert_same_bits(resumed.adapters.state_dict()[name], tensor, name)


def test_several_adapters(tmp_path):
    heads = {"tags": 3, "mood": HeadConfig("SEQ_CLS", 2, labels=("bad", "good"))}
    config = tiny_prompts("deep", "TOKEN_CLS", heads=heads)
    model = get_ptv2_model(tiny_base("bert"), config, "first").eval()
    model.add_adapter("second", tiny_prompts("prefix", "TOKEN_CLS", length=2, heads={"tags": 3}))
    model.save_pretrained(tmp_path / "all")
    loaded = PTuningV2Model.from_pretrained(tiny_base("bert"), tmp_path / "all")
    assert loaded.ptv2_config == model.ptv2_config and loaded.active_adapter == "first"
    one = model.save_pretrained(tmp_path / "one", adapter_names=["second"]) or tmp_path / "one"
    single = PTuningV2Model.from_pretrained(tiny_base("bert"), one, adapter_name="renamed")
    assert list(single.adapters) == ["renamed"]
    grown = get_ptv2_model(tiny_base("bert"), config, "first").eval()
    grown.load_adapter(one, "more")
    assert grown.active_adapter == "first"
    for each in (model, grown):
        each.requires_grad_(False)  # as loaded ones are
    with torch.no_grad():
        for task, name in [("tags", "first"), ("mood", "first"), ("tags", "second")]:
            arguments = {**BATCH.inputs, "task": task, "adapter_names": [name] * 3}
            expected = model(**arguments).logits
            assert_same_bits(loaded(**arguments).logits, expected, f"{task} of {name}")
        for other, name in [(single, "renamed"), (grown, "more")]:
            arguments["adapter_names"] = [name] * 3
            assert_same_bits(other(**arguments).logits, expected, name)


def test_a_state_dict_rebuilds_the_model(tmp_path):
    """What Trainer writes can be read by from_pretrained and by load_state_dict."""
    model = tiny_model("gpt2", "prefix", "TOKEN_CLS")
    state = model.state_dict()
    plain = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(plain, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = PTuningV2Model.from_pretrained(tiny_base("gpt2", "TOKEN_CLS"), tmp_path)
    model.requires_grad_(False)
    assert_same_bits(_logits(loaded), _logits(model))
    other = tiny_model("gpt2", "prefix", "TOKEN_CLS", init_std=0.1)
    other.load_state_dict(state)
    assert_same_bits(_logits(other.requires_grad_(False)), _logits(model))
    with pytest.raises(RuntimeError, match="missing.*prompts"):
        other.load_state_dict({n: t for n, t in state.items() if "prompts" not in n})
    with pytest.raises(RuntimeError, match="unexpected.*stranger"):
        other.load_state_dict({**state, "stranger": torch.zeros(1)})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrapped_model_can_be_pickled(family):
    model = tiny_model(family, "deep")
    # Before it has run: the hooks by which transformers then collects outputs cannot be pickled.
    restored = pickle.loads(pickle.dumps(model))
    ids = torch.randint(3, 30, (2, 5))
    assert_equal(restored(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state, family)
