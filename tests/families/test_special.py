"""What single families have of their own, beyond what every family is tested on; and what is refused."""

from __future__ import annotations

import sys
from types import MethodType

import pytest
import torch
import transformers
from transformers import DynamicCache

from batches import padded, text_rows
from ptv2_fast import get_ptv2_model
from ptv2_fast.backbone.rotary import max_rotary_length, tables_before_text
from ptv2_fast.families.refused import REFUSED
from ptv2_fast.families.registry import families, family_of
from ptv2_fast.inputs.cache import CACHE
from ptv2_fast.inputs.sliding_window import counts_padding, smallest_window
from ptv2_fast.step.labelled_rows import why_not_labelled_rows
from tiny_models import (
    FAMILIES,
    INJECTIONS,
    NOT_SERVED,
    WINDOWED,
    literal_states,
    tiny_base,
    tiny_config,
    tiny_model,
    tiny_prompts,
)
from tolerances import assert_differs, assert_equal, assert_same_bits


def _is_literal(family: str, injection: str, width: int = 32, **changes) -> None:
    """Outputs and gradients of the fast path are those of the literal form."""
    model = tiny_model(family, injection, exact=True, base_changes=changes)
    base = tiny_base(family, exact=True, **changes)
    batch = padded(text_rows(), "left")
    real = batch.attention_mask.bool()
    prompts = model.adapters["default"].encoder.prompts
    weights = torch.randn(3, 9, width, dtype=torch.float64)[real]
    found = []
    for states in (model(**batch.inputs).last_hidden_state, literal_states(model, base, **batch.inputs)):
        found.append((states[real], torch.autograd.grad((states[real] * weights).sum(), prompts)[0]))
    for actual, expected in zip(*found, strict=True):
        assert_equal(actual, expected)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_opt_350m_norms_behind_attention_and_projects_its_words(injection):
    _is_literal("opt", injection, width=16, do_layer_norm_before=False, word_embed_proj_dim=16)


def test_heads_have_the_width_of_the_output():
    base = tiny_base("opt", word_embed_proj_dim=16)
    model = get_ptv2_model(base, tiny_prompts("deep", "TOKEN_CLS", heads={"tags": 3}))
    assert model(**padded(text_rows(), "right").inputs).logits.shape == (3, 9, 3)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_albert_may_have_several_groups_of_layers(injection):
    _is_literal("albert", injection, num_hidden_layers=5, num_hidden_groups=2)


def test_every_repetition_of_alberts_layer_has_its_own_prompt():
    model = tiny_model("albert", "deep")
    batch = padded(text_rows(), "right")
    with torch.no_grad():
        before = model(**batch.inputs).last_hidden_state
        prompts = model.adapters["default"].encoder.prompts
        for index in range(2):
            kept = prompts[index].clone()
            prompts[index] += 0.5
            assert_differs(model(**batch.inputs).last_hidden_state, before)
            prompts[index] = kept
    assert not any("layer_idx" in vars(module) for module in model.backbone.modules())


def test_alberts_pooler_reads_the_padded_rows_of_an_unpadded_step():
    from ptv2_fast.step.options import StepOptions

    model = tiny_model("albert", "deep")
    batch = padded(text_rows(), "right")
    pooled = []
    for unpad in (False, True):
        model.step_options = StepOptions(unpad=unpad)
        pooled.append(model(**batch.inputs).pooler_output)
    assert_equal(pooled[1], pooled[0])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("injection", INJECTIONS)
def test_modernbert_pools_the_texts_own_tokens(injection, pooling):
    model = tiny_model("modernbert", injection, "SEQ_CLS", base_changes={"classifier_pooling": pooling}).train()
    rows = text_rows()
    with torch.no_grad():
        alone = torch.cat([model(input_ids=row[None]).logits for row in rows])
        for side in ("left", "right", "holes"):
            assert_equal(model(**padded(rows, side).inputs).logits, alone, side)


def test_hidden_states_of_rows_that_were_turned_stand_where_they_were_given():
    model = tiny_model("distilbert", "deep", "SEQ_CLS")
    rows = text_rows()
    batch = padded(rows, "left")
    states = model(**batch.inputs, output_hidden_states=True).hidden_states
    for index, row in enumerate(rows):
        alone = model(input_ids=row[None], output_hidden_states=True).hidden_states
        for layer, expected in enumerate(alone):
            assert_equal(batch.real(states[layer], index), expected[0], f"layer {layer}")


