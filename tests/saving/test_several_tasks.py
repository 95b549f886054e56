"""One folder and one card for adapters of several tasks: whatever is loaded says what was saved, or is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard

from ptv2_fast import PTuningV2Config, PTuningV2Model, get_ptv2_model
from ptv2_fast.saving import hub
from tiny_folders import tiny_bert, tiny_llama
from tiny_models import tiny_base
from tiny_sets import CONFIGS, several
from tolerances import assert_same_bits

NAMES = ("chat", "ner", "spam", "qa", "find")
ROWS = (*NAMES, "spam")
IDS = torch.randint(5, 30, (len(ROWS), 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> PTuningV2Model:
    return several(tiny_llama(), NAMES)


@torch.no_grad()
def said(model: PTuningV2Model, *names: str) -> list[torch.Tensor]:
    """What rows of these adapters give."""
    return list(model(IDS[: len(names)], adapter_names=list(names)).logits)


def assert_says_the_same(loaded: PTuningV2Model, model: PTuningV2Model, *names: str) -> None:
    for name, left, right in zip(names, said(loaded, *names), said(model, *names), strict=True):
        assert_same_bits(left, right, name)


def tree(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_all_are_saved_and_loaded_with_any_of_them_active(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(NAMES)
    for name in (None, *NAMES):
        loaded = PTuningV2Model.from_pretrained(tiny_llama(), tmp_path, adapter_name=name)
        first = name or sorted(NAMES)[0]
        assert loaded.active_adapter == first and loaded.task_type == CONFIGS[first].task_type
        assert type(loaded) is PTuningV2Model.class_of(CONFIGS[first].task_type)
        assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training
        assert_says_the_same(loaded, model, *ROWS)
    goes_on = PTuningV2Model.from_pretrained(tiny_llama(), tmp_path, adapter_name="ner", is_trainable=True)
    training = {name for name, parameter in goes_on.named_parameters() if parameter.requires_grad}
    assert training and all(name.startswith("adapters.ner.") for name in training)


@pytest.mark.parametrize("chosen", [("spam", "chat"), ("ner",), ("ner", "spam")])
def test_some_are_saved_and_a_backbone_serves_those_that_read(model, tmp_path, chosen):
    model.save_pretrained(tmp_path, adapter_names=list(chosen))
    base = tiny_llama() if "chat" in chosen else tiny_llama().model
    loaded = PTuningV2Model.from_pretrained(base, tmp_path)
    assert set(loaded.adapters) == set(chosen)
    assert_says_the_same(loaded, model, *chosen)


def test_a_save_of_one_task_over_several_leaves_those_that_the_model_has(model, tmp_path):
    model.save_pretrained(tmp_path)
    model.delete_adapter("qa")
    with torch.no_grad():
        model.adapters["ner"].encoder.prompts.add_(1)
    model.save_pretrained(tmp_path, adapter_names=["ner", "chat"])
    loaded = PTuningV2Model.from_pretrained(tiny_llama(), tmp_path)
    assert set(loaded.adapters) == set(NAMES) - {"qa"}
    assert_says_the_same(loaded, model, "chat", "ner", "spam", "find")


def test_an_adapter_of_another_task_is_added_to_a_loaded_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = PTuningV2Model.from_pretrained(tiny_llama(), tmp_path / "chat", adapter_name="chat")
    loaded.load_adapter(tmp_path / "ner", "tagger")
    assert loaded.task_type == "CAUSAL_LM" and loaded.active_adapter == "chat"
    loaded.load_adapter(tmp_path / "spam", "spam", is_trainable=True)
    assert loaded.task_type == "SEQ_CLS" and loaded.active_adapter == "spam"
    found, expected = said(loaded, "chat", "tagger", "spam"), said(model, "chat", "ner", "spam")
    for left, right in zip(found, expected, strict=True):
        assert_same_bits(left, right)


@pytest.mark.parametrize("whole", [True, False])
def test_a_base_that_cannot_write_refuses_an_adapter_that_does(model, tmp_path, whole):
    """With the folder's name, and nothing of the model has changed."""
    model.save_pretrained(tmp_path)
    reader = PTuningV2Model.from_pretrained(tiny_llama().model, tmp_path / "ner", adapter_name="ner")
    before = {name: tensor.clone() for name, tensor in reader.state_dict().items()}
    with pytest.raises(ValueError, match=f"{tmp_path}.*base must be a causal language model"):
        if whole:
            PTuningV2Model.from_pretrained(tiny_llama().model, tmp_path)
        else:
            reader.load_adapter(tmp_path / "chat", "chat", is_trainable=True)
    assert list(reader.adapters) == ["ner"] and reader.task_type == "TOKEN_CLS"
    after = reader.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_an_encoder_s_model_refuses_an_adapter_of_another_base(model, tmp_path):
    model.save_pretrained(tmp_path)
    encoder = get_ptv2_model(tiny_bert(), CONFIGS["spam"], "spam")
    with pytest.raises(ValueError, match="was trained on another base"):
        encoder.load_adapter(tmp_path / "ner", "ner")
    assert list(encoder.adapters) == ["spam"]


