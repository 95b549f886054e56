"""Damaged settings and descriptions of a run's folder: refused in a sentence, whatever stands where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model
from ptv2_fast.storage.tensors import write_tensors
from ptv2_fast.training.fit import FitSettings
from ptv2_fast.training.info import facts_of
from ptv2_fast.training.loading import load_trained
from ptv2_fast.training.predict import evaluate, predict
from ptv2_fast.training.runs import DataSource, TrainRequest, prepare
from tiny_folders import bert_folder, toy_file

VALUES = [True, -1, 0, 10**30, 1.5, float("nan"), "x", [], [1], {}, {"a": {}}, [[]], [None]]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("loading")
    bert_folder(place / "bert")
    toy_file(place, "SEQ_CLS", 8)
    request = TrainRequest(
        str(place / "bert"),
        "SEQ_CLS",
        DataSource(str(place / "train.tsv")),
        fit=FitSettings(epochs=1, batch_size=8),
        num_virtual_tokens=2,
        max_length=16,
    )
    prepare(request, place / "run").execute(title=None)
    shutil.rmtree(place / "run" / "checkpoints")
    return place / "run"


def _changed(values, place, value):
    if not place:
        return value
    return {**values, place[0]: _changed(values.get(place[0], {}), place[1:], value)}


NO_COUNTS = [True, -1, 10**30, 1.5, float("nan"), "x", [], {}]
NO_NAMES = [True, 0, 1.5, {}, [1], [[]], [None]]


@pytest.mark.parametrize(
    ("place", "good", "bad"),
    [
        (("row_length",), [16, None], [0, *NO_COUNTS]),
        (("doc_stride",), [0, 128, None], NO_COUNTS),
        (("no_answer",), [True, False, None], [0, 1.5, "x", []]),
        (("reads",), [["label", "text"], None], ["x", *NO_NAMES]),
        (("data",), [{}, None], [True, 0, "x", [], [1]]),
        (("data", "text_column"), [[], ["text"], None], ["x", *NO_NAMES]),
        (("data", "label_column"), ["label", ["rude", "short"], None], NO_NAMES),
        (("data", "label_names"), [["no", "yes"], None], ["x", *NO_NAMES]),
        (("data", "tag_scheme"), ["BIO", None], [["x"], *NO_NAMES]),
        (("chat",), [True, False, None], [0, 1.5, "x", []]),
    ],
    ids=[
        "row_length",
        "doc_stride",
        "no_answer",
        "reads",
        "data",
        "text_column",
        "label_column",
        "label_names",
        "tag_scheme",
        "chat",
    ],  # fmt: skip
)
def test_settings_of_other_kinds_are_refused_by_name(run, tmp_path, place, good, bad):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    settings = json.loads((folder / "settings.json").read_text())
    for value in good:
        (folder / "settings.json").write_text(json.dumps(_changed(settings, place, value)))
        assert load_trained(folder).codec.max_length in (16, 128)
    for value in bad:
        (folder / "settings.json").write_text(json.dumps(_changed(settings, place, value)))
        with pytest.raises(ValueError, match=f"settings.json is damaged: {place[-1]} cannot be "):
            load_trained(folder)


@pytest.mark.parametrize(
    "place",
    [
        ("config", "heads"),
        ("config", "heads", "task"),
        ("config", "layers"),
        ("config", "stacks"),
        ("config", "heads", "task", "labels"),
        ("config", "num_virtual_tokens"),
        ("base", "name_or_path"),
    ],
    ids=".".join,
)
def test_descriptions_of_other_kinds_are_value_errors(run, tmp_path, place, monkeypatch):
    # A name that is no folder would be looked for on the hub, which takes its time to be away.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    weights = folder / "ptv2_model.safetensors"
    with safe_open(weights, framework="pt") as file:
        description = json.loads(file.metadata()["ptv2"])
    tensors = load_file(weights)
    for value in VALUES:
        write_tensors(weights, tensors, {"ptv2": json.dumps(_changed(description, place, value))})
        for read in (facts_of, load_trained):
            try:
                read(str(folder))
            except (ValueError, FileNotFoundError) as error:
                assert str(error), value


@pytest.mark.parametrize(
    ("outputs", "problem", "prediction"),
    [
        (1, None, float),
        (1, "regression", float),
        (3, "multi_label_classification", list),
        (3, None, str),
        (3, "single_label_classification", str),
    ],
)
def test_what_a_base_s_own_head_solves_is_predicted(tmp_path, outputs, problem, prediction):
    folder = bert_folder(tmp_path / "base")
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=outputs, problem_type=problem)
    base = transformers.BertForSequenceClassification.from_pretrained(folder, config=config)
    base.save_pretrained(folder)
    base = transformers.BertForSequenceClassification.from_pretrained(folder)
    model = get_ptv2_model(base, PTuningV2Config("SEQ_CLS", num_virtual_tokens=2)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_trained(tmp_path / "adapter")
    (found,) = predict(loaded.model, loaded.codec, [{"text": "anna saw the river"}])
    logits = model(**loaded.codec.tokenizer("anna saw the river", return_tensors="pt")).logits[0]
    assert isinstance(found.value, prediction)
    if prediction is float:
        assert found.value == pytest.approx(logits.tolist()[0], abs=1e-6)
        score = evaluate(loaded.model, loaded.codec, [{"text": "anna", "label": 0.5}, {"text": "bob", "label": 2.0}])
        assert score["loss"] == pytest.approx(score["mse"], rel=1e-4)
    if prediction is list:
        assert list(found.scores.values()) == pytest.approx(logits.sigmoid().tolist(), abs=1e-6)


def test_several_numbers_a_row_are_refused(tmp_path):
    base = transformers.AutoModel.from_pretrained(bert_folder(tmp_path / "base"))
    heads = {"own": HeadConfig("SEQ_CLS", 3, problem_type="regression")}
    get_ptv2_model(base, PTuningV2Config("SEQ_CLS", 2, heads=heads)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapter gives 3 numbers a row; .* serve one"):
        load_trained(tmp_path / "adapter")
