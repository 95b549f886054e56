"""PEFT's adapters run here with the logits that they have in PEFT, or are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from batches import padded, text_rows
from peft_models import LENGTH, counted, peft_model, said, trained
from ptv2_fast import from_peft
from tiny_models import DECODERS, HIDDEN, NARROW_WORDS, tiny_base, wide_window
from tolerances import assert_differs, assert_equal, assert_same_bits

peft = pytest.importorskip("peft")
# PEFT asks transformers for this; nothing of ours does.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

RIGHT, LEFT = padded(text_rows(), "right"), padded(text_rows(), "left")
FULL = padded(text_rows(9, 9, 9), "right")
ENCODERS = ("bert", "roberta", "xlm-roberta", "electra")
# PEFT takes word embeddings to be as wide as the states, and does not find DistilBERT's sizes.
SIZES = {
    "electra": {"token_dim": NARROW_WORDS["electra"]},
    "albert": {"token_dim": NARROW_WORDS["albert"]},
    "distilbert": {"token_dim": HIDDEN, "num_attention_heads": 4},
}
PREFIX_CASES = [
    *[(family, task) for family in ("bert", "roberta") for task in ("TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")],
    *[(family, "TOKEN_CLS") for family in ("xlm-roberta", "electra", "gpt2", "llama")],
    *[("gpt2", "FEATURE_EXTRACTION"), ("llama", "QUESTION_ANS")],
    *[(family, "CAUSAL_LM") for family in DECODERS],
]
# Families without prefix tuning in PEFT have prompt tuning.
PROMPT_CASES = [*PREFIX_CASES, *[(family, "TOKEN_CLS") for family in ("albert", "distilbert", "modernbert")]]


@pytest.mark.parametrize(
    ("kind", "family", "task"),
    [
        *[("PREFIX_TUNING", *case) for case in PREFIX_CASES],
        *[("PROMPT_TUNING", *case) for case in PROMPT_CASES],
    ],
)
def test_folder_and_model_give_pefts_logits(tmp_path, kind, family, task):
    changes = wide_window(family)
    settings = SIZES.get(family, {}) if kind == "PROMPT_TUNING" else {}
    there = peft_model(family, task, kind, base_changes=changes, **settings)
    expected = said(there, RIGHT, task)
    there.save_pretrained(tmp_path)
    base = tiny_base(family, task, **changes)
    bare = said(base, RIGHT, task)
    from_folder = from_peft(base, tmp_path)
    assert_equal(said(from_folder, RIGHT, task), expected)
    assert_equal(said(from_peft(there), RIGHT, task), expected)
    assert_differs(expected, bare)
    assert not from_folder.training and not any(p.requires_grad for p in from_folder.parameters())
    config = from_folder.ptv2_config["default"]
    assert (config.task_type, config.num_virtual_tokens) == (task, LENGTH)
    assert config.text_offset == LENGTH


@pytest.mark.parametrize("family", [*ENCODERS, "gpt2", "llama"])
def test_a_classifiers_prefix_and_head_come_along(tmp_path, family):
    there = peft_model(family, "SEQ_CLS", "PREFIX_TUNING")
    expected = said(there, RIGHT, "SEQ_CLS")
    there.save_pretrained(tmp_path)
    here = from_peft(tiny_base(family, "SEQ_CLS"), tmp_path)
    assert_equal(said(here, RIGHT, "SEQ_CLS"), expected)
    with torch.no_grad():
        for parameter in here.adapters["default"].base_heads.parameters():
            parameter.zero_()
    assert_differs(said(here, RIGHT, "SEQ_CLS"), expected)


METHODS = [
    ("PREFIX_TUNING", {"prefix_projection": True, "encoder_hidden_size": 6}),
    ("CARTRIDGE", {"num_frozen_tokens": 1}),
    ("P_TUNING", {"encoder_hidden_size": 6}),
    (
        "P_TUNING",
        {
            "encoder_reparameterization_type": "LSTM",
            "encoder_hidden_size": 6,
            "encoder_num_layers": 2,
            "encoder_dropout": 0.5,
        },
    ),
    ("MULTITASK_PROMPT_TUNING", {"num_tasks": 1, "num_ranks": 2}),
]


@pytest.mark.parametrize(("kind", "settings"), METHODS, ids=["mlp", "cartridge", "p-tuning", "lstm", "multitask"])
@pytest.mark.parametrize(("family", "task"), [("bert", "TOKEN_CLS"), ("llama", "CAUSAL_LM")])
def test_what_an_encoder_makes_is_taken(tmp_path, family, task, kind, settings):
    there = peft_model(family, task, kind, **settings)
    tasks = {"task_ids": torch.zeros(3, dtype=torch.long)} if kind.startswith("MULTI") else {}
    expected = said(there, RIGHT, task, **tasks)
    there.save_pretrained(tmp_path)
    assert_equal(said(from_peft(tiny_base(family, task), tmp_path), RIGHT, task), expected)
    there.train()  # an LSTM's dropout is no part of its prompts
    assert_equal(said(from_peft(there), RIGHT, task), expected)
    assert there.prompt_encoder["default"].training
    if kind != "MULTITASK_PROMPT_TUNING":
        loaded = peft.PeftModel.from_pretrained(tiny_base(family, task), tmp_path)
        assert_equal(said(from_peft(loaded), RIGHT, task), expected)


def test_the_mlp_of_a_prefix_goes_on_training():
    """Its gradients are PEFT's."""
    there = peft_model("bert", "TOKEN_CLS", "PREFIX_TUNING", prefix_projection=True, encoder_hidden_size=6)
    labels = RIGHT.input_ids.remainder(3).masked_fill(RIGHT.attention_mask == 0, -100)
    loss = there(**RIGHT.inputs, labels=labels).loss
    loss.backward()
    encoder = there.prompt_encoder["default"]
    expected = [encoder.embedding.weight.grad, *(p.grad for p in encoder.transform.parameters())]
    head = there.get_base_model().classifier.modules_to_save["default"].weight.grad
    here = from_peft(there, is_trainable=True)
    own = here(**RIGHT.inputs, labels=labels).loss
    assert_equal(own, loss)
    own.backward()
    adapter = here.adapters["default"]
    assert adapter.config.reparameterization == 6
    mine = [adapter.encoder.embeddings.grad, *(p.grad for p in adapter.encoder.mlp.parameters())]
    for actual, wanted in zip([*mine, adapter.base_heads["classifier"].weight.grad], [*expected, head], strict=True):
        assert_equal(actual, wanted)


