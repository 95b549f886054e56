"""The command line on tiny local models: every command, and every bad input as one line and exit code 2."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from ptv2_fast import HeadConfig, PTuningV2Config, PTuningV2Model, get_ptv2_model
from ptv2_fast.cli import _request, app
from ptv2_fast.training.recipes import RECIPES
from tiny_folders import bert_folder, llama_folder, toy_examples, toy_file

TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM")
METRIC = {"SEQ_CLS": "accuracy", "TOKEN_CLS": "f1", "QUESTION_ANS": "f1", "CAUSAL_LM": "perplexity"}


def run(*arguments: object, stdin: str | None = None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def train(model: Path, task: str, data: Path, output: Path, *more: object):
    settings = ["--epochs", 2, "--batch-size", 8, "--lr", "3e-2", "--num-virtual-tokens", 4]
    settings += ["--doc-stride", 8] if task == "QUESTION_ANS" else []
    return run("train", "--model", model, "--task", task, "--data", data, "--output", output, *settings, *more)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def trained(encoder, writer, tmp_path_factory) -> dict[str, Path]:
    """An adapter folder of every task, trained by the command itself."""
    folders = {}
    for task in TASKS:
        place = tmp_path_factory.mktemp(task)
        data, dev = toy_file(place, task, 96 if task == "TOKEN_CLS" else 48), toy_file(place, task, 16, "dev", seed=1)
        folders[task] = place / "out"
        model = writer if task == "CAUSAL_LM" else encoder
        result = train(model, task, data, folders[task], "--dev", dev, "--epochs", 8)
        assert result.exit_code == 0, result.output
    return folders


def refused(result, *parts: str) -> None:
    """One line on standard error that holds all the parts, nothing on standard output, exit code 2."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("ptv2-fast: "), result.stderr
    for part in parts:
        assert part in lines[0], lines[0]
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize("task", TASKS)
def test_training_leaves_a_whole_folder(trained, task):
    folder = trained[task]
    names = {path.name for path in folder.iterdir()}
    files = {"ptv2_model.safetensors", "ptv2_config.json", "settings.json", "metrics.json", "curves.png"}
    assert names == files | {"checkpoints"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["metric"] == METRIC[task]
    assert math.isfinite(metrics["dev"][METRIC[task]])
    losses = [record["loss"] for record in metrics["history"] if "loss" in record]
    assert losses[-1] < losses[0]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "settings.json").read_text())["num_virtual_tokens"] == 4


@pytest.mark.parametrize("task", TASKS)
def test_eval_gives_the_scores_of_training(trained, task):
    folder = trained[task]
    result = run("eval", folder, "--data", next(folder.parent.glob("dev.*")), "--batch-size", 8)
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    kept = json.loads((folder / "metrics.json").read_text())["dev"]
    assert scores["examples"] == 16
    for name, value in kept.items():
        assert scores[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_predict_classes_in_every_way_of_asking(trained, tmp_path):
    folder, examples = trained["SEQ_CLS"], toy_examples("SEQ_CLS", 16, seed=1)
    texts = [example["text"] for example in examples]
    as_arguments = run("predict", folder, *texts, "--json")
    records = [json.loads(line) for line in as_arguments.stdout.splitlines()]
    assert [record["text"] for record in records] == texts
    right = sum(record["label"] == example["label"] for record, example in zip(records, examples, strict=True))
    assert right / 16 == json.loads((folder / "metrics.json").read_text())["dev"]["accuracy"] > 0.5
    assert all(0.5 <= record["score"] <= 1 for record in records)
    for record in records:
        assert record["scores"][record["label"]] == record["score"] == max(record["scores"].values())
    assert run("predict", folder, "--json", stdin="\n".join(texts) + "\n\n").stdout == as_arguments.stdout
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts) + "\n")
    assert run("predict", folder, "--file", file, "--json").stdout == as_arguments.stdout
    plain = run("predict", folder, texts[0]).stdout
    assert plain == f"{records[0]['label']}\t{records[0]['score']:.4f}\t{texts[0]}\n"


