"""The README's examples, run as they stand, on tiny models under the names that they use."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from tiny_folders import WORDS, tiny_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertForMaskedLM
from typer.testing import CliRunner

from benchmarks import quality
from ptv2_fast.cli import app
from ptv2_fast.families.registry import OWN

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SENTENCE = "anna\tB-PER\nlikes\tO\nparis\tB-LOC\n\nthe\tO\nriver\tO\n\n"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A working folder in which the hub's names are folders of tiny models."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **sizes)
    BertForMaskedLM(config).save_pretrained("bert-base-cased")
    tiny_tokenizer().save_pretrained("bert-base-cased")
    return tmp_path


@pytest.fixture
def names():
    """What the examples take for granted."""
    row = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [0, 8, -100]}
    ids = torch.randint(5, len(WORDS), (3, 6))
    return {
        "train": [row] * 8,
        "dev": [row] * 2,
        "tokenizer": tiny_tokenizer(causal=True),
        "AutoModel": AutoModel,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "some_training_text": ["the film was good .", "the film was bad ."],
        "batch": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "texts": ["the film", "anna likes paris"],
        "name": "tiny-lm",
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_python_examples_run(hub, names, capsys):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.LlamaConfig(vocab_size=len(WORDS), bos_token_id=None, eos_token_id=4, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained("tiny-lm")
    first, second, frozen, options, runner = _blocks("python")[:5]
    assert len([line for line in first.splitlines() if line]) <= 15
    exec(first, names)
    assert names["logits"].shape == (1, 4, 9)
    assert "trainable: " in capsys.readouterr().out
    kept = {path.name for path in (hub / "ner-prompt").iterdir()}
    assert kept == {"ptv2_model.safetensors", "ptv2_config.json"}
    exec(second, names)
    assert set(names["model"].adapters) == {"sst2", "ner"}
    exec(frozen, {**names, "requests": [names["texts"]] * 2})
    assert not names["lm"]._kept.is_open
    exec(options, names)
    assert names["model"].step_options.unpad
    names["model"].set_adapter("ner")
    labelled = {**names["batch"], "labels": torch.randint(0, 9, (3, 6))}
    exec(runner, {**names, "torch": torch, "batches": [labelled] * 2})


def test_the_commands_run(hub):
    (block,) = [block for block in _blocks("bash") if "ptv2-fast train" in block]
    for name in ("train.conll", "dev.conll", "test.conll"):
        (hub / name).write_text(SENTENCE * 4)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert [command[1] for command in commands] == ["train", "search", "eval", "predict", "export", "info"]
    for program, *arguments in commands:
        if arguments[0] == "search":
            arguments += ["--trials", "1", "--epochs", "1"]
        result = CliRunner().invoke(app, arguments)
        assert (program, result.exit_code) == ("ptv2-fast", 0), result.output


def test_the_tree_is_the_one_that_is_there():
    root = Path(__file__).parents[2]
    (tree,) = _blocks("text")
    folder = root
    for line in tree.splitlines():
        inside, entries = line.startswith("  "), line.strip()
        if not inside:
            folder = root / entries.split()[0]
            assert folder.is_dir(), line
            continue
        for entry in re.findall(r"[\w./]+(?:/|\.py)(?=\s)", re.split(r"\s{2,}|;", entries)[0] + " "):
            assert (folder / entry).exists(), line


def test_it_counts_the_model_types():
    (count,) = re.findall(r"(\w+) model types", README)
    assert count == str(len(OWN))


def test_the_quality_table_is_what_the_results_give():
    results = json.loads((ROOT / "benchmarks" / "results" / "quality_minilm_cpu.json").read_text(encoding="utf-8"))
    shown = README.split("<!-- quality -->\n")[1].split("\n<!-- /quality -->")[0]
    assert shown == quality.table(results)