def test_an_mlp_over_other_widths_is_merged():
    """Llama's grouped keys are narrower than its states, and PEFT's embeddings are as wide as the keys."""
    there = peft_model("llama", "CAUSAL_LM", "PREFIX_TUNING", prefix_projection=True, encoder_hidden_size=6)
    expected = said(there, RIGHT, "CAUSAL_LM")
    here = from_peft(there, is_trainable=True)
    assert here.adapters["default"].encoder.prompts.requires_grad
    assert_equal(said(here, RIGHT, "CAUSAL_LM"), expected)


def test_frozen_tokens_train_here_and_it_is_said():
    there = peft_model("llama", "CAUSAL_LM", "CARTRIDGE", num_frozen_tokens=1)
    with pytest.warns(UserWarning, match="CARTRIDGE"):
        from_peft(there, is_trainable=True)


def test_every_task_of_a_multitask_prompt_is_an_adapter(tmp_path):
    there = peft_model("llama", "CAUSAL_LM", "MULTITASK_PROMPT_TUNING", num_tasks=3, num_ranks=2)
    expected = said(there, RIGHT, "CAUSAL_LM", task_ids=torch.tensor([2, 0, 1]))
    there.save_pretrained(tmp_path)
    here = from_peft(tiny_base("llama", "CAUSAL_LM"), tmp_path)
    assert list(here.adapters) == ["default_0", "default_1", "default_2"]
    names = ["default_2", "default_0", "default_1"]
    assert_equal(said(here, RIGHT, "CAUSAL_LM", adapter_names=names), expected)
    single = from_peft(tiny_base("llama", "CAUSAL_LM"), tmp_path, task_id=1, adapter_name="second")
    assert list(single.adapters) == ["second"]
    expected = said(there, RIGHT, "CAUSAL_LM", task_ids=torch.tensor([1, 1, 1]))
    assert_equal(said(single, RIGHT, "CAUSAL_LM"), expected)
    with pytest.raises(ValueError, match="task_id must be one of the adapter's 3 tasks; got 3"):
        from_peft(tiny_base("llama", "CAUSAL_LM"), tmp_path, task_id=3)


