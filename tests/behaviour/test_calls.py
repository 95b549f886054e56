"""What a call asks for happens, or is refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

from ptv2_fast import PTuningV2Model, get_ptv2_model
from ptv2_fast.inputs.arguments import check_read, named_arguments
from tiny_features import features
from tiny_features import tiny_model as tiny_images
from tiny_models import tiny_base, tiny_model, tiny_prompts
from tiny_seq2seq import T5_SERVED
from tiny_seq2seq import tiny_model as tiny_seq2seq
from tolerances import assert_equal

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
BOTH = ("prefix", "shallow")

ASKED = {
    "SEQ_CLS": ("bert", "label", "labels"),
    "TOKEN_CLS": ("bert", "label", "labels"),
    "QUESTION_ANS": ("bert", "start_position", "start_positions"),
    "CAUSAL_LM": ("llama", "label", "labels"),
    "FEATURE_EXTRACTION": ("bert", "attn_mask", "attention_mask"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("task_type", ASKED)
def test_an_argument_that_nobody_reads_is_refused_with_the_nearest_name(task_type, training):
    family, wrong, near = ASKED[task_type]
    model = tiny_model(family, "deep", task_type).train(training)
    with pytest.raises(ValueError, match=f"^{wrong} must not be given: .* did you mean {near}[?]$"):
        model(input_ids=IDS, **{wrong: torch.zeros(2, dtype=torch.long)})
    with model.disable_adapter(), pytest.raises(ValueError, match=f"^{wrong} must not be given"):
        model(input_ids=IDS, **{wrong: 1})
    model(input_ids=IDS, **{wrong: None})


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"])
def test_a_mask_over_prompt_and_text_is_refused(task_type):
    """As PEFT's models are given one."""
    model = tiny_model("bert", "deep", task_type)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(2, 4\): .*the prompt is not masked"):
        model(input_ids=IDS, attention_mask=torch.ones(2, 9))


@pytest.mark.skipif(not T5_SERVED, reason="this transformers' T5 has an attention of its own")
def test_an_argument_that_no_encoder_decoder_reads_is_refused():
    model = tiny_seq2seq("t5")
    with pytest.raises(ValueError, match="decoder_mask must not be given.*did you mean decoder_"):
        model(input_ids=IDS, decoder_input_ids=IDS, decoder_mask=torch.ones_like(IDS))


def test_what_an_image_model_does_not_read_is_refused():
    model = tiny_images("vit", "deep", "IMAGE_CLS")
    model(**features("vit"), interpolate_pos_encoding=False)
    with pytest.raises(ValueError, match="label must not be given.*did you mean labels"):
        model(**features("vit"), label=torch.tensor([0, 1, 2]))


def test_a_backbone_without_a_loss_says_nothing_of_losses(monkeypatch):
    """transformers warns where the loss of a model without one is looked at."""
    model = tiny_model("bert", "deep", "FEATURE_EXTRACTION")
    warned = []
    monkeypatch.setattr("transformers.modeling_utils.logger.warning_once", warned.append)
    model(input_ids=IDS, adapter_names=["default"] * 2)
    with pytest.raises(ValueError, match="mask must not be given"):
        model(input_ids=IDS, mask=torch.ones_like(IDS))
    assert not warned


def test_arguments_that_transformers_and_trainer_pass_are_served():
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    model(
        input_ids=IDS,
        attention_mask=MASK,
        labels=IDS,
        num_items_in_batch=torch.tensor(6),
        use_cache=False,
        output_hidden_states=True,
        output_attentions=False,
        return_dict=True,
        logits_to_keep=0,
        task=None,
        output_router_logits=False,
        cache_position=torch.arange(4),
    )
    model.loss_function = lambda logits, labels, weight=1.0, **kwargs: logits.sum() * 0 + weight * len(kwargs)
    assert model(input_ids=IDS, labels=IDS, weight=3.0, mine=1).loss > 0, "a loss may look into what it is given"


class _Foreign(PreTrainedModel):
    """A model that is not transformers' own."""

    config_class = PretrainedConfig


def test_models_of_others_may_read_what_they_do_not_name():
    check_read({"anything": 1}, tiny_base("bert").forward, _Foreign(PretrainedConfig()))


def test_positional_arguments_have_the_names_of_the_forward_that_they_are_for():
    forward = tiny_base("gpt2", "CAUSAL_LM").forward
    assert list(named_arguments(forward, (IDS, None, MASK))) == ["input_ids", "attention_mask"]
    assert named_arguments(forward, ()) == {}


def guided(model: PTuningV2Model, scale: float, count: int) -> torch.Tensor:
    """Greedy generation with classifier-free guidance, written out: the unconditional text starts at the last token."""
    ids, start = IDS, IDS.shape[1] - 1
    for _ in range(count):
        conditional = model(input_ids=ids).logits[:, -1].log_softmax(-1)
        unconditional = model(input_ids=ids[:, start:]).logits[:, -1].log_softmax(-1)
        best = (scale * (conditional - unconditional) + unconditional).argmax(-1)
        ids = torch.cat([ids, best[:, None]], dim=1)
    return ids


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("injection", ["deep", *BOTH])
def test_generation_with_guidance_has_the_prompts_in_both_passes(family, injection):
    model = tiny_model(family, injection, "CAUSAL_LM", exact=True)
    found = model.generate(input_ids=IDS, guidance_scale=1.5, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, guided(model, 1.5, 4))


TRACED = (("bert", "SEQ_CLS"), ("deberta-v2", "SEQ_CLS"), ("modernbert", "TOKEN_CLS"), ("llama", "CAUSAL_LM"))


# torch announces that its tracer goes; what was asked of it until then is answered.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "task_type"), TRACED)
@pytest.mark.parametrize("injection", ["deep", "prefix"])
def test_a_model_can_be_traced(family, task_type, injection):
    model = tiny_model(family, injection, task_type)
    model.config.use_cache = False  # a trace returns tensors alone, and a cache is none
    # What it gives is looked at below: torch need not trace it a second time to compare.
    traced = torch.jit.trace(model, (IDS, MASK), strict=False, check_trace=False)
    again = torch.tensor([[4, 5, 9, 8], [9, 13, 11, 3]])
    assert_equal(traced(again, MASK)["logits"], model(again, MASK).logits, "logits")


def test_a_wrapper_says_which_causal_model_it_is():
    model = get_ptv2_model(tiny_base("gpt2", "CAUSAL_LM"), tiny_prompts("deep", "CAUSAL_LM"))
    assert model._get_name() == "GPT2LMHeadModel"
    assert repr(model).startswith("PTuningV2ModelForCausalLM(\n  (base_model): GPT2LMHeadModel(")
