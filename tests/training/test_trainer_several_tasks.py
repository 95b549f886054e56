"""transformers' Trainer and pipelines on a model with adapters for several tasks: as on a model with that one alone."""

from __future__ import annotations

import logging

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments, pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines import base as pipelines
from transformers.trainer_utils import get_last_checkpoint

from ptv2_fast import PTuningV2Model, get_ptv2_model
from ptv2_fast.training.labels import LabelSet
from ptv2_fast.training.task_data import TaskCodec
from tiny_folders import tiny_llama, tiny_tokenizer, toy_examples
from tiny_sets import CONFIGS, several
from tolerances import assert_same_bits

NAMES = ("chat", "ner", "spam", "qa")
LABELS = {"qa": ["start_positions", "end_positions"]}


def codec_of(name: str) -> TaskCodec:
    config = CONFIGS[name]
    labels = (config.heads or {}).get("own")
    names = LabelSet(labels.labels) if labels is not None and labels.labels else None
    return TaskCodec(config.task_type, tiny_tokenizer(causal=True), names, max_length=32, doc_stride=8)


def model_of_all() -> PTuningV2Model:
    return several(tiny_llama(), NAMES)


def alone(name: str) -> PTuningV2Model:
    """The adapter as it is among the others, over a base that it has for itself."""
    base = tiny_llama() if name == "chat" else tiny_llama().model
    model = get_ptv2_model(base, CONFIGS[name], name)
    model.adapters[name].load_state_dict(model_of_all().adapters[name].state_dict())
    return model.eval()


def trainer_of(model: PTuningV2Model, name: str, folder, callbacks=(), **arguments) -> Trainer:
    """Of a table with a column that no model takes."""
    codec = codec_of(name)
    rows = [codec.encode(toy_examples(codec.task_type, count, seed=seed)) for count, seed in ((32, 0), (16, 1))]
    kept = [
        [{key: row[key] for key in row if key not in ("word_ids", "offset_mapping")} for row in one] for one in rows
    ]
    train, dev = (datasets.Dataset.from_list([{**row, "remark": "none"} for row in one]) for one in kept)
    settings = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        **arguments,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **settings),
        train_dataset=train,
        eval_dataset=dev,
        data_collator=codec.collator,
        callbacks=list(callbacks),
    )


def state_of(model: PTuningV2Model, name: str) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.adapters[name].state_dict().items()}


def assert_same_state(left, right) -> None:
    assert left.keys() == right.keys()
    for key in left:
        assert_same_bits(left[key], right[key], key)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_each_trains_in_turn_as_on_a_base_of_its_own(bf16, tmp_path):
    """Names of labels, columns, losses, evaluation and predictions; the other adapters stay what they are."""
    model = model_of_all()
    options = {"bf16": True, "use_cpu": True} if bf16 else {}
    for name in NAMES:
        before = {other: state_of(model, other) for other in NAMES if other != name}
        model.set_adapter(name)
        found = []
        for one in (model, alone(name)):
            trainer = trainer_of(one, name, tmp_path, **options)
            assert trainer.label_names == LABELS.get(name, ["labels"])
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            predicted = trainer.predict(trainer.eval_dataset)
            found.append((losses, trainer.evaluate()["eval_loss"], predicted))
        ours, theirs = found
        assert ours[:2] == theirs[:2] and len(ours[0]) == 8 and ours[0][-1] < ours[0][0]
        for part in ("predictions", "label_ids"):
            pairs = [getattr(one[2], part) for one in found]
            pairs = pairs if isinstance(pairs[0], tuple) else [(one,) for one in pairs]
            for left, right in zip(*pairs, strict=True):
                assert_same_bits(torch.as_tensor(left), torch.as_tensor(right), part)
        for other, state in before.items():
            assert_same_state(state, state_of(model, other))


class Stop(TrainerCallback):
    """Ends a run as a kill would, right after the checkpoint of a step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_one_is_resumed_exactly_and_the_others_are_untouched(name, tmp_path):
    """The resumed model is drawn anew: all that it says comes from the checkpoint."""
    whole, stopped, resumed = model_of_all(), model_of_all(), model_of_all()
    first = {other: state_of(whole, other) for other in NAMES}
    with torch.no_grad():
        for parameter in resumed.adapters.parameters():
            parameter.normal_()
    for model in (whole, stopped, resumed):
        model.set_adapter(name)
    trainer_of(whole, name, tmp_path / "whole").train()
    trainer_of(stopped, name, tmp_path / "part", callbacks=[Stop()]).train()
    folder = get_last_checkpoint(str(tmp_path / "part"))
    trainer_of(resumed, name, tmp_path / "part").train(resume_from_checkpoint=folder)
    for other in NAMES:
        assert_same_state(state_of(whole, other), state_of(resumed, other))
        if other != name:
            assert_same_state(first[other], state_of(resumed, other))
    loaded = PTuningV2Model.from_pretrained(tiny_llama(), folder, adapter_name=name)
    assert loaded.task_type == CONFIGS[name].task_type and set(loaded.adapters) == set(NAMES)
    assert_same_state(state_of(stopped, name), state_of(loaded, name))
    assert {key.split(".")[1] for key in load_file(f"{folder}/model.safetensors") if "." in key} == set(NAMES)


def test_the_best_checkpoint_of_one_leaves_the_others(tmp_path):
    model = model_of_all()
    model.set_adapter("spam")
    first = {other: state_of(model, other) for other in NAMES}
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    trainer = trainer_of(model, "spam", tmp_path, **options)
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    for name in NAMES:
        saved = {key.removeprefix(f"adapters.{name}."): tensor for key, tensor in best.items() if f".{name}." in key}
        assert_same_state(saved, state_of(model, name))
        if name != "spam":
            assert_same_state(first[name], state_of(model, name))


def test_pipelines_follow_the_active_adapter(caplog, recwarn):
    """The right labels and texts, in either order, and nothing is logged that says otherwise."""
    model, tokenizer = model_of_all(), tiny_tokenizer(causal=True)
    greedy = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    asked = {
        "chat": ("text-generation", ("anna likes",), greedy),
        "ner": ("token-classification", ("anna saw paris",), {}),
        "spam": ("text-classification", (["good film", "the bad film"],), {}),
        "qa": ("question-answering", (), {"question": "who is ?", "context": "anna met bob in rome"}),
    }
    known = PIPELINE_REGISTRY.get_supported_tasks()
    made: dict[str, object] = {}
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate, kept = True, logging.getLogger("transformers").propagate
        for name in ("chat", "ner", "spam", "qa", "spam", "chat", "ner"):
            kind, args, options = asked[name]
            if kind not in known:
                continue
            found = []
            model.set_adapter(name)
            for one in (model, alone(name)):
                extra = {"ignore_labels": []} if name == "ner" else {}
                found.append(pipeline(kind, model=one, tokenizer=tokenizer, **extra)(*args, **options))
            assert found[0] == found[1] == made.setdefault(name, found[0])
        logging.getLogger("transformers").propagate = kept
    assert {tagged["entity"] for tagged in made["ner"]} <= set(CONFIGS["ner"].heads["own"].labels)
    assert {one["label"] for one in made["spam"]} <= set(CONFIGS["spam"].heads["own"].labels)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("transformers")]
    assert [str(one.message) for one in recwarn] == []
    if hasattr(pipelines, "SUPPORTED_PEFT_TASKS"):  # a transformers without it logs of every wrapped model
        assert said == []