def test_all_adapters_of_a_model_come_along():
    there = peft_model("bert", "TOKEN_CLS", "PREFIX_TUNING")
    settings = peft.PrefixTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=2)
    there.add_adapter("other", settings)
    there.set_adapter("other")
    trained(there)
    other = said(there, RIGHT, "TOKEN_CLS")
    there.set_adapter("default")
    default = said(there, RIGHT, "TOKEN_CLS")
    assert_differs(other, default)
    there.set_adapter("other")
    here = from_peft(there)
    assert set(here.adapters) == {"default", "other"} and here.active_adapter == "other"
    assert_equal(said(here, RIGHT, "TOKEN_CLS"), other)
    here.set_adapter("default")
    assert_equal(said(here, RIGHT, "TOKEN_CLS"), default)
    alone = from_peft(there, adapter_name="default")
    assert list(alone.adapters) == ["default"]
    assert_equal(said(alone, RIGHT, "TOKEN_CLS"), default)
    with pytest.raises(ValueError, match="adapter_name must be one of default, other; got 'third'"):
        from_peft(there, adapter_name="third")


def test_a_peft_model_works_again_after_unload():
    there = peft_model("bert", "TOKEN_CLS", "PREFIX_TUNING")
    expected = said(there, RIGHT, "TOKEN_CLS")
    here = from_peft(there)
    again = from_peft(there)  # a base that is taken over already
    with again.disable_adapter():
        assert_equal(said(again, RIGHT, "TOKEN_CLS"), said(tiny_base("bert", "TOKEN_CLS"), RIGHT, "TOKEN_CLS"))
    here.unload()
    assert_equal(said(there, RIGHT, "TOKEN_CLS"), expected)


# Padding on the left.


