"""Families that nobody listed: recognised by trial, or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from batches import padded, text_rows
from families import changed
from ptv2_fast import get_ptv2_model
from ptv2_fast.families.recognise import recognise
from ptv2_fast.families.registry import families, family_of
from ptv2_fast.reference import backbones
from ptv2_fast.reference.float64 import to_exact_float64
from ptv2_fast.step.labelled_rows import why_not_labelled_rows
from tiny_models import INJECTIONS, LABELS, literal_states, tiny_base, tiny_prompts
from tolerances import assert_equal

# model type -> the listed one that it behaves like.
RECOGNISED = {
    "camembert": "roberta",
    "ernie": "bert",
    "granite": "llama",
    "starcoder2": "llama",
    "qwen2_moe": "llama",
    "gemma": "llama",
    "phi": "llama",
    "ernie4_5": "glm4",
}
# Each differs from the listed families in something else: another norm before attention, a key norm over all heads
# at once behind that norm, values that two heads share.
REFUSED = ("roberta-prelayernorm", "olmoe", "diffllama")


def _base(family: str, task=transformers.AutoModel, **changes):
    sizes = {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": None,
        "num_labels": LABELS,
    }  # fmt: skip
    if RECOGNISED.get(family) in ("llama", "glm4"):
        sizes["num_key_value_heads"] = 2
    if family == "gemma":
        sizes["head_dim"] = 16
    if family == "qwen2_moe":
        sizes |= {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
        sizes["experts_implementation"] = "eager"
    if family in ("camembert", "ernie"):
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "type_vocab_size": 2}
    if family == "granite":
        sizes |= {"embedding_multiplier": 2.0, "attention_multiplier": 0.3}
        sizes |= {"residual_multiplier": 0.7, "logits_scaling": 3.0}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **sizes | changes)
    model = task.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("family", RECOGNISED)
def test_it_is_the_family_that_it_behaves_like(family):
    base = _base(family)
    found = family_of(base)
    assert found == families()[RECOGNISED[family]]
    assert family_of(base) is found, "the trial ran again"


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", RECOGNISED)
def test_outputs_and_gradients_are_those_of_the_literal_form(family, injection, monkeypatch):
    form = backbones.FORMS[RECOGNISED[family]]
    if family == "granite":
        form = replace(form, embed=lambda backbone, ids, *_: 2.0 * backbone.embed_tokens(ids))
    if family == "phi":
        form = replace(form, final_norm=lambda backbone, hidden: backbone.final_layernorm(hidden))
    monkeypatch.setitem(backbones.FORMS, family, form)
    exact = to_exact_float64(_base(family))
    literal = to_exact_float64(_base(family))
    model = get_ptv2_model(exact, tiny_prompts(injection)).eval()
    model.adapters.double()
    batch = padded(text_rows(), "left")
    real = batch.attention_mask.bool()
    prompts = model.adapters["default"].encoder.prompts
    fast = model(**batch.inputs).last_hidden_state[real]
    slow = literal_states(model, literal, **batch.inputs)[real]
    weights = torch.randn_like(fast)
    # A trial tells families apart; what it lets through is right to rounding.
    assert_equal(fast, slow, "output", torch.float32)
    found, expected = (torch.autograd.grad((states * weights).sum(), prompts)[0] for states in (fast, slow))
    assert_equal(found, expected, "gradient", torch.float32)


@pytest.mark.parametrize("family", REFUSED)
def test_others_are_refused_by_name(family):
    base = _base(family)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    implementation = base.config._attn_implementation
    with pytest.raises(ValueError, match=f"base must be of a supported family .* model_type '{family}'"):
        get_ptv2_model(base, tiny_prompts("deep"))
    assert base.config._attn_implementation == implementation
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_a_trial_leaves_the_model_as_it_was():
    base = _base("granite").train()
    implementation = base.config._attn_implementation
    family_of(base)
    assert base.training and base.config._attn_implementation == implementation
    assert all(parameter.requires_grad and parameter.grad is None for parameter in base.parameters())


def _without_rotation(backbone, layer, keys):
    return keys


def _without_norm(backbone, layer, states):
    return states


@pytest.mark.parametrize(
    "change",
    [{"finish_keys": _without_rotation}, {"attention_input": _without_norm}, {"causal": False}, {"rotary": False}],
    ids=lambda change: next(iter(change)),
)
def test_every_part_of_the_trial_can_fail(change):
    base, llama = _base("granite"), families()["llama"]
    assert recognise(base, {"other": changed(llama, **change)}) is None
    assert recognise(base, {"llama": llama}) is not None


def test_sizes_that_the_configuration_states_wrongly_are_part_of_the_trial():
    assert recognise(_base("ernie", num_key_value_heads=2), families()) is None


def test_where_positions_start_is_part_of_the_trial():
    assert recognise(_base("camembert"), {"bert": families()["bert"]}) is None


def test_without_weights_there_is_no_trial():
    with torch.device("meta"):
        base = transformers.AutoModel.from_config(_base("granite").config)
    with pytest.raises(ValueError, match="base must be of a supported family"):
        family_of(base)


def test_losses_and_generation_of_an_unlisted_causal_model():
    """Granite divides its logits: its own head and loss run, whatever a step leaves out elsewhere."""
    base = _base("granite", transformers.AutoModelForCausalLM)
    assert why_not_labelled_rows(base, {}) is not None
    model = get_ptv2_model(base, tiny_prompts("deep", "CAUSAL_LM")).train()
    batch = padded(text_rows(), "left")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    model(**batch.inputs, labels=labels).loss.backward()
    assert model.adapters["default"].encoder.prompts.grad.abs().max() > 0
    model.eval()
    together = model.generate(**batch.inputs, max_new_tokens=4, do_sample=False)[:, 9:]
    for index, row in enumerate(text_rows()):
        alone = model.generate(row[None], max_new_tokens=4, do_sample=False)[0, len(row) :]
        assert torch.equal(together[index], alone)


@pytest.mark.parametrize("family", ["granite", "ernie"])
def test_the_last_layer_computes_all_tokens_of_a_layer_that_nobody_looked_at(family):
    model = get_ptv2_model(_base(family), tiny_prompts("deep"))
    assert model._family.skips_unread_tokens
    assert model._frozen.layers.without["last_rows"] == "not written for this family"


def test_labelled_rows_are_for_listed_families():
    llama = tiny_base("llama", "CAUSAL_LM")
    assert why_not_labelled_rows(llama, {}) is None
    reason = why_not_labelled_rows(_base("starcoder2", transformers.AutoModelForCausalLM), {})
    assert "not listed" in reason
