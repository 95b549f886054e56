"""Help, `info` of an adapter, and every slip answer before torch is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModel

from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model
from tiny_folders import bert_folder, toy_file

# Runs each command line of a JSON list in one process; says of each how it ended, and whether torch was there then.
_RUNNER = """
import json, sys
from typer.testing import CliRunner
from ptv2_fast.cli import app
for line in json.loads(sys.stdin.read()):
    result = CliRunner().invoke(app, line)
    print(json.dumps([result.exit_code, result.output, "torch" in sys.modules or "transformers" in sys.modules]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base, an adapter of it, data, and a folder that is taken."""
    place = tmp_path_factory.mktemp("place")
    base = AutoModel.from_pretrained(bert_folder(place / "base"))
    heads = {"task": HeadConfig("SEQ_CLS", 2, labels=["negative", "positive"])}
    get_ptv2_model(base, PTuningV2Config("SEQ_CLS", num_virtual_tokens=3, heads=heads)).save_pretrained(place / "one")
    toy_file(place, "SEQ_CLS", 8)
    (place / "odd.tsv").write_text("sentence\tlabel\ngood\tpositive\nbad\tmixed\n")
    (place / "letter.docx").write_bytes(b"PK")
    (place / "taken").mkdir()
    (place / "taken" / "letter.txt").write_text("dear")
    return place


def lines_in(place: Path) -> list[tuple[int, str, list[object]]]:
    """(exit code, what is said, the command line)."""
    data, one, odd = place / "train.tsv", place / "one", place / "odd.tsv"
    train = ["train", "--model", place / "base", "--task", "SEQ_CLS", "--output", place / "new"]
    searched = ["search", "--model", place / "base", "--task", "SEQ_CLS", "--output", place / "new"]
    return [
        (0, "ptv2-fast 0", ["--version"]),
        *(
            (0, "--help", [command, "--help"])
            for command in ("data", "train", "search", "eval", "predict", "report", "export", "info")
        ),
        (0, '"num_virtual_tokens": 3', ["info", one, "--json"]),
        (0, '"stored_parameters": 19', ["info", place / "base", "--json"]),
        (2, "must be a model folder", ["info", place / "nowhere" / "adapter"]),
        (2, "No such option: --sped", [*train, "--data", data, "--sped", "3"]),
        (2, "is not one of", [*train, "--data", data, "--injection", "sideways"]),
        (2, "gone.tsv", [*train, "--data", place / "gone.tsv"]),
        (2, "docx", [*train, "--data", place / "letter.docx"]),
        (2, "mood", [*train, "--data", data, "--label-column", "mood"]),
        (2, "learning_rate", [*train, "--data", data, "--lr", "0"]),
        (2, "num_virtual_tokens", [*train, "--data", data, "--num-virtual-tokens", "0"]),
        (2, "--layers", [*train, "--data", data, "--layers", "first"]),
        (2, "layers must lie in [-2, 1]", [*train, "--data", data, "--layers", "0,9"]),
        (2, "causal language model", [*train, "--data", data, "--task", "CAUSAL_LM", "--text-column", "sentence"]),
        (2, "looks like a header", [*train, "--data", data, "--task", "TOKEN_CLS"]),
        (2, "train.tsv is a file", [*train, "--data", data, "--output", data / "new"]),
        (2, "cuda:<number>", [*train, "--data", data, "--device", "gpu"]),
        (2, "recipe", [*train, "--data", data, "--recipe", "rte-gpt5"]),
        (2, "'mixed'", [*train, "--data", data, "--dev", odd]),
        (2, "not empty", [*train, "--data", data, "--output", place / "taken"]),
        (2, "no run to resume", [*train, "--data", data, "--resume"]),
        (2, "nowhere", [*train, "--data", data, "--model", place / "nowhere"]),
        (2, "two numbers", [*searched, "--data", data, "--dev", data, "--lr", "1e-3"]),
        (2, "('deep', 'sideways')", [*searched, "--data", data, "--dev", data, "--injection", "deep, sideways"]),
        (2, "train.tsv is a file", [*searched, "--data", data, "--dev", data, "--output", data / "new"]),
        (2, "'mixed'", [*searched, "--data", data, "--dev", odd]),
        (2, "'mixed'", ["eval", one, "--data", odd]),
        (2, "adapter must be", ["eval", one, "--data", data, "--adapter", "two"]),
        (2, "does not exist", ["predict", place / "nowhere", "good"]),
        (2, "gone.tsv", ["predict", one, "--file", place / "gone.tsv"]),
        (2, "mood", ["predict", one, "--file", data, "--text-column", "mood"]),
        (2, "--max-new-tokens", ["predict", one, "good", "--max-new-tokens", "3"]),
        (2, "head must be one of", ["predict", one, "good", "--head", "star"]),
        (2, "--output", ["export", one, "--output", place / "nowhere" / "x.safetensors"]),
    ]


def test_what_needs_no_model_does_not_wait_for_torch(place):
    before = sorted(place.rglob("*"))
    expected = lines_in(place)
    typed = json.dumps([[str(word) for word in line] for *_, line in expected])
    result = subprocess.run([sys.executable, "-c", _RUNNER], input=typed, capture_output=True, text=True, check=True)
    ended = [json.loads(line) for line in result.stdout.splitlines()]
    for (code, part, line), (found, said, waited) in zip(expected, ended, strict=True):
        where = f"{' '.join(map(str, line))}: {said}"
        assert found == code and part in said, where
        assert not waited, where
    assert sorted(place.rglob("*")) == before, "nothing is written"
