"""The size and label names of a copied head travel with the adapter."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import tiny_features
import tiny_seq2seq
from batches import padded, text_rows
from ptv2_fast import PTuningV2Model, from_peft, get_ptv2_model
from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.saving.checkpoint import read_description
from tiny_models import DISTINCT, LABELS, has_head, tiny_base, tiny_prompts
from tolerances import assert_same_bits

BATCH = padded(text_rows(), "right")
NAMES = tuple(f"tag {i}" for i in range(5))


def _named_base(family, task, names=NAMES):
    base = tiny_base(family, task, num_labels=len(names))
    # The number of labels decides where random weights begin.
    backbone_of(base).load_state_dict(backbone_of(tiny_base(family, task)).state_dict())
    base.config.id2label = dict(enumerate(names))
    base.config.label2id = {name: i for i, name in enumerate(names)}
    return base


def _saved(folder, family="bert", task="TOKEN_CLS", names=NAMES):
    model = get_ptv2_model(_named_base(family, task, names), tiny_prompts("deep", task)).eval()
    model.save_pretrained(folder)
    return model.requires_grad_(False)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("family", DISTINCT)
def test_a_fresh_base_gets_them_for_this_adapter_alone(tmp_path, family, task):
    if not has_head(family, task):
        pytest.skip(f"transformers has no {task} model of {family}")
    model = _saved(tmp_path, family, task)
    base = tiny_base(family, task)
    base.requires_grad_(False)
    bare = base(**BATCH.inputs).logits
    loaded = PTuningV2Model.from_pretrained(base, tmp_path)
    assert tuple(loaded.config.id2label.values()) == NAMES and loaded.config.label2id[NAMES[3]] == 3
    assert loaded.config.num_labels == loaded.num_labels == len(NAMES)
    shape = BATCH.input_ids.shape if task == "TOKEN_CLS" else (len(BATCH.input_ids),)
    labels = torch.randint(LABELS, len(NAMES), shape)
    expected, got = model(**BATCH.inputs, labels=labels), loaded(**BATCH.inputs, labels=labels)
    assert_same_bits(got.logits, expected.logits)
    assert_same_bits(got.loss, expected.loss)
    assert base.config.num_labels == LABELS and base.config.id2label[0] == "LABEL_0"
    with loaded.disable_adapter():
        assert_same_bits(loaded(**BATCH.inputs).logits, bare)
    loaded.unload()
    assert_same_bits(base(**BATCH.inputs).logits, bare)


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("vit", "IMAGE_CLS"), ("whisper", "AUDIO_CLS"), ("t5", "SEQ_CLS"), ("t5", "TOKEN_CLS"), ("bart", "SEQ_CLS"),
        ("mbart", "SEQ_CLS"), ("dinov2", "IMAGE_CLS"),
    ],
)  # fmt: skip
def test_encoder_decoders_and_bases_that_read_no_text(tmp_path, family, task):
    if family in tiny_features.TASK:
        bases = [tiny_features.tiny_base(family, "classifier", num_labels=n) for n in (5, 2)]
        inputs, shape = tiny_features.features(family), (3,)
    else:
        bases = [tiny_seq2seq.tiny_base(family, task, num_labels=n, eos_token_id=3) for n in (5, 2)]
        ids = torch.tensor([[5, 6, 7, 3], [8, 9, 10, 3]])
        inputs, shape = {"input_ids": ids}, ids.shape if task == "TOKEN_CLS" else (2,)
    backbone_of(bases[1]).load_state_dict(backbone_of(bases[0]).state_dict())
    model = get_ptv2_model(bases[0], tiny_prompts("deep", task)).eval()
    model.save_pretrained(tmp_path)
    loaded = PTuningV2Model.from_pretrained(bases[1], tmp_path)
    assert loaded.config.num_labels == 5 and bases[1].config.num_labels == 2
    labels = torch.randint(LABELS, 5, shape)
    model.requires_grad_(False)
    for got, expected in zip(loaded(**inputs, labels=labels)[:2], model(**inputs, labels=labels)[:2], strict=True):
        assert_same_bits(got, expected)


def test_another_number_of_labels_trains_and_is_saved_again(tmp_path):
    _saved(tmp_path / "first")
    model = PTuningV2Model.from_pretrained(tiny_base("bert", "TOKEN_CLS"), tmp_path / "first", is_trainable=True)
    model.train()
    labels = BATCH.input_ids % len(NAMES)
    model(**BATCH.inputs, labels=labels).loss.backward()
    assert all(p.grad is not None for p in model.adapters["default"].base_heads.parameters())
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\]"):
        model(**BATCH.inputs, labels=labels + 1)
    model.eval().save_pretrained(tmp_path / "second")
    assert read_description(tmp_path / "second")["labels"] == list(NAMES)
    # What Trainer writes has them too.
    (tmp_path / "checkpoint-1").mkdir()
    save_file(model.state_dict(), tmp_path / "checkpoint-1" / "model.safetensors")
    for folder in ("second", "checkpoint-1"):
        again = PTuningV2Model.from_pretrained(tiny_base("bert", "TOKEN_CLS"), tmp_path / folder)
        assert tuple(again.config.id2label.values()) == NAMES
        assert_same_bits(again(**BATCH.inputs).logits, model.requires_grad_(False)(**BATCH.inputs).logits)


def test_adapters_of_one_base_have_labels_of_their_own(tmp_path):
    few, many = _saved(tmp_path / "few", names=("x", "y")), _saved(tmp_path / "many")
    base = tiny_base("bert", "TOKEN_CLS")
    model = PTuningV2Model.from_pretrained(base, tmp_path / "few", adapter_name="few")
    model.load_adapter(tmp_path / "many", "many")
    other = PTuningV2Model.from_pretrained(base, tmp_path / "many")
    for name, expected in (("many", many), ("few", few)):
        model.set_adapter(name)
        assert model.config.id2label == expected.config.id2label
        model.requires_grad_(False)
        assert_same_bits(model(**BATCH.inputs).logits, expected(**BATCH.inputs).logits, name)
    assert_same_bits(other(**BATCH.inputs).logits, many(**BATCH.inputs).logits)


def test_the_format_of_peft_has_them_too(tmp_path):
    prompts = tiny_prompts("prefix", "TOKEN_CLS", position_offset=5)
    model = get_ptv2_model(_named_base("bert", "TOKEN_CLS"), prompts).eval().requires_grad_(False)
    model.save_pretrained(tmp_path, format="peft")
    loaded = from_peft(tiny_base("bert", "TOKEN_CLS"), tmp_path)
    assert tuple(loaded.config.id2label.values()) == NAMES
    assert_same_bits(loaded(**BATCH.inputs).logits, model(**BATCH.inputs).logits)


def test_names_that_the_base_has_stay_the_base_s(tmp_path):
    _saved(tmp_path)
    base = _named_base("bert", "TOKEN_CLS")
    loaded = PTuningV2Model.from_pretrained(base, tmp_path)
    assert loaded.config is base.config and loaded.adapters["default"].labels is None


def test_a_pipeline_says_the_names(tmp_path):
    from transformers import pipeline

    class Words:
        """As much of a tokenizer as a pipeline asks for."""

    _saved(tmp_path, task="SEQ_CLS")
    loaded = PTuningV2Model.from_pretrained(tiny_base("bert", "SEQ_CLS"), tmp_path)
    made = pipeline("text-classification", model=loaded, tokenizer=Words())
    assert made.model.config.id2label[4] == NAMES[4]


@pytest.mark.parametrize(
    "change", [{"labels": "tag"}, {"labels": []}, {"labels": [1, 2]}, {"labels": {"0": "a"}}], ids=str
)
def test_damaged_labels_are_refused(tmp_path, change):
    _saved(tmp_path)
    _rewritten(tmp_path, **change)
    with pytest.raises(ValueError, match="ptv2_model.safetensors must hold labels that are a list of names"):
        PTuningV2Model.from_pretrained(tiny_base("bert", "TOKEN_CLS"), tmp_path)


def test_labels_that_could_not_be_read_again_are_not_written(tmp_path):
    model = get_ptv2_model(_named_base("bert", "TOKEN_CLS", ("a", "b\ud800")), tiny_prompts("deep", "TOKEN_CLS"))
    with pytest.raises(ValueError, match="'default'.*half a surrogate pair"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    base = _named_base("bert", "TOKEN_CLS")
    base.config.name_or_path = "/models/b\udce4rt"
    get_ptv2_model(base, tiny_prompts("deep", "TOKEN_CLS")).save_pretrained(tmp_path / "new")
    assert read_description(tmp_path / "new")["base"]["name_or_path"] == "/models/b?rt"


def test_more_labels_than_the_head_has_are_refused(tmp_path):
    _saved(tmp_path)
    _rewritten(tmp_path, labels=[str(i) for i in range(500)])
    with pytest.raises(ValueError, match=r"classifier.bias must have shape \(500,\); got \(5,\)"):
        PTuningV2Model.from_pretrained(tiny_base("bert", "TOKEN_CLS"), tmp_path)


def test_a_folder_of_an_earlier_version_has_the_base_s_labels(tmp_path):
    model = _saved(tmp_path)
    _rewritten(tmp_path, labels=None)
    loaded = PTuningV2Model.from_pretrained(_named_base("bert", "TOKEN_CLS"), tmp_path)
    assert_same_bits(loaded(**BATCH.inputs).logits, model(**BATCH.inputs).logits)
    with pytest.raises(ValueError, match=r"must have shape \(3,\); got \(5,\)"):
        PTuningV2Model.from_pretrained(tiny_base("bert", "TOKEN_CLS"), tmp_path)


def _rewritten(folder, **changes):
    path = folder / "ptv2_model.safetensors"
    with safe_open(path, "pt") as file:
        description = {**json.loads(file.metadata()["ptv2"]), **changes}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    save_file(tensors, path, metadata={"ptv2": json.dumps({k: v for k, v in description.items() if v is not None})})
