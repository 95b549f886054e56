"""Prompts as plain tensors: they are what attention reads."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from batches import padded, text_rows
from ptv2_fast.cli import app
from ptv2_fast.prompts.placement import text_offset
from ptv2_fast.saving.export import export_prompts, prompt_tensors
from tiny_folders import bert_folder, toy_file
from tiny_models import tiny_model
from tolerances import assert_equal, assert_same_bits


@pytest.mark.parametrize(
    ("family", "injection", "config"),
    [
        ("bert", "deep", {}),
        ("llama", "deep", {"layers": [1]}),
        ("llama", "shallow", {}),
        ("gpt2", "prefix", {"reparameterization": 8}),
        ("qwen3", "deep", {"prompt_init": "gated"}),
    ],
)
def test_exported_keys_and_values_run_as_a_prefix_with_the_same_outputs(family, injection, config):
    model = tiny_model(family, injection, **config)
    inputs = padded(text_rows(), "left").inputs
    expected = model(**inputs).last_hidden_state
    tensors = prompt_tensors(model, "kv")
    if "gated" in config.values():
        assert tensors["layers.0.bias"].shape == (4, 5)
        return
    other = tiny_model(family, "prefix", layers=config.get("layers"), position_offset=model_offset(model))
    layers = other.adapters["default"].encoder.layers
    stacked = torch.stack([torch.stack([tensors[f"layers.{i}.key"], tensors[f"layers.{i}.value"]]) for i in layers])
    assert set(tensors) == {f"layers.{i}.{part}" for i in layers for part in ("key", "value")}
    with torch.no_grad():
        next(other.adapters["default"].encoder.parameters()).copy_(stacked)
    assert_equal(other(**inputs).last_hidden_state, expected, family)


def model_offset(model) -> int:
    return text_offset(model.adapters["default"].config, model._family)


def test_exported_embeddings_in_front_of_the_text_give_the_same_outputs():
    model = tiny_model("llama", "shallow")
    embeddings = prompt_tensors(model, "embeddings")["prompt_embeddings"]
    ids = torch.randint(3, 30, (2, 6))
    with model.disable_adapter():
        words = model.backbone.get_input_embeddings()(ids)
        whole = model.backbone(inputs_embeds=torch.cat([embeddings.expand(2, -1, -1), words], 1)).last_hidden_state
    assert_equal(model(input_ids=ids).last_hidden_state, whole[:, 5:], "states")


def test_the_file_says_what_it_holds(tmp_path):
    model = tiny_model("bert", "deep")
    export_prompts(model, tmp_path / "below" / "prompt.safetensors")
    with safe_open(tmp_path / "below" / "prompt.safetensors", "pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == {f"layers.{i}.{part}" for i in range(2) for part in ("key", "value")}
    assert metadata["content"] == "kv"
    assert json.loads(metadata["ptv2"])["base"]["model_type"] == "bert"
    assert [path.name for path in (tmp_path / "below").iterdir()] == ["prompt.safetensors"]


def test_what_cannot_be_exported_is_refused(tmp_path):
    cases = [
        (tiny_model("llama", "deep"), "embeddings", "needs injection 'shallow'"),
        (tiny_model("bert", "shallow"), "kv", "shallow on a bidirectional model"),
        (tiny_model("bert", "deep"), "onnx", "format must be one of kv, embeddings"),
    ]
    for model, what, message in cases:
        with pytest.raises(ValueError, match=message):
            export_prompts(model, tmp_path / "x.safetensors", what)
    with pytest.raises(ValueError, match="is a folder"):
        export_prompts(tiny_model("bert", "deep"), tmp_path)
    with pytest.raises(ValueError, match="nobody"):
        export_prompts(tiny_model("bert", "deep"), tmp_path / "x.safetensors", adapter_name="nobody")
    assert list(tmp_path.iterdir()) == []


def test_only_an_earlier_export_is_replaced(tmp_path):
    model = tiny_model("bert", "deep")
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "empty").write_text("")
    save_file({"a": torch.ones(1)}, tmp_path / "base.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "config.json")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    taken = ["config.json", "empty", "base.safetensors", "link", "adapter/ptv2_model.safetensors"]
    before = {name: (tmp_path / name).read_bytes() for name in taken}
    for name in [*taken, *(["pipe"] if hasattr(os, "mkfifo") else [])]:
        with pytest.raises(ValueError, match=f"{name} is something else and is not overwritten"):
            export_prompts(model, tmp_path / name)
    for name in ("config.json/below", "config.json/below/more"):
        with pytest.raises(ValueError, match="config.json is a file"):
            export_prompts(model, tmp_path / name)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    path = tmp_path / "prompt.safetensors"
    export_prompts(model, path)
    first = path.read_bytes()
    with torch.no_grad():
        model.adapters["default"].encoder.prompts.mul_(2)
    export_prompts(model, path)
    assert path.read_bytes() != first


@pytest.mark.parametrize(("injection", "what"), [("deep", "kv"), ("shallow", "embeddings")])
def test_exporting_leaves_the_model_in_the_mode_it_was_in(injection, what):
    model = tiny_model("bert", injection).train()
    model.base_model.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    prompt_tensors(model, what)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.training and not model.backbone.training


@pytest.mark.parametrize("injection", ["deep", "shallow", "prefix"])
def test_what_is_written_does_not_depend_on_autocast(injection, tmp_path):
    model = tiny_model("llama", injection, **({"reparameterization": 8} if injection == "prefix" else {})).train()
    for place in ("plain", "cast"):
        with torch.autocast("cpu", torch.bfloat16, enabled=place == "cast"):
            export_prompts(model, tmp_path / f"{place}.safetensors")
            model.save_pretrained(tmp_path / place, format="peft")
    for name in (".safetensors", "/adapter_model.safetensors"):
        plain, cast = (load_file(f"{tmp_path}/{place}{name}") for place in ("plain", "cast"))
        for key, tensor in plain.items():
            assert_same_bits(cast[key], tensor)


def test_the_command_exports_a_trained_folder(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    model = bert_folder(tmp_path / "bert")
    data = toy_file(tmp_path, "SEQ_CLS", 8)
    small = ("--epochs", 1, "--num-virtual-tokens", 3)
    assert (
        run(
            "train",
            "--model",
            model,
            "--task",
            "SEQ_CLS",
            "--data",
            data,
            "--output",
            tmp_path / "a",
            *small,
        ).exit_code
        == 0
    )
    result = run("export", tmp_path / "a", "--output", tmp_path / "kv.safetensors")
    assert result.exit_code == 0, result.output
    with safe_open(tmp_path / "kv.safetensors", "pt") as file:
        assert file.get_slice("layers.0.key").get_shape() == [4, 3, 8]
    refused = run("export", tmp_path / "a", "--output", tmp_path / "e.safetensors", "--content", "embeddings")
    assert refused.exit_code == 2 and "shallow" in refused.stderr
    assert not (tmp_path / "e.safetensors").exists()
    whole = (model / "config.json").read_bytes()
    refused = run("export", tmp_path / "a", "--output", model / "config.json")
    assert refused.exit_code == 2 and "not overwritten" in refused.stderr and refused.stderr.count("\n") == 1
    assert (model / "config.json").read_bytes() == whole