@pytest.mark.parametrize("injection", INJECTIONS)
def test_neox_may_run_its_two_halves_one_after_the_other(injection):
    _is_literal("gpt_neox", injection, use_parallel_residual=False, attention_bias=False)


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"conv_kernel_size": 3, "position_buckets": -1}, id="convolution-no-buckets"),
        pytest.param({"position_buckets": -1, "max_relative_positions": 4}, id="fewer-distances-than-tokens"),
        pytest.param({"share_att_key": False, "norm_rel_ebd": "none"}, id="own-keys-no-norm"),
        pytest.param({"pos_att_type": ["c2p"]}, id="c2p"),
        pytest.param({"pos_att_type": ["p2c"], "share_att_key": False}, id="p2c-own-queries"),
        pytest.param({"pos_att_type": None}, id="no-term"),
        pytest.param({"relative_attention": False, "position_biased_input": True, "type_vocab_size": 2}, id="absolute"),
        pytest.param({"embedding_size": 16, "conv_kernel_size": 3}, id="narrow-words"),
    ],
)
def test_deberta_in_its_other_settings(injection, changes):
    _is_literal("deberta-v2", injection, **changes)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_cohere_may_have_biases_and_no_key_norm(injection):
    _is_literal("cohere", injection, use_qk_norm=False, attention_bias=True)


@pytest.mark.parametrize("family", ["cohere", "olmo2"])
def test_key_norms_over_several_heads_take_each_prompt_of_a_bank_by_itself(family):
    base = tiny_base(family)
    known = family_of(base)
    one, two = torch.randn(2, 3, 2, 8)
    together = known.finish_keys(base, 0, torch.cat([one, two], dim=1))
    assert_equal(together, torch.cat([known.finish_keys(base, 0, keys) for keys in (one, two)], dim=1))
    norm = base.layers[0].self_attn.k_norm
    assert norm.weight.numel() == 2 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "glm4", "cohere2", "modernbert-decoder", "olmo2"])
def test_keys_turn_as_the_models_own_code_turns_them(family, dtype):
    """Some models rotate in float32, some have tables of float32; keys keep their dtype. No sum is taken."""
    base = tiny_base(family).to(dtype)
    keys = torch.randn(5, 2, 8, dtype=dtype)
    kind = (base.config.layer_types[0],) if family == "modernbert-decoder" else ()
    own = sys.modules[type(base).__module__].apply_rotary_pos_emb
    by_head = keys.transpose(0, 1)[None]
    _, expected = own(by_head, by_head, *base.rotary_emb(keys, torch.arange(-5, 0)[None], *kind))
    turned = family_of(base).rotate(keys, *tables_before_text(base, keys, *kind))
    assert_same_bits(turned.transpose(0, 1)[None], expected)


def test_a_head_that_is_no_linear_map_says_all_logits():
    base = tiny_base("modernbert-decoder", "CAUSAL_LM")
    assert isinstance(base.get_output_embeddings(), torch.nn.Linear)
    assert why_not_labelled_rows(base, {}) == "the family's head does more than a linear map"


@pytest.mark.parametrize("family", ["smollm3", "cohere2"])
def test_some_layers_know_no_positions(family):
    base = tiny_base(family)
    keys = torch.randn(3, 2, 8)
    turned, as_it_is = (family_of(base).finish_keys(base, layer, keys) for layer in range(2))
    assert torch.equal(as_it_is, keys) and not torch.allclose(turned, keys)


def test_gemma3s_tables_differ_between_kinds_of_layers():
    base = tiny_base("gemma3_text", rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    })  # fmt: skip
    keys = torch.randn(3, 2, 16)
    first, second = (family_of(base).finish_keys(base, layer, keys) for layer in range(2))
    norms = (layer.self_attn.k_norm for layer in base.layers)
    assert_differs(first - next(norms)(keys), second - next(norms)(keys))


@pytest.mark.parametrize("family", WINDOWED)
def test_padding_between_tokens_is_no_text_to_a_window(family):
    backbone = tiny_base(family)
    ends = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0]])
    between = torch.tensor([[1, 0, 1, 1, 1, 1]])
    assert smallest_window(backbone) == 4
    assert not counts_padding(backbone, ends) and counts_padding(backbone, between)
    assert not counts_padding(backbone, between[:, :4]), "the text is inside every window"
    assert not counts_padding(tiny_base("llama"), between)


