"""The hub without the hub: what would be downloaded and uploaded, against local folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError

from ptv2_fast import PTuningV2Model, get_ptv2_model
from ptv2_fast.saving import hub
from tiny_models import tiny_base, tiny_model, tiny_prompts
from tolerances import assert_equal

IDS = torch.randint(3, 30, (2, 5), generator=torch.Generator().manual_seed(0))


class LocalHub:
    """Repositories as folders."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.asked: list[dict] = []

    def api(self, token=None):
        self.asked.append({"token": token})
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        assert exist_ok
        self.asked.append({"created": repo_id, "private": private})
        name = repo_id if "/" in repo_id else f"me/{repo_id}"
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message, delete_patterns):
        self.asked.append({"revision": revision, "message": commit_message})
        for path in [p for pattern in delete_patterns for p in (self.folder / repo_id).glob(pattern)]:
            path.unlink()
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"hub/{repo_id}")

    def snapshot(self, repo_id, *, revision, token, allow_patterns):
        self.asked.append({"revision": revision, "patterns": allow_patterns})
        if not (self.folder / repo_id).is_dir():
            raise RepositoryNotFoundError(
                "404: no such repository\nmore", response=SimpleNamespace(headers={}, request=None, status_code=404)
            )
        return str(self.folder / repo_id)


@pytest.fixture
def local_hub(tmp_path, monkeypatch) -> LocalHub:
    place = LocalHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", place.api)
    monkeypatch.setattr(hub, "snapshot_download", place.snapshot)
    return place


def test_what_is_pushed_can_be_loaded_by_its_name(local_hub):
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    commit = model.push_to_hub("prompts", metrics={"perplexity": 12.5}, private=True, token="secret")
    assert commit.commit_url == "hub/me/prompts"
    assert {"created": "prompts", "private": True} in local_hub.asked and {"token": "secret"} in local_hub.asked
    names = {path.name for path in (local_hub.folder / "me" / "prompts").iterdir()}
    assert names == {"README.md", "ptv2_config.json", "ptv2_model.safetensors"}
    loaded = PTuningV2Model.from_pretrained(tiny_base("llama", "CAUSAL_LM"), "me/prompts", revision="v1")
    assert local_hub.asked[-1]["revision"] == "v1"
    assert_equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits, "logits")


def test_several_adapters_and_a_chosen_one(local_hub):
    model = tiny_model("bert", "deep")
    model.add_adapter("other", tiny_prompts("prefix"))
    model.push_to_hub("me/both")
    loaded = PTuningV2Model.from_pretrained(tiny_base("bert"), "me/both")
    assert set(loaded.adapters) == {"default", "other"}
    model.push_to_hub("me/both", adapter_names=["default"])
    assert set(PTuningV2Model.from_pretrained(tiny_base("bert"), "me/both").adapters) == {"default"}
    model.push_to_hub("me/one", adapter_names=["other"])
    loaded.delete_adapter("other")
    loaded.load_adapter("me/one", "other")
    model.set_adapter("other")
    loaded.set_adapter("other")
    assert_equal(loaded(input_ids=IDS).last_hidden_state, model(input_ids=IDS).last_hidden_state, "states")


def test_the_card_is_one_that_the_hub_reads():
    model = tiny_model("bert", "deep", "SEQ_CLS")
    model.base_model.config.name_or_path = "some/base"
    card = ModelCard(str(hub.model_card(model, metrics={"accuracy": 0.875})))
    data = card.data.to_dict()
    assert data["base_model"] == "some/base" and data["pipeline_tag"] == "text-classification"
    assert data["library_name"] == "ptv2-fast" and "deep" in data["tags"]
    assert card.data.eval_results[0].metric_value == 0.875
    assert "| default | SEQ_CLS | deep | 5 |" in card.text and "BertForSequenceClassification" in card.text


@pytest.mark.parametrize(("family", "task"), [("llama", "CAUSAL_LM"), ("bert", "TOKEN_CLS"), ("bert", "SEQ_CLS")])
def test_the_card_s_example_runs(local_hub, tmp_path, monkeypatch, family, task):
    base = tiny_base(family, task)
    base.save_pretrained(tmp_path / "base")
    model = get_ptv2_model(type(base).from_pretrained(tmp_path / "base"), tiny_prompts("deep", task)).eval()
    model.push_to_hub("prompts")
    for folder in (tmp_path, local_hub.folder / "me" / "prompts"):
        text = str(hub.model_card(model)) if folder != tmp_path else None
        text = text or (local_hub.folder / "me" / "prompts" / "README.md").read_text()
        code = text.split("```python\n")[1].split("```")[0]
        monkeypatch.chdir(folder)
        names: dict = {}
        exec(code, names)
        state = names["model"].adapters.state_dict()
        assert_equal(state["default.encoder.prompts"], model.adapters["default"].encoder.prompts, code)
    model.base_model.config.name_or_path = ""
    assert "```" not in str(hub.model_card(model)) and "the base model" not in str(hub.model_card(model))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nobody/nothing", "neither a folder nor a repository"),
        ("nowhere", "adapter folder nowhere does not exist"),
        ("./some/folder", "does not exist"),
        ("a/b/c", "does not exist"),
    ],
)
def test_what_is_not_there_is_refused(local_hub, name, part):
    with pytest.raises(ValueError, match=part):
        PTuningV2Model.from_pretrained(tiny_base("bert"), name)


def test_an_unknown_adapter_is_not_pushed(local_hub):
    with pytest.raises(ValueError, match="nobody"):
        tiny_model("bert", "deep").push_to_hub("me/x", adapter_names=["nobody"])
    assert local_hub.asked == []
