"""Damaged models and numbers out of range on the command line: one line that names what it is, and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ptv2_fast.cli import app
from tiny_folders import bert_folder, toy_file


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("bases")
    bert_folder(place / "bert")
    toy_file(place, "SEQ_CLS", 8)
    return place


def _config(**changes):
    def change(folder: Path):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _file(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def _without_tokenizer(folder: Path):
    for path in folder.glob("tokenizer*"):
        path.unlink()


DAMAGES = {
    "no-json": _file("config.json", b"{"),
    "nested": _file("config.json", b"[" * 100_000),
    "empty-weights": _file("model.safetensors", b""),
    "cut-weights": _file("model.safetensors", b"\x10" * 100),
    "other-sizes": _config(hidden_size=64),
    "no-heads": _config(num_attention_heads=0),
    "heads-of-text": _config(num_attention_heads="x"),
    "type-of-list": _config(model_type=[]),
    "no-dtype": _config(dtype="float99"),
    "tokenizer": _file("tokenizer.json", b"{"),
    "no-tokenizer": _without_tokenizer,
}


def _run(place: Path, tmp_path: Path, *more: str, model: Path | None = None):
    result = CliRunner().invoke(
        app,
        [
            "train",
            "--model",
            str(model or place / "bert"),
            "--task",
            "SEQ_CLS",
            "--data",
            str(place / "train.tsv"),
            "--epochs",
            "1",
            "--num-virtual-tokens",
            "2",
            "--output",
            str(tmp_path / "run"),
            *more,
        ],
    )
    assert not (tmp_path / "run").exists()
    assert result.exit_code == 2, result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith("ptv2-fast: ")]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_model_is_named_in_one_line(place, tmp_path, damage):
    shutil.copytree(place / "bert", tmp_path / "model")
    damage(tmp_path / "model")
    (line,) = _run(place, tmp_path, model=tmp_path / "model")
    assert line.startswith(f"ptv2-fast: model '{tmp_path / 'model'}' ")
    assert "could not be loaded: " in line or "must come with its tokenizer's files" in line


@pytest.mark.parametrize(
    ("flag", "value", "name"),
    [
        ("--max-length", "1" + "0" * 20, "max_length"),
        ("--batch-size", "1" + "0" * 30, "batch_size"),
        ("--gradient-accumulation", "1" + "0" * 30, "gradient_accumulation"),
        ("--early-stopping", "1" + "0" * 30, "early_stopping"),
    ],
)
def test_numbers_that_nothing_counts_up_to(place, tmp_path, flag, value, name):
    (line,) = _run(place, tmp_path, flag, value)
    assert line.startswith(f"ptv2-fast: {name} must be ") and "2**31; got " in line
