"""transformers' Trainer on images and sounds as a user would call it, and what other tools say of such adapters."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from typer.testing import CliRunner

from ptv2_fast import GraphRunner, PTuningV2Model
from ptv2_fast.cli import app
from ptv2_fast.saving.checkpoint import DESCRIPTION_KEY
from ptv2_fast.training.bases import load_base
from ptv2_fast.training.runs import load_trained
from tiny_features import FEATURES, MAIN_INPUT, TASK, features, tiny_base, tiny_model
from tolerances import assert_equal, assert_same_bits


def _rows(family: str, count: int) -> list[dict]:
    """Rows whose class is told by the sign and the size of their numbers."""
    name = MAIN_INPUT[family]
    noise = features(family, rows=count)[name]
    return [{name: 0.3 * noise[i] + (-1.0, 0.0, 1.0)[i % 3], "labels": i % 3} for i in range(count)]


@pytest.mark.parametrize("injection", ["deep", "shallow", "prefix"])
@pytest.mark.parametrize("family", FEATURES)
def test_trainer_trains_and_its_checkpoint_loads(family, injection, tmp_path):
    model = tiny_model(family, injection, TASK[family], init_std=0.1)
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=4,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = _rows(family, 24)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    assert trainer.label_names == ["labels"]
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    folder = get_last_checkpoint(str(tmp_path))
    saved = set(load_file(f"{folder}/model.safetensors"))
    assert saved == {f"adapters.default.{name}" for name in model.adapters["default"].state_dict()} | {DESCRIPTION_KEY}
    loaded = PTuningV2Model.from_pretrained(tiny_base(family, "classifier"), folder)
    model.eval().requires_grad_(False)
    with torch.no_grad():
        assert_same_bits(loaded(**features(family)).logits, model(**features(family)).logits)


def test_a_graph_runner_steps_without_packing():
    model = tiny_model("vit", "deep", "IMAGE_CLS").train()
    batch = {**features("vit"), "labels": torch.tensor([2, 0, 1])}
    expected = model(**batch).loss
    runner = GraphRunner(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    assert_equal(runner.step(batch), expected.detach())
    assert runner.step(batch) < expected


def test_image_classification_pipelines_find_their_labels():
    heads = {"label": {"num_labels": 2, "labels": ("cat", "dog")}}
    model = tiny_model("vit", "deep", "IMAGE_CLS", heads=heads)
    assert model.config.id2label == {0: "cat", 1: "dog"} and model.main_input_name == "pixel_values"


def test_the_command_line_reads_texts_alone(tmp_path):
    base = tiny_base("vit", "classifier")
    base.save_pretrained(tmp_path / "vit")
    model = tiny_model("vit", "deep", "IMAGE_CLS")
    model.save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="is an adapter for IMAGE_CLS; .* serve texts"):
        load_trained(tmp_path / "prompt", model=str(tmp_path / "vit"))
    with pytest.raises(ValueError, match="reads pixel_values; .* serve texts"):
        load_base(tmp_path / "vit", "SEQ_CLS")
    run = CliRunner().invoke(app, ["predict", str(tmp_path / "prompt"), "a", "--model", str(tmp_path / "vit")])
    assert run.exit_code != 0 and "adapter for IMAGE_CLS" in run.output
    facts = CliRunner().invoke(app, ["info", str(tmp_path / "prompt")])
    assert facts.exit_code == 0 and "IMAGE_CLS" in facts.output
    facts = CliRunner().invoke(app, ["info", str(tmp_path / "vit")])
    assert facts.exit_code == 0 and "pixel_values" in facts.output
    train = ["train", "--task", "IMAGE_CLS", "--model", str(tmp_path / "vit"), "--data", "x.tsv", "--output", "y"]
    refused = CliRunner().invoke(app, train)
    assert refused.exit_code != 0 and "SEQ_CLS" in refused.output


def test_a_card_names_the_task():
    from ptv2_fast.saving.hub import model_card

    for family, task in (("vit", "image-classification"), ("whisper", "audio-classification")):
        assert model_card(tiny_model(family, "deep", TASK[family])).data.pipeline_tag == task


@pytest.mark.parametrize(
    ("family", "injection"), [("vit", "deep"), ("whisper", "shallow"), ("clip_text_model", "shallow")]
)
def test_peft_has_no_prompts_for_these(tmp_path, family, injection):
    with pytest.raises(ValueError, match="cannot be saved with format='peft': .*takes no embeddings"):
        tiny_model(family, injection).save_pretrained(tmp_path, format="peft")


def test_a_base_of_transformers_own_is_read_back(tmp_path):
    """Saved and loaded by transformers, a base takes the adapter that was trained on it."""
    base = tiny_base("clip_vision_model", "classifier")
    base.save_pretrained(tmp_path / "base")
    tiny_model("clip_vision_model", "deep", "IMAGE_CLS").save_pretrained(tmp_path / "prompt")
    again = transformers.CLIPForImageClassification.from_pretrained(tmp_path / "base")
    loaded = PTuningV2Model.from_pretrained(again, tmp_path / "prompt")
    expected = PTuningV2Model.from_pretrained(base, tmp_path / "prompt")
    inputs = features("clip_vision_model")
    assert_equal(loaded(**inputs).logits, expected(**inputs).logits)