def test_predict_tags_words_and_signs(trained):
    folder = trained["TOKEN_CLS"]
    plain = run("predict", folder, "Anna saw Paris.")
    rows = [line.split("\t") for line in plain.stdout.strip().splitlines()]
    assert [row[0] for row in rows] == ["Anna", "saw", "Paris", "."]
    record = json.loads(run("predict", folder, "Anna saw Paris.", "--json").stdout)
    assert record["tags"] == [row[1] for row in rows]
    tagged = [token for token, tag in zip(record["tokens"], record["tags"], strict=True) if tag != "O"]
    assert [entity["text"] for entity in record["entities"]] == tagged != []
    for entity in record["entities"]:
        assert "Anna saw Paris."[entity["start"] : entity["end"]] == entity["text"]
        assert entity["label"] in ("PER", "LOC") and 0 < entity["score"] <= 1


def test_predict_answers(trained, tmp_path):
    folder = trained["QUESTION_ANS"]
    context = "the film saw anna very"
    asked = run("predict", folder, "who is ?", "--context", context, "--json")
    record = json.loads(asked.stdout)
    assert record["answer"] == context[record["start"] : record["end"]] != ""
    line = json.dumps({"question": "who is ?", "context": context})
    assert json.loads(run("predict", folder, "--json", stdin=line).stdout)["answer"] == record["answer"]
    refused(run("predict", folder, "who is ?"), "text, line 1", "context")


def test_predict_continues_a_text(trained):
    folder = trained["CAUSAL_LM"]
    record = json.loads(run("predict", folder, "anna likes", "--json", "--max-new-tokens", 6).stdout)
    assert record["prompt"] == "anna likes"
    assert record["text"].split()[:2] == ["the", "very"], record


def test_info_of_an_adapter_agrees_with_the_model(trained, encoder):
    facts = json.loads(run("info", trained["SEQ_CLS"], "--json").stdout)
    assert (facts["injection"], facts["num_virtual_tokens"], facts["task_type"]) == ("deep", 4, "SEQ_CLS")
    metrics = json.loads((trained["SEQ_CLS"] / "metrics.json").read_text())
    assert facts["trained_parameters"] == metrics["trained_parameters"]
    assert facts["prompt_parameters"] == 2 * 4 * 32
    assert facts["base"]["name_or_path"] == str(encoder)
    assert facts["format_version"] == 1
    plain = run("info", trained["SEQ_CLS"]).stdout
    assert "num_virtual_tokens" in plain and "deep" in plain


def test_info_of_a_model_says_what_a_prompt_costs(writer, encoder):
    facts = json.loads(run("info", writer, "--json").stdout)
    # Two layers of width 32; two heads of eight numbers each have keys and values.
    assert facts["parameters_per_virtual_token"] == {"deep": 64, "shallow": 32, "prefix": 64}
    assert facts["causal"] is True and facts["model_type"] == "llama"
    assert json.loads(run("info", encoder, "--json").stdout)["causal"] is False


def test_info_lists_every_adapter_of_a_folder(encoder, tmp_path):
    from transformers import AutoModel

    config = PTuningV2Config("SEQ_CLS", num_virtual_tokens=3, heads={"a": 2})
    model = get_ptv2_model(AutoModel.from_pretrained(encoder), config, "one")
    model.add_adapter("two", PTuningV2Config("SEQ_CLS", num_virtual_tokens=5, heads={"a": 2}))
    model.save_pretrained(tmp_path / "both")
    facts = [json.loads(line) for line in run("info", tmp_path / "both", "--json").stdout.splitlines()]
    assert {fact["name"]: fact["num_virtual_tokens"] for fact in facts} == {"one": 3, "two": 5}
    refused(run("export", tmp_path / "both", "--output", tmp_path / "x.safetensors"), "one", "two", "--adapter")
    assert run("predict", tmp_path / "both" / "one", "x").exit_code == 0


