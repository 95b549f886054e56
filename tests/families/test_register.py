"""A model type that somebody registers is served as the package's own are."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import ptv2_fast
from batches import padded, text_rows
from ptv2_fast import get_ptv2_model
from ptv2_fast.families.bert import Bert
from ptv2_fast.families.family import Family
from ptv2_fast.families.llama import Llama
from ptv2_fast.families.registry import families, family_of, is_listed, register_family, unregister_family
from ptv2_fast.families.table import table
from ptv2_fast.step.labelled_rows import why_not_labelled_rows
from tiny_models import INJECTIONS, tiny_base, tiny_config, tiny_prompts
from tolerances import assert_equal

NAME = "private"


class PrivateConfig(LlamaConfig):
    model_type = NAME


class PrivateLayer(LlamaDecoderLayer):
    """Llama's layer under other names, so that no trial takes it for one."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.first_norm, self.mixer = self.input_layernorm, self.self_attn
        del self.input_layernorm, self.self_attn

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.mixer(hidden_states=self.first_norm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class PrivateModel(LlamaModel):
    config_class = PrivateConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(PrivateLayer(config, index) for index in range(config.num_hidden_layers))


class PrivateForCausalLM(LlamaForCausalLM):
    config_class = PrivateConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = PrivateModel(config)


class Private(Llama):
    norm_path = "first_norm"
    attention_path = "mixer"


class Unfinished(Bert):
    """An encoder for which nobody wrote what a shallow prompt needs."""

    shallow_view = Family.shallow_view


@pytest.fixture
def registered():
    register_family(NAME, Private())
    yield
    if NAME in families():
        unregister_family(NAME)


def _private(task: str = "CAUSAL_LM"):
    """A private model with the weights of the tests' Llama."""
    base = tiny_base("llama", task)
    config = PrivateConfig(**{k: v for k, v in tiny_config("llama").to_dict().items() if k != "model_type"})
    config._attn_implementation = base.config._attn_implementation
    made = (PrivateForCausalLM if task == "CAUSAL_LM" else PrivateModel)(config).eval()
    names = {"input_layernorm": "first_norm", "self_attn": "mixer"}
    weights = {}
    for name, weight in base.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = weight
    made.load_state_dict(weights)
    return made


def test_without_being_registered_it_is_refused():
    with pytest.raises(
        ValueError, match=r"base must be of a supported family .*PrivateModel with model_type 'private'"
    ):
        family_of(_private("FEATURE_EXTRACTION"))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("injection", INJECTIONS)
def test_outputs_losses_and_gradients_are_those_of_the_same_weights_elsewhere(injection):
    batch = padded(text_rows(), "left")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    found = []
    for base in (_private(), tiny_base("llama", "CAUSAL_LM")):
        torch.manual_seed(0)
        model = get_ptv2_model(base, tiny_prompts(injection, "CAUSAL_LM"))
        logits = model.eval()(**batch.inputs).logits[batch.attention_mask.bool()]
        loss = model.train()(**batch.inputs, labels=labels).loss
        found.append((logits, loss, torch.autograd.grad(loss, model.adapters["default"].encoder.prompts)[0]))
    for private, llama in zip(*found, strict=True):
        assert_equal(private, llama)


@pytest.mark.usefixtures("registered")
def test_it_is_everything_that_a_listed_family_is():
    base = _private()
    assert family_of(base.model) == Private() and is_listed(base.model) and families()[NAME] == Private()
    assert why_not_labelled_rows(base, {}) is None
    model = get_ptv2_model(base, tiny_prompts("deep", "CAUSAL_LM"))
    assert not model._frozen.layers.without
    ids = torch.randint(2, 40, (1, 5))
    assert model.eval().generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 8)
    with pytest.raises(ValueError, match=rf"base must be of a supported family \(.*opt, phi3, {NAME}, qwen2"):
        family_of(_unknown())
    assert NAME not in table()


def _unknown():
    with torch.device("meta"):
        base = LlamaModel(tiny_config("llama"))
    base.config.model_type = "nobody's"
    return base


@pytest.mark.usefixtures("registered")
def test_heads_of_ours_run_on_it():
    config = tiny_prompts("deep", "SEQ_CLS", heads={"topic": {"task_type": "SEQ_CLS", "num_labels": 3}})
    model = get_ptv2_model(_private("FEATURE_EXTRACTION"), config).eval()
    assert model(input_ids=torch.randint(2, 40, (2, 5))).logits.shape == (2, 3)


def test_a_family_may_be_registered_twice_and_its_name_belongs_to_nobody_else(registered):
    register_family(NAME, Private())
    register_family("bert", Bert())
    with pytest.raises(
        ValueError, match=r"model_type must have no family yet, but 'private' is Private\(\); got Llama"
    ):
        register_family(NAME, Llama())
    with pytest.raises(ValueError, match=r"model_type must have no family yet, but 'bert' is Bert\(\); got Private"):
        register_family("bert", Private())
    with pytest.raises(ValueError, match=r"must be one that was registered \(private\); got 'bert'"):
        unregister_family("bert")
    assert families()[NAME] == Private()


