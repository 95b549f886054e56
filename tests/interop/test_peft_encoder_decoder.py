"""PEFT's adapters of encoder-decoders, read and written, or refused with the reason."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_models import trained
from ptv2_fast import PTuningV2Config, from_peft, get_ptv2_model
from tiny_seq2seq import STACKS, pair, tiny_base, tiny_model
from tolerances import assert_differs, assert_equal

peft = pytest.importorskip("peft")
# PEFT asks transformers for this; nothing of ours does.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

LENGTH, TASK = 3, "SEQ_2_SEQ_LM"
BATCH = pair("right", "right")
GREEDY = {"max_new_tokens": 5, "do_sample": False}


def _there(kind, method, base_changes=None, **settings):
    base = tiny_base(kind, **(base_changes or {}))
    config = {"peft_type": method, "task_type": TASK, "num_virtual_tokens": LENGTH, **settings}
    model = peft.get_peft_model(base, peft.get_peft_config(config))
    torch.manual_seed(4)
    trained(model)
    return model.eval()


def _said(model):
    with torch.no_grad():
        return model(**BATCH.inputs).logits[BATCH.target.attention_mask.bool()]


def _compare(there, base, folder):
    expected = _said(there)
    there.save_pretrained(folder)
    bare = _said(base)
    here = from_peft(base, folder)
    assert_equal(_said(here), expected)
    assert_equal(_said(from_peft(there)), expected)
    assert_differs(expected, bare)
    return here


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "P_TUNING"])
@pytest.mark.parametrize("kind", ["t5", "t5-gated", "bart", "bart-scaled", "mbart"])
def test_prompt_tuning_gives_pefts_logits_and_tokens(kind, method, tmp_path):
    there = _there(kind, method)
    here = _compare(there, tiny_base(kind), tmp_path)
    assert here.ptv2_config["default"] == PTuningV2Config(TASK, LENGTH, "shallow")
    row = BATCH.source.input_ids[2:, :7]
    assert torch.equal(here.generate(row, **GREEDY), there.generate(input_ids=row, **GREEDY))


@pytest.mark.parametrize("kind", ["bart", "mbart"])
@pytest.mark.parametrize(("encoder", "decoder"), [(3, 2), (4, 4), (3, 3), (2, 1)])
@pytest.mark.parametrize("settings", [{}, {"prefix_projection": True, "encoder_hidden_size": 12}], ids=["", "mlp"])
def test_a_prefix_of_bart_gives_pefts_logits(kind, encoder, decoder, settings, tmp_path):
    """The decoder's layers get every second pair of PEFT's keys and values, and its text stands from P on."""
    changes = {"encoder_layers": encoder, "decoder_layers": decoder}
    there = _there(kind, "PREFIX_TUNING", changes, **settings)
    here = _compare(there, tiny_base(kind, **changes), tmp_path)
    config = here.ptv2_config["default"]
    assert (config.stacks, config.position_offset) == (("decoder",), LENGTH)


def test_a_prefix_of_another_bart_is_refused(tmp_path):
    _there("bart", "PREFIX_TUNING").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was trained on another base: prompt_embeddings"):
        from_peft(tiny_base("bart", decoder_layers=4), tmp_path)


def test_a_prefix_of_t5_is_refused(tmp_path):
    """PEFT counts distances to it, and a prompt here has none."""
    _there("t5", "PREFIX_TUNING", {"d_kv": 8}).save_pretrained(tmp_path)
    base = tiny_base("t5", d_kv=8)
    with pytest.raises(ValueError, match="scores have a bias for the distance"):
        from_peft(base, tmp_path)
    assert all(parameter.requires_grad for parameter in base.parameters()), "the base was touched"


def test_prompts_in_front_of_the_decoder_are_refused(tmp_path):
    there = _there("t5", "PROMPT_TUNING")
    there.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text().replace('"PROMPT_TUNING"', '"MULTITASK_PROMPT_TUNING"')
    (tmp_path / "adapter_config.json").write_text(text)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    more = {"prefix_task_cols": torch.ones(1, 6, 1), "prefix_task_rows": torch.ones(1, 1, 32)}
    save_file({**tensors, **more}, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="without virtual tokens in front of the decoder's text"):
        from_peft(tiny_base("t5"), tmp_path)


@pytest.mark.parametrize("kind", ["t5", "bart-scaled", "mbart"])
def test_a_shallow_prompt_loads_in_peft(kind, tmp_path):
    model = tiny_model(kind, "shallow", length=LENGTH)
    model.save_pretrained(tmp_path, format="peft")
    there = peft.PeftModel.from_pretrained(tiny_base(kind), tmp_path).eval()
    assert_equal(_said(there), _said(model))
    assert_equal(_said(from_peft(tiny_base(kind), tmp_path)), _said(model))
    row = BATCH.source.input_ids[2:, :7]
    assert torch.equal(there.generate(input_ids=row, **GREEDY), model.generate(row, **GREEDY))


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("injection", ["deep", "prefix"])
def test_what_peft_cannot_do_is_not_written(kind, injection, tmp_path):
    for stacks in (STACKS, ("decoder",)):
        model = tiny_model(kind, injection, stacks=stacks)
        with pytest.raises(ValueError, match="PEFT lets layers of an encoder-decoder share a prefix"):
            model.save_pretrained(tmp_path / "peft", format="peft")
    head = tiny_model(kind, "shallow", "SEQ_CLS")
    with pytest.raises(ValueError, match="PEFT runs no .*ForSequenceClassification"):
        head.save_pretrained(tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()


def test_the_encoder_of_t5_alone(tmp_path):
    base = tiny_base("t5", "ENCODER")
    config = {"peft_type": "PROMPT_TUNING", "task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": LENGTH}
    there = peft.get_peft_model(base, peft.get_peft_config(config)).eval()
    trained(there)
    batch = BATCH.source
    with torch.no_grad():
        expected = there(**batch.inputs).last_hidden_state[:, LENGTH:]
        there.save_pretrained(tmp_path)
        here = from_peft(tiny_base("t5", "ENCODER"), tmp_path)
        real = batch.attention_mask.bool()
        assert_equal(here(**batch.inputs).last_hidden_state[real], expected[real])


def test_a_base_says_what_an_adapter_without_a_task_is_for(tmp_path):
    there = _there("bart", "PROMPT_TUNING")
    there.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace(f'"{TASK}"', "null"))
    assert_equal(_said(from_peft(tiny_base("bart"), tmp_path)), _said(there))


def test_keys_and_values_can_be_exported(tmp_path):
    from ptv2_fast.saving.export import prompt_tensors

    model = get_ptv2_model(tiny_base("t5"), PTuningV2Config(TASK, LENGTH, stacks=STACKS))
    tensors = prompt_tensors(model, "kv")
    assert {name.split(".")[1] for name in tensors} == {str(i) for i in range(7)}
    assert tensors["layers.6.key"].shape == (4, LENGTH, 6)
    shallow = tiny_model("t5", "shallow", length=LENGTH)
    assert prompt_tensors(shallow, "embeddings")["prompt_embeddings"].shape == (LENGTH, 32)
    with pytest.raises(ValueError, match="needs prompts that do not see the text"):
        prompt_tensors(shallow, "kv")
