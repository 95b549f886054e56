"""What is written, what is refused, and what survives being killed."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ptv2_fast import HeadConfig, PTuningV2Model, get_ptv2_model
from ptv2_fast.saving.checkpoint import CONFIG_NAME, FORMAT_VERSION, WEIGHTS_NAME
from tiny_models import HIDDEN, tiny_base, tiny_model, tiny_prompts
from tolerances import assert_same_bits

HEADS = {"topic": HeadConfig("SEQ_CLS", 3, labels=["a", "b", "c"])}


def _base():
    return tiny_base("bert", "SEQ_CLS")


def _saved(folder: Path, **config) -> PTuningV2Model:
    """A saved model, frozen as loaded ones are: equal bits are promised between such."""
    model = tiny_model("bert", "deep", "SEQ_CLS", heads=HEADS, **config)
    model.save_pretrained(folder)
    return model.requires_grad_(False)


def _metadata(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["ptv2"])


def _rewrite(folder: Path, **changes) -> None:
    """Change the description that the weights file carries."""
    path = folder / WEIGHTS_NAME
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    description = {**_metadata(path), **changes}
    save_file(tensors, path, metadata={"ptv2": json.dumps(description)})


def test_two_small_files_hold_the_adapter_and_nothing_of_the_base(tmp_path):
    _saved(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    with safe_open(tmp_path / WEIGHTS_NAME, "pt") as file:
        assert sorted(file.keys()) == [
            "encoder.prompts",
            "heads.topic.linear.bias",
            "heads.topic.linear.weight",
        ]
    description = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert description == _metadata(tmp_path / WEIGHTS_NAME)
    assert description["format_version"] == FORMAT_VERSION
    assert description["base"]["hidden_size"] == HIDDEN


def test_several_adapters_get_a_folder_each_and_come_back(tmp_path):
    model = _saved(tmp_path / "unused")
    model.add_adapter("second", tiny_prompts("prefix", "SEQ_CLS", length=3, heads=HEADS))
    model.save_pretrained(tmp_path / "both")
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["default", "second"]
    loaded = PTuningV2Model.from_pretrained(_base(), tmp_path / "both")
    ids = torch.randint(3, 30, (2, 6))
    for name in ("default", "second"):
        expected = model(input_ids=ids, adapter_names=[name, name]).logits
        got = loaded(input_ids=ids, adapter_names=[name, name]).logits
        assert_same_bits(got, expected, name)
    assert loaded.ptv2_config["default"].heads["topic"].labels == ("a", "b", "c")


def test_the_state_dict_holds_the_adapters_alone_and_describes_itself(tmp_path):
    model = _saved(tmp_path)
    state = model.state_dict()
    assert all(key.startswith("adapters.") or key == "ptv2_description" for key in state)
    # What Trainer writes is such a state dict.
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    loaded = PTuningV2Model.from_pretrained(_base(), folder)
    ids = torch.randint(3, 30, (2, 6))
    assert_same_bits(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    saved = {key: value.clone() for key, value in state.items()}
    before = model(input_ids=ids).logits
    with torch.no_grad():
        model.adapters["default"].encoder.prompts.zero_()
    assert not torch.equal(model(input_ids=ids).logits, before)
    model.load_state_dict(saved)
    assert_same_bits(model(input_ids=ids).logits, before)
    with pytest.raises(RuntimeError, match="missing"):
        model.load_state_dict({})


def test_loading_freezes_unless_it_is_to_be_trained(tmp_path):
    _saved(tmp_path)
    frozen = PTuningV2Model.from_pretrained(_base(), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training
    model = PTuningV2Model.from_pretrained(_base(), tmp_path, is_trainable=True)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "adapters.default.encoder.prompts",
        "adapters.default.heads.topic.linear.weight",
        "adapters.default.heads.topic.linear.bias",
    ]


def test_a_prompt_that_started_from_text_is_loaded_without_the_text(tmp_path):
    class Words:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [3 + len(word) for word in text.split()]}

    config = tiny_prompts("deep", "SEQ_CLS", heads=HEADS, prompt_init="text")
    model = get_ptv2_model(_base(), config, tokenizer=Words(), init_text="some words to start from")
    model.add_adapter("other", config, tokenizer=Words(), init_text="and quite other ones")
    model.save_pretrained(tmp_path)
    loaded = PTuningV2Model.from_pretrained(_base(), tmp_path)
    for name in ("default", "other"):
        expected = model.adapters[name].encoder.prompts
        assert torch.equal(loaded.adapters[name].encoder.prompts, expected)
    assert not torch.equal(model.adapters["other"].encoder.prompts, model.adapters["default"].encoder.prompts)


def test_an_adapter_is_added_under_another_name(tmp_path):
    saved = _saved(tmp_path)
    model = tiny_model("bert", "prefix", "SEQ_CLS", heads=HEADS)
    model.load_adapter(tmp_path, "loaded")
    model.requires_grad_(False)
    assert model.active_adapter == "default"
    ids = torch.randint(3, 30, (2, 6))
    got = model(input_ids=ids, adapter_names=["loaded"] * 2).logits
    assert_same_bits(got, saved(input_ids=ids).logits)
    with pytest.raises(ValueError, match="name must be unused.*'loaded'"):
        model.load_adapter(tmp_path, "loaded")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda path: path.write_bytes(b""), "not a whole safetensors", id="empty"),
        pytest.param(
            lambda path: path.write_bytes(path.read_bytes()[:-100]),
            "not a whole safetensors",
            id="truncated",
        ),
        pytest.param(
            lambda path: path.write_bytes(pickle.dumps({"encoder.prompts": [1.0]})),
            "not a whole safetensors",
            id="pickle",
        ),
        pytest.param(
            lambda path: save_file({"weight": torch.ones(2)}, path),
            "not written by ptv2_fast",
            id="foreign",
        ),
        pytest.param(
            lambda path: save_file({"weight": torch.ones(2)}, path, metadata={"ptv2": "{"}),
            "not JSON",
            id="bad-description",
        ),
        pytest.param(
            lambda path: _rewrite(path.parent, format_version=99),
            "format_version 99",
            id="unknown-version",
        ),
        pytest.param(
            lambda path: _rewrite(path.parent, adapter_name="../../elsewhere"),
            "adapter of an unusable name.*elsewhere",
            id="unusable-name",
        ),
        pytest.param(
            lambda path: _rewrite(path.parent, base=["bert"]),
            "'base' and 'config' are objects",
            id="base-of-another-kind",
        ),
        pytest.param(
            lambda path: _rewrite(path.parent, config="deep"),
            "'base' and 'config' are objects",
            id="configuration-of-another-kind",
        ),
        pytest.param(
            lambda path: _rewrite(path.parent, config={"task_type": "SEQ_CLS", "colour": 1}),
            "unknown configuration keys.*colour",
            id="unknown-key",
        ),
        pytest.param(
            lambda path: _rewrite(path.parent, config={"task_type": "SEQ_CLS"}),
            "tensors missing .*base_heads.classifier",
            id="another-configuration",
        ),
    ],
)
def test_what_is_damaged_or_foreign_is_refused_and_the_base_left_alone(tmp_path, damage, message):
    _saved(tmp_path)
    damage(tmp_path / WEIGHTS_NAME)
    base = _base()
    with pytest.raises(ValueError, match=message):
        PTuningV2Model.from_pretrained(base, tmp_path)
    assert base.config._attn_implementation == "sdpa"
    assert all(p.requires_grad for p in base.parameters())


def test_two_folders_with_one_name_are_refused(tmp_path):
    _saved(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    with pytest.raises(ValueError, match=r"first.*and .*second.* both hold an adapter named 'default'"):
        PTuningV2Model.from_pretrained(_base(), tmp_path)


def test_several_adapters_saved_over_a_single_one_are_the_ones_that_load(tmp_path):
    model = tiny_model("bert", "deep", "SEQ_CLS", heads=HEADS)
    model.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    model.add_adapter("second", tiny_prompts("prefix", "SEQ_CLS", heads=HEADS))
    model.save_pretrained(tmp_path)
    assert set(PTuningV2Model.from_pretrained(_base(), tmp_path).adapters) == {"default", "second"}
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["a b", "ä", "1", "sst-2"])
def test_names_that_folders_can_have_come_back(tmp_path, name):
    model = tiny_model("bert", "deep", "SEQ_CLS", heads=HEADS)
    model.add_adapter(name, tiny_prompts("deep", "SEQ_CLS", heads=HEADS))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    model.save_pretrained(tmp_path / "link")
    loaded = PTuningV2Model.from_pretrained(_base(), tmp_path / "real", adapter_name=name)
    ids = torch.randint(3, 30, (2, 6))
    got = loaded(input_ids=ids).logits
    assert_same_bits(got, model.requires_grad_(False)(input_ids=ids, adapter_names=[name] * 2).logits)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no ptv2_model.safetensors"):
        PTuningV2Model.from_pretrained(_base(), tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        PTuningV2Model.from_pretrained(_base(), tmp_path / "nowhere")


def test_another_base_is_refused_with_what_differs(tmp_path):
    _saved(tmp_path)
    with pytest.raises(ValueError, match="another base: model_type 'bert' .this base: 'roberta'"):
        PTuningV2Model.from_pretrained(tiny_base("roberta", "SEQ_CLS"), tmp_path)
    with pytest.raises(ValueError, match="num_layers 2 .this base: 3"):
        PTuningV2Model.from_pretrained(tiny_base("bert", "SEQ_CLS", num_hidden_layers=3), tmp_path)


def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path):
    _saved(tmp_path)
    config = _metadata(tmp_path / WEIGHTS_NAME)["config"]
    _rewrite(tmp_path, config={**config, "num_virtual_tokens": 9})
    with pytest.raises(ValueError, match=r"encoder.prompts must have shape \(2, 9, 32\); got \(2, 5"):
        PTuningV2Model.from_pretrained(_base(), tmp_path)


def test_saving_over_a_file_is_refused(tmp_path):
    model = tiny_model("bert", "deep", "SEQ_CLS", heads=HEADS)
    target = tmp_path / "taken"
    target.write_text("mine")
    with pytest.raises(ValueError, match="save_directory must be a folder"):
        model.save_pretrained(target)
    assert target.read_text() == "mine"
    with pytest.raises(ValueError, match="adapter must be one of default"):
        model.save_pretrained(tmp_path / "other", adapter_names=["nobody"])
    assert not (tmp_path / "other").exists()


def test_only_the_main_process_writes(tmp_path):
    model = tiny_model("bert", "deep", "SEQ_CLS", heads=HEADS)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