@pytest.mark.parametrize(
    ("family", "task", "kind"),
    [
        ("roberta", "TOKEN_CLS", "PREFIX_TUNING"),
        ("opt", "CAUSAL_LM", "PREFIX_TUNING"),
        ("opt", "CAUSAL_LM", "PROMPT_TUNING"),
    ],
)
def test_left_padding_where_peft_is_right(family, task, kind):
    there = peft_model(family, task, kind)
    expected = said(there, LEFT, task)
    assert_equal(expected, said(there, RIGHT, task))
    assert_equal(said(from_peft(there), LEFT, task), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_left_padding_with_positions(family):
    """PEFT is right where the caller counts the positions."""
    there = peft_model(family, "CAUSAL_LM", "PREFIX_TUNING")
    expected = said(there, LEFT, "CAUSAL_LM", position_ids=counted(LEFT))
    here = from_peft(there)
    assert_equal(said(here, LEFT, "CAUSAL_LM"), expected)
    assert_equal(said(here, LEFT, "CAUSAL_LM", position_ids=counted(LEFT)), expected)


@pytest.mark.parametrize(("family", "task"), [("bert", "TOKEN_CLS"), ("gpt2", "CAUSAL_LM"), ("llama", "CAUSAL_LM")])
def test_left_padding_where_peft_is_wrong(family, task):
    """A row gives here what it gives alone; the day that PEFT does too, the documentation has to change."""
    there = peft_model(family, task, "PROMPT_TUNING")
    expected = said(there, RIGHT, task)
    assert_differs(said(there, LEFT, task), expected)
    assert_equal(said(from_peft(there), LEFT, task), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation(family):
    there = peft_model(family, "CAUSAL_LM", "PREFIX_TUNING")
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    expected = there.generate(**LEFT.inputs, **settings)
    assert torch.equal(from_peft(there).generate(**LEFT.inputs, **settings), expected)


# Where the text's own rows are read.


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_causal_classifier_reads_the_last_real_token(family):
    there = peft_model(family, "SEQ_CLS", "PROMPT_TUNING")
    full, short = said(there, FULL, "SEQ_CLS"), said(there, RIGHT, "SEQ_CLS")
    here = from_peft(there)
    assert_equal(said(here, FULL, "SEQ_CLS"), full)
    own = said(here, RIGHT, "SEQ_CLS")
    assert_differs(own, short)
    alone = [said(here, padded([row], "right", len(row)), "SEQ_CLS") for row in text_rows()]
    assert_equal(own, torch.cat(alone))


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoders_head_that_read_a_virtual_token_has_to_be_trained_again(family):
    there = peft_model(family, "SEQ_CLS", "PROMPT_TUNING", **SIZES.get(family, {}))
    with pytest.warns(UserWarning, match="first virtual token"):
        here = from_peft(there)
    states = there.base_model.base_model(
        inputs_embeds=torch.cat(
            [there.get_prompt(3), there.get_base_model().get_input_embeddings()(FULL.input_ids)], dim=1
        )
    ).last_hidden_state
    assert_equal(here.run(here.backbone, FULL.inputs).last_hidden_state, states[:, LENGTH:])


def test_answer_spans_are_places_of_the_text():
    there = peft_model("bert", "QUESTION_ANS", "PROMPT_TUNING")
    with torch.no_grad():
        theirs = there(**RIGHT.inputs).start_logits
        ours = from_peft(there)(**RIGHT.inputs).start_logits
    assert theirs.shape == (3, 9 + LENGTH) and ours.shape == (3, 9)


# What is refused.


@pytest.fixture
def folder(tmp_path):
    peft_model("bert", "TOKEN_CLS", "PREFIX_TUNING").save_pretrained(tmp_path)
    return tmp_path


def _refused(folder, message, base=None, **arguments):
    base = tiny_base("bert", "TOKEN_CLS") if base is None else base
    before = base.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        from_peft(base, folder, **arguments)
    assert base.config._attn_implementation == before, "the base was touched"


def _changed(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_folders_that_are_none(folder, tmp_path):
    _refused(tmp_path / "nowhere", "nowhere does not exist")
    empty = tmp_path / "empty"
    empty.mkdir()
    _refused(empty, "adapter_config.json: it is not a PEFT adapter folder")
    (folder / "adapter_config.json").write_text("{")
    _refused(folder, "adapter_config.json is not JSON")
    (folder / "adapter_config.json").write_text("[]")
    _refused(folder, "must hold an object; got list")


def test_weights_that_are_missing_damaged_or_pickled(folder):
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        _refused(folder, "adapter_model.safetensors is not a whole safetensors file")
    weights.unlink()
    _refused(folder, "adapter_model.safetensors does not exist")
    torch.save({}, folder / "adapter_model.bin")
    _refused(folder, "adapter_model.bin is a pickle.*weights_only=True")


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 3}, {"hidden_size": 64}, {"num_attention_heads": 2}],
    ids=lambda changes: next(iter(changes)),
)
def test_bases_of_another_shape(folder, changes):
    _refused(folder, "was trained on another base", tiny_base("bert", "TOKEN_CLS", **changes))


def test_a_prompt_of_another_width(tmp_path):
    peft_model("bert", "TOKEN_CLS", "PROMPT_TUNING").save_pretrained(tmp_path)
    _refused(tmp_path, "was trained on another base", tiny_base("bert", "TOKEN_CLS", hidden_size=64))


def test_heads_that_the_base_does_not_have(folder):
    _refused(folder, "must hold the head of BertForQuestionAnswering", tiny_base("bert", "QUESTION_ANS"))
    _refused(folder, "must hold the head of BertModel", tiny_base("bert"))
    _refused(folder, "classifier.*shape", tiny_base("bert", "TOKEN_CLS", num_labels=5))


