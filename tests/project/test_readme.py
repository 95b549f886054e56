"""The README's examples. The first runs as it stands; the others on tiny models under the names of the hub's, with what
they take for granted: the reader's own data and tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from transformers import BertConfig, BertForMaskedLM
from typer.testing import CliRunner

import ptv2_fast
from benchmarks.quality.run import table
from ptv2_fast.cli import app
from ptv2_fast.config import PTuningV2Config
from ptv2_fast.families.registry import families
from tiny_folders import WORDS, tiny_tokenizer
from tolerances import assert_equal

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
    """What the examples take for granted, as README says."""
    row = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [0, 8, -100]}
    ids = torch.randint(5, len(WORDS), (3, 6))
    return {
        "train": [row] * 8,
        "dev": [row] * 2,
        "tokenizer": tiny_tokenizer(causal=True),
        "some_training_text": ["the film was good .", "the film was bad ."],
        "batch": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "texts": ["the film", "anna likes paris"],
        "name": "tiny-lm",
    }


def test_the_first_example_prints_what_is_shown(capsys):
    """Losses to rounding, which grows over the steps and is another one on another processor."""
    exec(_blocks("python")[0], {})
    printed, shown = capsys.readouterr().out.splitlines(), _blocks("text")[0].splitlines()
    assert printed[0] == shown[0] and len(printed) == len(shown) == 6
    numbers = [[float(number) for number in re.findall(r"[\d.]+", line)] for line in (*printed[1:], *shown[1:])]
    for (step, loss, right), (shown_step, shown_loss, shown_right) in zip(numbers[:5], numbers[5:], strict=True):
        assert step == shown_step and abs(loss - shown_loss) < 0.1 and abs(right - shown_right) <= 10


def test_whoever_reads_the_first_page_learns_what_there_is():
    """Fields of the configuration, exported names (classes of tasks by one of them), model types."""
    names = {name for name in ptv2_fast.__all__ if not name.startswith("PTuningV2ModelFor")}
    names |= {field.name for field in dataclasses.fields(PTuningV2Config)}
    assert [name for name in sorted(names) if f"`{name}`" not in README] == []
    assert f"\n{len(families())} model types, listed in [docs/families.md]" in README


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_python_examples_run(hub, names, capsys):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.LlamaConfig(vocab_size=len(WORDS), bos_token_id=None, eos_token_id=4, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained("tiny-lm")
    tiny_tokenizer(causal=True).save_pretrained("tiny-lm")
    first, second, frozen, batching, options, runner, many = _blocks("python")[1:8]
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
    exec(batching, names)
    assert len(eval(capsys.readouterr().out.splitlines()[-1])) <= 30
    exec(options, names)
    assert names["model"].step_options.unpad
    names["model"].set_adapter("ner")
    labelled = {**names["batch"], "labels": torch.randint(0, 9, (3, 6))}
    exec(runner, {**names, "batches": [labelled] * 2})
    _check_many_tasks(many, names)


def _check_many_tasks(block: str, names: dict) -> None:
    """The block on several tasks in one model, and the commands below it on what it saved."""
    exec(block, names)
    assert type(names["model"]).__name__ == "PTuningV2ModelForTokenClassification"
    assert [tuple(row.shape) for row in names["rows"]] == [(6, len(WORDS)), (6, 9), (2,)]
    written = names["written"]
    assert written.rows.tolist() == [0] and written.sequences.shape[0] == 1 and written.logits[0] is None
    assert_equal(written.logits[1], names["rows"][1], "tags of the pass that read the prompts")
    (commands,) = [block for block in _blocks("bash") if "predict assistant" in block]
    all_of_them, one = [shlex.split(line, comments=True)[1:] for line in commands.splitlines()]
    record = json.loads(CliRunner().invoke(app, all_of_them).stdout)
    assert list(record) == ["text", "chat", "ner", "spam"] and record["text"] == "Ada moved to Paris"
    alone = CliRunner().invoke(app, one).stdout
    assert alone == CliRunner().invoke(app, ["predict", "assistant/ner", "Ada moved to Paris"]).stdout
    assert [line.split("\t")[0] for line in alone.split("\n") if line] == ["Ada", "moved", "to", "Paris"]


def test_the_commands_run(hub):
    (block,) = [block for block in _blocks("bash") if "ptv2-fast train" in block]
    for name in ("train.conll", "dev.conll", "test.conll"):
        (hub / name).write_text(SENTENCE * 4)
    commands = [shlex.split(line) for line in block.splitlines()]
    order = ["data", "train", "search", "eval", "predict", "report", "export", "info"]
    assert [command[1] for command in commands] == order
    for program, *arguments in commands:
        if arguments[0] == "search":
            arguments += ["--trials", "1", "--epochs", "1"]
        result = CliRunner().invoke(app, arguments)
        assert (program, result.exit_code) == ("ptv2-fast", 0), result.output


def test_the_tree_is_the_one_that_is_there():
    root = Path(__file__).parents[2]
    tree = _blocks("text")[-1]
    rooms = {path.parent.name for path in (root / "ptv2_fast").glob("*/*.py")} - {"kernels"}
    assert [room for room in sorted(rooms) if f" {room}/" not in tree] == []
    folder = root
    for line in tree.splitlines():
        inside, entries = line.startswith("  "), line.strip()
        if not inside:
            folder = root / entries.split()[0]
            assert folder.is_dir(), line
            continue
        for entry in re.findall(r"[\w./]+(?:/|\.py)(?=\s)", re.split(r"\s{2,}|;", entries)[0] + " "):
            assert (folder / entry).exists(), line


def test_the_quality_table_is_what_the_results_give():
    results = json.loads((ROOT / "benchmarks" / "results" / "quality_minilm_cpu.json").read_text(encoding="utf-8"))
    shown = README.split("<!-- quality -->\n")[1].split("\n<!-- /quality -->")[0]
    assert shown == table(results)