@pytest.mark.parametrize("name", ["", "  ", None, 7, ["private"]], ids=str)
def test_a_model_type_is_a_name(name):
    with pytest.raises(ValueError, match="model_type must be a model's config.model_type, a name; got"):
        register_family(name, Private())
    with pytest.raises(ValueError, match="model_type must be one that was registered"):
        unregister_family(name)


@pytest.mark.parametrize("family", [None, "llama", Llama, 7], ids=str)
def test_a_family_is_an_instance_of_one(family):
    with pytest.raises(ValueError, match="family must be an instance of a subclass of Family; got"):
        register_family(NAME, family)
    assert NAME not in families()


def test_wrapped_models_keep_a_family_that_is_taken_back(registered):
    model = get_ptv2_model(_private("FEATURE_EXTRACTION"), tiny_prompts("deep")).eval()
    ids = torch.randint(2, 40, (1, 5))
    before = model(input_ids=ids).last_hidden_state
    unregister_family(NAME)
    assert_equal(model(input_ids=ids).last_hidden_state, before)
    assert NAME not in families()


def test_threads_lose_no_registration():
    names = [f"private_{index}" for index in range(40)]
    started = threading.Barrier(4)

    def register(some):
        started.wait()
        for name in some:
            register_family(name, Private())

    threads = [threading.Thread(target=register, args=(names[index::4],)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(names) <= set(families())
    for name in names:
        unregister_family(name)
    assert not set(names) & set(families())


def test_an_encoder_without_a_shallow_view_takes_the_other_injections():
    base = tiny_base("bert")
    base.config.model_type = "unfinished"
    register_family("unfinished", Unfinished())
    try:
        with pytest.raises(
            ValueError, match="injection must be 'deep' or 'prefix' on BertModel, whose family has no sha"
        ):
            get_ptv2_model(base, tiny_prompts("shallow"))
        get_ptv2_model(base, tiny_prompts("deep"))
    finally:
        unregister_family("unfinished")


@pytest.mark.usefixtures("registered")
def test_a_family_that_is_taken_back_still_serves_what_its_wrapped_models_do(tmp_path):
    model = get_ptv2_model(_private(), tiny_prompts("deep", "CAUSAL_LM"))
    unregister_family(NAME)
    model.add_adapter("other", tiny_prompts("prefix", "CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    model.state_dict()
    assert is_listed(model.backbone) and why_not_labelled_rows(model.base_model, {}) is None
    with pytest.raises(ValueError, match="base must be of a supported family"):
        family_of(_private("FEATURE_EXTRACTION"))


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("path", ["layers_path", "norm_path", "attention_path", "key_path", "value_path"])
def test_a_path_that_leads_nowhere_is_refused_where_the_base_is_wrapped(path, injection):
    class Misspelt(Private):
        pass

    setattr(Misspelt, path, "nowhere")
    base = _private()
    register_family(NAME, Misspelt())
    try:
        with pytest.raises(
            ValueError, match=r"where its family, Misspelt\(\), says; PrivateModel has not: .*'nowhere'"
        ):
            get_ptv2_model(base, tiny_prompts(injection, "CAUSAL_LM"))
        assert all(parameter.requires_grad for parameter in base.parameters())
    finally:
        unregister_family(NAME)


def test_a_family_that_names_fewer_attentions_than_layers_is_refused():
    class Shorter(Private):
        def num_attentions(self, backbone):
            return 1

    register_family(NAME, Shorter())
    try:
        with pytest.raises(
            ValueError, match="an attention for each of the 2 layers of its sizes; .* names 1 in Private"
        ):
            get_ptv2_model(_private(), tiny_prompts("deep", "CAUSAL_LM"))
    finally:
        unregister_family(NAME)


def test_a_family_reads_what_a_call_brings():
    class Other(Private):
        reads = "tokens"

    with pytest.raises(
        ValueError, match=r"Other\(\).reads must be one of input_ids, pixel_values, input_features; got 'to"
    ):
        register_family(NAME, Other())
    assert NAME not in families()


@pytest.mark.usefixtures("registered")
def test_a_class_that_is_made_anew_is_told_how_to_take_its_place():
    again = type("Private", (Private,), {})
    with pytest.raises(ValueError, match=r"is Private\(\); got Private\(\); unregister_family takes that back"):
        register_family(NAME, again())


def test_unlisted_models_are_tried_beside_registered_families_of_any_kind():
    @dataclass
    class Unhashable(Private):
        scale: float = 1.0

    class Strict(Private):
        def check(self, backbone):
            assert backbone.config.model_type == "nobody's"

    names = {NAME: Unhashable(), "strict": Strict()}
    for name, family in names.items():
        register_family(name, family)
    try:
        llama = tiny_base("llama")
        llama.config.model_type = "a llama"
        assert family_of(llama) == Llama()
        stranger = _private("FEATURE_EXTRACTION")
        stranger.config.model_type = "stranger"
        stranger.layers[0].first_norm.weight.data += 1
        assert family_of(stranger) == Unhashable()
        unregister_family(NAME)
        with pytest.raises(ValueError, match="base must be of a supported family"):
            family_of(stranger)
    finally:
        for name in set(names) & set(families()):
            unregister_family(name)


def test_it_is_exported():
    assert ptv2_fast.register_family is register_family and "register_family" in ptv2_fast.__all__
