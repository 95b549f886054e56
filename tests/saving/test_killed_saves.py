"""Savers that are killed at random moments: what loads is one whole save, and the next save cleans up."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptv2_fast import HeadConfig, PTuningV2Model, from_peft
from ptv2_fast.saving.checkpoint import CONFIG_NAME, WEIGHTS_NAME, read_description
from tiny_models import tiny_base, tiny_model, tiny_prompts

FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
pytestmark = [
    pytest.mark.skipif(FORK is None, reason="kills are of forked processes"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
KILLS = 12


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    """Nobody pulls the plug here, and waiting for the disk is most of a save."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def _after_kills(folder: Path, saves, check) -> None:
    """Kill a process that saves without end, again and again, and check what is there each time."""
    moments = random.Random(0)
    saves[0]()
    for _ in range(KILLS):
        started = FORK.Event()

        def run(started=started):
            for save in itertools.cycle(saves):
                save()
                started.set()

        process = FORK.Process(target=run)
        process.start()
        assert started.wait(60)
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.join()
        check()
    for save in saves:
        save()
    check()
    left = [path.name for path in folder.rglob("*") if path.is_symlink() or path.name.startswith(".")]
    assert not left


def _versions(*heads: int) -> list[PTuningV2Model]:
    """Models that differ in every part: labels, length of the prompt, weights."""
    models = []
    for value in heads:
        labels = [f"{value}-{i}" for i in range(value)]
        model = tiny_model(
            "bert", "deep", "SEQ_CLS", length=value, heads={"topic": HeadConfig("SEQ_CLS", value, labels=labels)}
        )
        models.append(_filled(model, value))
    return models


def _filled(model, value):
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.fill_(value)
    return model


def _value(model, name="default") -> int:
    """The one number that every part of an adapter agrees on."""
    adapter = model.adapters[name]
    found = {float(x) for p in adapter.parameters() for x in p.unique()}
    head = adapter.heads["topic"].config
    (value,) = found | {float(adapter.config.num_virtual_tokens), float(head.num_labels)}
    assert head.labels == tuple(f"{int(value)}-{i}" for i in range(int(value)))
    return int(value)


def test_one_adapter_and_the_description_beside_it(tmp_path):
    models = _versions(2, 3)

    def check():
        value = _value(PTuningV2Model.from_pretrained(tiny_base("bert", "SEQ_CLS"), tmp_path))
        beside = json.loads((tmp_path / CONFIG_NAME).read_text())
        assert beside == read_description(tmp_path) and beside["config"]["num_virtual_tokens"] == value

    _after_kills(tmp_path, [lambda model=model: model.save_pretrained(tmp_path) for model in models], check)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}


def test_several_adapters_one_of_which_is_deleted(tmp_path):
    models = []
    for model, more in zip(_versions(2, 3, 4), (("a", "b"), ("b",), ()), strict=True):
        for name in more:
            model.add_adapter(name, model.ptv2_config["default"])
        models.append(_filled(model, model.ptv2_config["default"].num_virtual_tokens))
    members = {2: {"default", "a", "b"}, 3: {"default", "b"}, 4: {"default"}}

    def check():
        loaded = PTuningV2Model.from_pretrained(tiny_base("bert", "SEQ_CLS"), tmp_path)
        (value,) = {_value(loaded, name) for name in loaded.adapters}
        assert set(loaded.adapters) == members[value]

    _after_kills(tmp_path, [lambda model=model: model.save_pretrained(tmp_path) for model in models], check)


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_the_format_of_peft(tmp_path, several):
    models = []
    for injection, value in (("prefix", 2), ("shallow", 3), ("prefix", 4)):
        model = tiny_model("llama", injection, "CAUSAL_LM", length=value)
        if several:
            model.add_adapter("other", tiny_prompts(injection, "CAUSAL_LM", length=value))
        models.append(_filled(model, value))
    kinds = {2: "PREFIX_TUNING", 3: "PROMPT_TUNING", 4: "PREFIX_TUNING"}

    def check():
        found = set()
        for folder in [tmp_path / "default", tmp_path / "other"] if several else [tmp_path]:
            # As PEFT reads it: two files by their names.
            config = json.loads((folder / "adapter_config.json").read_text())
            prompts = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
            values = prompts[:, prompts.shape[1] // 2 :].unique() if config["num_virtual_tokens"] == 3 else None
            assert prompts.shape[0] == config["num_virtual_tokens"]
            assert values is None or values.tolist() == [3.0]
            assert kinds[prompts.shape[0]] == config["peft_type"]
            loaded = from_peft(tiny_base("llama", "CAUSAL_LM"), folder)
            found.add(loaded.ptv2_config["default"].num_virtual_tokens)
        assert len(found) == 1

    saves = [lambda model=model: model.save_pretrained(tmp_path, format="peft") for model in models]
    _after_kills(tmp_path, saves, check)