def test_an_adapter_saved_by_hand_predicts_with_one_of_its_heads(encoder, tmp_path):
    from transformers import AutoModel

    heads = {"mood": HeadConfig("SEQ_CLS", 2, labels=["no", "yes"]), "star": HeadConfig("SEQ_CLS", 3)}
    model = get_ptv2_model(AutoModel.from_pretrained(encoder), PTuningV2Config("SEQ_CLS", heads=heads))
    model.save_pretrained(tmp_path)
    refused(run("predict", tmp_path, "good"), "head must be one of mood, star")
    assert json.loads(run("predict", tmp_path, "good", "--head", "mood", "--json").stdout)["label"] in ("no", "yes")
    assert json.loads(run("predict", tmp_path, "good", "--head", "star", "--json").stdout)["label"] in "012"


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["--injection", "prefix", "--reparameterization", 8], id="prefix-mlp"),
        pytest.param(["--injection", "shallow", "--init", "normal"], id="shallow"),
        pytest.param(["--layers", "0", "--init", "gated", "--prompt-dropout", "0.1"], id="one-layer-gated"),
        pytest.param(["--schedule", "exponential", "--pooling", "mean", "--gradient-accumulation", 2], id="schedule"),
    ],
)
def test_the_flags_reach_the_adapter(encoder, tmp_path, more):
    data = toy_file(tmp_path, "SEQ_CLS", 16)
    result = train(encoder, "SEQ_CLS", data, tmp_path / "out", "--epochs", 1, *more)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "ptv2_config.json").read_text())["config"]
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    flags = dict(zip(map(str, more[::2]), more[1::2], strict=True))
    assert config["injection"] == flags.get("--injection", "deep")
    assert config["reparameterization"] == flags.get("--reparameterization")
    assert config["layers"] == ([0] if "--layers" in flags else None)
    assert config["prompt_dropout"] == float(flags.get("--prompt-dropout", 0))
    assert config["heads"]["task"]["pooling"] == flags.get("--pooling", "mean")
    assert settings["fit"]["schedule"] == flags.get("--schedule", "linear")
    assert settings["fit"]["gradient_accumulation"] == flags.get("--gradient-accumulation", 1)