def test_other_methods(tmp_path):
    lora = peft.get_peft_model(tiny_base("bert", "TOKEN_CLS"), peft.LoraConfig(task_type="TOKEN_CLS"))
    lora.save_pretrained(tmp_path)
    message = "describes a LORA adapter; from_peft reads PREFIX_TUNING.*merged into the base"
    _refused(tmp_path, message)
    with pytest.raises(ValueError, match=message):
        from_peft(lora)


def test_a_head_that_was_not_trained_is_the_bases():
    """PEFT looks for qa_outputs, and ModernBERT calls it classifier."""
    changes = wide_window("modernbert")
    there = peft_model("modernbert", "QUESTION_ANS", "PROMPT_TUNING", base_changes=changes)
    expected = said(there, RIGHT, "QUESTION_ANS")
    with pytest.warns(UserWarning, match="holds no head; the one of ModernBertForQuestionAnswering stays"):
        here = from_peft(there)
    assert_equal(said(here, RIGHT, "QUESTION_ANS"), expected)


def test_modules_that_are_no_head():
    there = peft_model("llama", "CAUSAL_LM", "PREFIX_TUNING", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"no other trained modules.*lm_head.weight"):
        from_peft(there)


def test_configurations_that_do_not_fit(folder):
    _changed(folder, task_type="CLASSIFYING")
    _refused(folder, "task_type 'CLASSIFYING'")
    _changed(folder, task_type="TOKEN_CLS", num_virtual_tokens=4)
    _refused(folder, "num_virtual_tokens 4; got 3 rows")
    _changed(folder, num_virtual_tokens=None)
    _refused(folder, "num_virtual_tokens of at least 1; got None")


def test_tensors_that_do_not_fit(folder):
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "stranger": torch.zeros(1)}, weights)
    _refused(folder, r"unknown tensors \['stranger'\]")
    save_file({n: t for n, t in tensors.items() if n != "prompt_embeddings"}, weights)
    _refused(folder, "lacks the tensor 'prompt_embeddings'")
    save_file({n: t for n, t in tensors.items() if "bias" not in n}, weights)
    _refused(folder, r"missing \['classifier.bias'\]")


def test_tasks_of_a_multitask_prompt_that_do_not_fit(tmp_path):
    peft_model("gpt2", "CAUSAL_LM", "MULTITASK_PROMPT_TUNING", num_tasks=2, num_ranks=2).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "prefix_task_rows": torch.zeros(2, 1, 32)}, weights)
    _refused(tmp_path, r"prefix_task_cols \(T, P, r\)", tiny_base("gpt2", "CAUSAL_LM"))


def test_what_is_given(folder):
    with pytest.raises(ValueError, match="folder must be given with a base"):
        from_peft(tiny_base("bert", "TOKEN_CLS"))
    with pytest.raises(ValueError, match="folder must be None with a PeftModel"):
        from_peft(peft_model("bert", "TOKEN_CLS", "PREFIX_TUNING"), folder)
    with pytest.raises(ValueError, match="model must be a PeftModel or a transformers PreTrainedModel; got str"):
        from_peft("bert", folder)


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_a_task_that_is_not_stated_is_the_base_class(tmp_path, task):
    peft_model("bert", task, "PREFIX_TUNING").save_pretrained(tmp_path)
    _changed(tmp_path, task_type=None)
    assert from_peft(tiny_base("bert", task), tmp_path).ptv2_config["default"].task_type == task


def test_an_imported_adapter_is_saved_and_loaded_as_any(folder, tmp_path):
    from ptv2_fast import PTuningV2Model

    here = from_peft(tiny_base("bert", "TOKEN_CLS"), folder)
    here.save_pretrained(tmp_path / "own")
    loaded = PTuningV2Model.from_pretrained(tiny_base("bert", "TOKEN_CLS"), tmp_path / "own")
    here.requires_grad_(False)
    assert_same_bits(said(loaded, RIGHT, "TOKEN_CLS"), said(here, RIGHT, "TOKEN_CLS"))