def test_adapters_with_a_copied_head_are_saved_beside_ones_with_their_own(tmp_path):
    base = tiny_base("bert", "SEQ_CLS")
    model = get_ptv2_model(base, PTuningV2Config("SEQ_CLS", num_virtual_tokens=2), "copied")
    model.add_adapter("ner", CONFIGS["ner"])
    model.save_pretrained(tmp_path)
    loaded = PTuningV2Model.from_pretrained(tiny_base("bert", "SEQ_CLS"), tmp_path)
    for name in ("ner", "copied"):
        for one in (model.eval(), loaded):
            one.set_adapter(name)
        with torch.no_grad():
            assert_same_bits(loaded(IDS).logits, model(IDS).logits, name)


def test_a_state_dict_of_several_tasks_rebuilds_them(model):
    other = several(tiny_llama(), NAMES)
    with torch.no_grad():
        for parameter in other.adapters.parameters():
            parameter.zero_()
    other.set_adapter("qa")
    other.load_state_dict(model.state_dict())
    assert other.task_type == "QUESTION_ANS"
    assert_says_the_same(other, model, *ROWS)


def test_the_card_names_all_tasks_and_shows_how_one_is_chosen(model, tmp_path, monkeypatch):
    """Its example runs over the base that serves all of them."""
    tiny_llama().save_pretrained(tmp_path / "base")
    model.base_model.config.name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path)
    card = ModelCard(str(hub.model_card(model, metrics={"accuracy": 0.5})))
    data = card.data.to_dict()
    assert "pipeline_tag" not in data and card.data.eval_results is None and "| accuracy | 0.5 |" in card.text
    tags = {"text-generation", "token-classification", "text-classification", "question-answering"}
    assert {*tags, "sentence-similarity", "deep"} <= set(data["tags"])
    code = card.text.split("```python\n")[1].split("```")[0]
    assert "from transformers import LlamaForCausalLM" in code and "adapter_names=" in code
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["model"].active_adapter == NAMES[-1] and type(names["model"]).__name__.endswith("SentenceRetrieval")
    call = code.split("a batch: ")[1].strip().removeprefix("model(**batch, ")
    rows = eval(f"dict({call}", {})["adapter_names"]
    assert_says_the_same(names["model"], model, *rows)


def test_the_card_of_one_task_is_as_it_was(model):
    data = hub.model_card(model, ["ner"], {"f1": 0.5}).data
    assert data.pipeline_tag == "token-classification" and data.tags == ["p-tuning-v2", "prompt-tuning", "deep"]
    assert data.eval_results[0].task_type == "token-classification"
    assert "set_adapter" not in str(hub.model_card(model, ["ner"]))


def test_a_card_promises_no_batch_that_is_refused():
    """Examples that are several rows, and copies of the base's head, stand in no batch with others."""
    grouped = several(tiny_llama(), ("spam", "choice"))
    copied = get_ptv2_model(tiny_base("bert", "SEQ_CLS"), PTuningV2Config("SEQ_CLS", num_virtual_tokens=2), "copied")
    copied.add_adapter("ner", CONFIGS["ner"])
    for model in (grouped, copied):
        model.base_model.config.name_or_path = "some/base"
        text = str(hub.model_card(model))
        assert "model.set_adapter(" in text and "adapter_names" not in text


def test_what_is_pushed_is_one_folder_with_one_card(model, tmp_path, monkeypatch):
    place = tmp_path / "hub"

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path, **_):
            shutil.copytree(folder_path, place)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(place))
    model.push_to_hub("me/all", adapter_names=["chat", "spam"])
    assert {path.name for path in place.iterdir() if not path.name.startswith(".")} == {"README.md", "chat", "spam"}
    assert (
        "| chat | CAUSAL_LM |" in (place / "README.md").read_text()
        and "| ner |" not in (place / "README.md").read_text()
    )
    loaded = PTuningV2Model.from_pretrained(tiny_llama(), "me/all", adapter_name="spam")
    assert_says_the_same(loaded, model, "chat", "spam")


def test_peft_s_format_takes_those_that_it_can_and_refuses_before_anything_is_written(model, tmp_path):
    model.add_adapter("poet", CONFIGS["poet"])
    with pytest.raises(ValueError, match="adapter 'ner' cannot be saved with format='peft'"):
        model.save_pretrained(tmp_path / "new", format="peft")
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path / "some", adapter_names=["chat", "poet"], format="peft")
    before = tree(tmp_path / "some")
    kinds = {name: json.loads(before[f"{name}/adapter_config.json"])["task_type"] for name in ("chat", "poet")}
    assert kinds == {"chat": "CAUSAL_LM", "poet": "CAUSAL_LM"}
    for name in ("ner", "spam", "qa", "find"):
        with pytest.raises(ValueError, match=f"adapter {name!r} cannot be saved with format='peft': ."):
            model.save_pretrained(tmp_path / "some", adapter_names=["chat", name], format="peft")
        with pytest.raises(ValueError, match=f"adapter {name!r} cannot be saved with format='peft': ."):
            model.save_pretrained(tmp_path / "some", adapter_names=[name], format="peft")
    assert tree(tmp_path / "some") == before