def test_resume_finishes_a_run_with_the_same_bits(encoder, tmp_path):
    data, dev = toy_file(tmp_path, "SEQ_CLS", 32), toy_file(tmp_path, "SEQ_CLS", 16, "dev", seed=1)
    options = ("--dev", dev, "--epochs", 3)
    for name in ("straight", "killed"):
        assert train(encoder, "SEQ_CLS", data, tmp_path / name, *options).exit_code == 0
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    # As a kill in the third epoch leaves it: checkpoints of two epochs, nothing of the end.
    for path in ("ptv2_model.safetensors", "ptv2_config.json", "metrics.json", "curves.png"):
        (killed / path).unlink()
    last = max((killed / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if last.name == "checkpoint-12":
        state = json.loads((last / "trainer_state.json").read_text())
        if not str(state["best_model_checkpoint"]).endswith("checkpoint-12"):
            (last / "trainer_state.json").unlink()
    result = train(encoder, "SEQ_CLS", data, killed, *options, "--resume")
    assert result.exit_code == 0, result.output
    weights = [load_file(folder / "ptv2_model.safetensors") for folder in (straight, killed)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    changed = train(encoder, "SEQ_CLS", data, killed, "--dev", dev, "--epochs", 3, "--seed", 5, "--resume")
    refused(changed, "asked for something else", "seed")
    refused(train(encoder, "SEQ_CLS", data, tmp_path / "none", *options, "--resume"), "no run to resume")


def test_a_folder_with_something_in_it_is_not_touched(encoder, tmp_path):
    data = toy_file(tmp_path, "SEQ_CLS", 16)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    refused(train(encoder, "SEQ_CLS", data, mine), "not empty")
    refused(train(encoder, "SEQ_CLS", data, mine, "--overwrite"), "something else than a run")
    assert [path.name for path in mine.iterdir()] == ["letter.txt"]
    refused(train(encoder, "SEQ_CLS", data, mine / "letter.txt"), "is a file")
    assert train(encoder, "SEQ_CLS", data, tmp_path / "run", "--epochs", 1).exit_code == 0
    refused(train(encoder, "SEQ_CLS", data, tmp_path / "run"), "not empty")
    assert train(encoder, "SEQ_CLS", data, tmp_path / "run", "--epochs", 1, "--overwrite").exit_code == 0


BAD_FILES = {
    "columns.csv": (b"a,b,c\n1,2,3\n", "SEQ_CLS", ["columns.csv, line 1"]),
    "cells.tsv": (b"sentence\tlabel\ngood film\tpositive\nbad film\n", "SEQ_CLS", ["cells.tsv, line 3", "2 columns"]),
    "latin.tsv": (b"sentence\tlabel\nfine\tpositive\nna\xefve\tnegative\n", "SEQ_CLS", ["latin.tsv, line 3", "UTF-8"]),
    "empty.tsv": (b"", "SEQ_CLS", ["empty.tsv, line 1", "empty"]),
    "one_class.tsv": (b"sentence\tlabel\ngood\tx\nbad\tx\n", "SEQ_CLS", ["one_class.tsv", "two classes"]),
    "tags.conll": (b"anna\tB-PER\nsaw\tO\nparis\tPLACE\n", "TOKEN_CLS", ["tags.conll, line 3", "PLACE"]),
    "untagged.conll": (b"anna\tB-PER\nsaw\n", "TOKEN_CLS", ["untagged.conll, line 2"]),
    "lengths.jsonl": (b'{"tokens": ["a", "b"], "tags": ["O"]}\n', "TOKEN_CLS", ["lengths.jsonl, line 1", "2 tokens"]),
    "json.jsonl": (b'{"question": "who', "QUESTION_ANS", ["json.jsonl, line 1", "JSON"]),
    "answer.jsonl": (
        b'{"question": "who", "context": "anna saw", "answers": {"text": ["saw"], "answer_start": [0]}}\n',
        "QUESTION_ANS",
        ["answer.jsonl, line 1", "answer_start 0"],
    ),
    "blank.txt": (b" \n\n", "CAUSAL_LM", ["blank.txt, line 1"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_data_file_is_one_line_with_file_and_line(encoder, writer, tmp_path, name):
    content, task, parts = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    model = writer if task == "CAUSAL_LM" else encoder
    refused(train(model, task, tmp_path / name, tmp_path / "out"), *parts)
    assert {path.name for path in tmp_path.iterdir()} == {name}, "something was written"


def test_a_label_that_training_lacks_is_refused_in_dev_and_eval(encoder, trained, tmp_path):
    data = toy_file(tmp_path, "SEQ_CLS", 16)
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\ngood\tpositive\nbad\tmixed\n")
    result = train(encoder, "SEQ_CLS", data, tmp_path / "out", "--dev", tmp_path / "dev.tsv")
    refused(result, "dev.tsv, line 3", "'mixed'", "negative")
    assert not (tmp_path / "out").exists()
    refused(run("eval", trained["SEQ_CLS"], "--data", tmp_path / "dev.tsv"), "dev.tsv, line 3", "'mixed'")


@pytest.mark.parametrize(
    ("more", "part"),
    [
        pytest.param(["--num-virtual-tokens", 0], "num_virtual_tokens", id="no-prompt"),
        pytest.param(["--num-virtual-tokens", -3], "num_virtual_tokens", id="negative-prompt"),
        pytest.param(["--injection", "shallow", "--num-virtual-tokens", 64], "64 learned positions", id="too-long"),
        pytest.param(["--layers", "7"], "layers", id="no-such-layer"),
        pytest.param(["--layers", "first"], "--layers", id="layers-are-numbers"),
        pytest.param(["--injection", "shallow", "--reparameterization", 8], "reparameterization", id="shallow-mlp"),
        pytest.param(["--init", "text", "--reparameterization", 8], "prompt_init", id="text-mlp"),
        pytest.param(["--lr", "0"], "learning_rate", id="no-rate"),
        pytest.param(["--epochs", 0], "epochs", id="no-epochs"),
        pytest.param(["--prompt-dropout", "1.0"], "prompt_dropout", id="all-dropped"),
        pytest.param(["--early-stopping", 2], "dev data", id="nothing-to-watch"),
        pytest.param(["--recipe", "rte-gpt5"], "recipe", id="no-such-recipe"),
        pytest.param(["--resume", "--overwrite"], "contradict", id="resume-overwrite"),
        pytest.param(["--label-column", "mood"], "mood", id="no-such-column"),
        pytest.param(["--split", "train"], "split", id="a-file-has-no-split"),
    ],
)
def test_a_bad_flag_is_one_line_and_writes_nothing(encoder, tmp_path, more, part):
    data = toy_file(tmp_path, "SEQ_CLS", 8)
    refused(train(encoder, "SEQ_CLS", data, tmp_path / "out", *more), part)
    assert not (tmp_path / "out").exists()


def test_an_unknown_choice_is_refused(encoder, tmp_path):
    data = toy_file(tmp_path, "SEQ_CLS", 8)
    result = train(encoder, "SEQ_CLS", data, tmp_path / "out", "--injection", "sideways")
    assert result.exit_code == 2 and "sideways" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_is_refused(tmp_path):
    data = toy_file(tmp_path, "SEQ_CLS", 8)
    refused(train(tmp_path / "nowhere", "SEQ_CLS", data, tmp_path / "out"), "nowhere")
    refused(train(tmp_path, "SEQ_CLS", data, tmp_path / "out"), "config.json")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    refused(train(tmp_path / "broken", "SEQ_CLS", data, tmp_path / "out"), "broken", "could not be loaded")
    refused(train(tmp_path / "x.gguf", "CAUSAL_LM", data, tmp_path / "out"), "GGUF")
    refused(run("info", tmp_path / "nowhere"), "nowhere")
    assert not (tmp_path / "out").exists()


def test_an_encoder_is_no_language_model(encoder, tmp_path):
    data = toy_file(tmp_path, "CAUSAL_LM", 8)
    refused(train(encoder, "CAUSAL_LM", data, tmp_path / "out"), "causal")
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_is_refused(trained, tmp_path):
    refused(run("predict", tmp_path / "nowhere", "x"), "nowhere", "does not exist")
    refused(run("predict", tmp_path, "x"), "holds no adapter")
    for name in ("ptv2_config.json", "ptv2_model.safetensors"):
        (tmp_path / name).write_bytes((trained["SEQ_CLS"] / name).read_bytes())
    assert run("predict", tmp_path, "x").exit_code == 0
    weights = tmp_path / "ptv2_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(run("predict", tmp_path, "x"), "ptv2_model.safetensors")
    refused(run("info", tmp_path), "ptv2_model.safetensors")
    (tmp_path / "ptv2_config.json").write_text('{"config": {')
    refused(run("predict", tmp_path, "x"), "ptv2_config.json", "JSON")
    (tmp_path / "ptv2_config.json").write_text("[]")
    refused(run("predict", tmp_path, "x"), "ptv2_config.json")


def test_the_base_of_an_adapter_must_fit(trained, writer):
    refused(run("predict", trained["SEQ_CLS"], "x", "--model", writer), "another base")


def test_predict_without_text_is_refused(trained):
    refused(run("predict", trained["SEQ_CLS"], stdin="\n \n"), "standard input")
    refused(run("predict", trained["SEQ_CLS"], "x", "--file", "y"), "not both")


def flags(**given) -> dict:
    """The flags of `train` as typer hands them over."""
    names = (
        "model task recipe num_virtual_tokens layers init reparameterization pooling lr epochs batch_size schedule"
        " max_length doc_stride early_stopping dev split dev_split text_column label_column"
    ).split()
    fixed = {"injection": _Deep, "prompt_dropout": 0.0, "gradient_accumulation": 1, "seed": 0, "bf16": False}
    return {**dict.fromkeys(names), **fixed, "data": "x.tsv", **given}


class _Deep:
    value = "deep"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_the_run_and_flags_override_it(name):
    recipe = RECIPES[name]
    request = _request(flags(recipe=name))
    assert (request.model, request.task_type) == (recipe.base, recipe.task_type)
    assert request.num_virtual_tokens == recipe.num_virtual_tokens
    assert request.reparameterization == recipe.reparameterization_hidden_size
    assert (request.fit.learning_rate, request.fit.epochs) == (recipe.learning_rate, recipe.epochs)
    assert (request.fit.batch_size, request.fit.schedule) == (recipe.batch_size, recipe.lr_schedule)
    assert (request.max_length, request.dropout) == (recipe.max_length, recipe.dropout)
    changed = _request(flags(recipe=name, lr=0.5, num_virtual_tokens=3, model="mine"))
    assert (changed.model, changed.fit.learning_rate, changed.num_virtual_tokens) == ("mine", 0.5, 3)
    assert changed.fit.epochs == recipe.epochs


@pytest.mark.parametrize("name", RECIPES)
def test_what_settings_cannot_say_of_a_published_run_is_said(name, caplog):
    _request(flags(recipe=name))
    note = RECIPES[name].note
    assert caplog.messages == ([f"recipe {name}: {note}"] if note else [])


def test_a_pair_of_columns_and_a_dataset_folder(encoder, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = toy_examples("SEQ_CLS", 16)
    columns = {"left": [r["text"] for r in rows], "right": ["film"] * 16, "mood": [r["label"] for r in rows]}
    folder = tmp_path / "set"
    splits = {name: datasets.Dataset.from_dict(columns) for name in ("train", "validation")}
    datasets.DatasetDict(splits).save_to_disk(folder)
    columns = ("--text-column", "left", "--text-column", "right", "--label-column", "mood")
    more = ("--split", "train", "--dev-split", "validation", "--epochs", 1)
    result = train(encoder, "SEQ_CLS", folder, tmp_path / "out", *columns, *more)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["dev"]


def test_the_adapter_is_the_one_that_python_loads(trained, encoder):
    from transformers import AutoModel, AutoTokenizer

    model = PTuningV2Model.from_pretrained(AutoModel.from_pretrained(encoder), trained["SEQ_CLS"])
    with torch.no_grad():
        logits = model(**AutoTokenizer.from_pretrained(encoder)("good great film", return_tensors="pt")).logits
    record = json.loads(run("predict", trained["SEQ_CLS"], "good great film", "--json").stdout)
    assert record["score"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)


def test_public_names_are_listed_without_loading_transformers():
    code = """
import sys, ptv2_fast.cli, ptv2_fast.training
print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))
print(set(ptv2_fast.__all__) - set(dir(ptv2_fast)), set(ptv2_fast.training.__all__) - set(dir(ptv2_fast.training)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n") == ["[]", "set() set()", ""]


def test_the_module_runs_as_a_command(tmp_path):
    command = [sys.executable, "-m", "ptv2_fast.cli", "predict", str(tmp_path), "text", "--file", "x.txt"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("ptv2-fast: ") and result.stderr.count("\n") == 1