def test_padding_between_cached_tokens_is_refused_where_a_window_counts_it():
    ids, mask = torch.randint(2, 40, (1, 6)), torch.tensor([[1, 0, 1, 1, 1, 1]])
    for family, refused in (("mistral", True), ("llama", False)):
        model = tiny_model(family, "deep", "CAUSAL_LM")
        call = {"input_ids": ids, "attention_mask": mask, CACHE: DynamicCache(config=model.config)}
        if refused:
            with pytest.raises(ValueError, match="attention_mask must have its padding at the ends of rows only"):
                model(**call)
        else:
            model(**call)


def test_texts_beyond_a_change_of_rotary_frequencies_are_refused():
    changes = {
        "max_position_embeddings": 32,
        "original_max_position_embeddings": 8,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 8,
        },
    }  # fmt: skip
    model = tiny_model("phi3", "deep", base_changes=changes)
    assert max_rotary_length(model.backbone) == 8 and max_rotary_length(tiny_base("gemma3_text")) is None
    model(input_ids=torch.randint(2, 40, (1, 8)))
    with pytest.raises(ValueError, match="within 8 tokens, where the model's rotary frequencies change"):
        model(input_ids=torch.randint(2, 40, (1, 9)))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("opt", {"layerdrop": 0.1}, "layerdrop 0; got 0.1"),
        ("albert", {"inner_group_num": 2}, "inner_group_num 1; got 2"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("electra", {"is_decoder": True}, "ElectraModel configured with is_decoder=True"),
    ],
)
def test_configurations_that_nobody_made_right_are_refused(family, changes, message):
    with pytest.raises(ValueError, match=message):
        get_ptv2_model(tiny_base(family, **changes), tiny_prompts("deep"))


@pytest.mark.parametrize(("family", "reason"), [("bloom", "ALiBi"), ("falcon", "multi-query")])
def test_families_whose_code_leaves_no_way_are_refused_with_the_reason(family, reason):
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(family, **sizes))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    message = rf"base must be of a family that can be served: {family}'s attention is code of its own, .*{reason}"
    with pytest.raises(ValueError, match=rf"(?i){message}.*attention interface; got {type(base).__name__}"):
        get_ptv2_model(base, tiny_prompts("deep"))
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert family in REFUSED and family not in families()


@pytest.mark.skipif("gptj" not in NOT_SERVED, reason="it is served")
def test_a_gptj_with_an_attention_of_its_own_is_refused():
    config = transformers.GPTJConfig(vocab_size=40, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    with pytest.raises(ValueError, match="attention interface, which GPT-J uses from 5.24 on: .* got GPTJModel of"):
        get_ptv2_model(transformers.GPTJModel(config), tiny_prompts("deep"))


@pytest.mark.parametrize("family", ["deberta", "pegasus", "beit"])
def test_other_families_are_refused_by_name(family):
    config = transformers.AutoConfig.for_model(family)
    assert family not in families()
    with torch.device("meta"):
        base = transformers.AutoModel.from_config(config)
    with pytest.raises(ValueError, match=f"base must be of a supported family .*with model_type '{family}'"):
        get_ptv2_model(base, tiny_prompts("deep"))


def test_a_prompt_that_does_not_reach_its_layer_is_noticed():
    """A base that drops the keyword argument would run as if there were no prompt."""
    model = tiny_model("llama", "deep")
    layer = model.backbone.layers[1].self_attn
    attend = type(layer).forward
    layer.forward = MethodType(lambda self, *args, ptv2_prompts=None, **kwargs: attend(self, *args, **kwargs), layer)
    with pytest.raises(RuntimeError, match=r"LlamaModel did not reach layers \[1\]"):
        model(input_ids=torch.randint(2, 40, (1, 4)))
    del layer.forward
    model(input_ids=torch.randint(2, 40, (1, 4)))


def test_a_configuration_of_every_family_has_the_tests_window():
    assert {name for name in FAMILIES if smallest_window(tiny_base(name))} == set(WINDOWED)
    assert tiny_config("modernbert").sliding_window == 4


def test_a_model_whose_layers_keep_keyword_arguments_for_themselves_is_refused_with_that_reason():
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model("stablelm", **sizes, num_key_value_heads=4, intermediate_size=48)
    base = transformers.AutoModel.from_config(config)
    with pytest.raises(ValueError, match="supported family .*does not hand keyword arguments on to its attention; got"):
        get_ptv2_model(base, tiny_prompts("deep"))
