"""A run's folder: killed anywhere, what loads and what is resumed belongs to one run."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from ptv2_fast.training import run_folder, runs
from ptv2_fast.training.fit import FitSettings, fit
from ptv2_fast.training.loading import load_trained
from ptv2_fast.training.run_folder import RunFolder, differences, plain_json
from ptv2_fast.training.runs import DataSource, TrainRequest, prepare
from tiny_folders import bert_folder, toy_file


class Killed(BaseException):
    """Ends everything at once, as a kill does: nothing catches it and nothing is tidied."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    bert_folder(place / "bert")
    toy_file(place, "SEQ_CLS", 24)
    toy_file(place, "SEQ_CLS", 16, "dev", seed=1)
    toy_file(place, "SEQ_CLS", 24, "other", seed=2)
    return place


def request(place: Path, **changes) -> TrainRequest:
    fit_settings = FitSettings(learning_rate=3e-2, epochs=2, batch_size=8)
    given = {
        "model": str(place / "bert"), "task_type": "SEQ_CLS", "data": DataSource(str(place / "train.tsv")),
        "dev": DataSource(str(place / "dev.tsv")), "fit": fit_settings, "num_virtual_tokens": 3, "max_length": 24,
        **changes,
    }  # fmt: skip
    return TrainRequest(**given)


@pytest.fixture(scope="module")
def old(place) -> Path:
    """A finished run, which later ones overwrite in copies."""
    prepare(request(place), place / "old").execute(title=None)
    return place / "old"


@pytest.fixture(scope="module")
def straight(place) -> Path:
    """The other run, never killed."""
    prepare(new_request(place), place / "straight").execute(title=None)
    return place / "straight"


@pytest.fixture(scope="module")
def all_changes(place, old) -> int:
    """How many names on disk the other run changes where it overwrites the old one."""
    shutil.copytree(old, place / "whole")
    with pytest.MonkeyPatch.context() as patch:
        changes = killed_in(patch, -1)
        prepare(new_request(place), place / "whole", overwrite=True).execute(title=None)
    return changes[0]


def facts(folder: Path) -> tuple[int, int]:
    """(prompt length, row length) of what loads: one run has 3 and 24, the other 2 and 30."""
    loaded = load_trained(folder)
    config = loaded.model.adapters[loaded.model.active_adapter].config
    return config.num_virtual_tokens, loaded.codec.max_length


OLD, NEW = (3, 24), (2, 30)


def new_request(place: Path) -> TrainRequest:
    return request(place, num_virtual_tokens=2, max_length=30, data=DataSource(str(place / "other.tsv")))


def killed_in(monkeypatch, calls: int) -> list[int]:
    """Kill the process in the n-th change of a name on disk; returns a list that counts them."""
    seen = [0]

    def counted(change):
        def call(*arguments, **options):
            if isinstance(arguments[0], int):  # rmtree works with descriptors below; it counts as one
                return change(*arguments, **options)
            seen[0] += 1
            if seen[0] == calls:
                raise Killed
            return change(*arguments, **options)

        return call

    for owner, name in ((os, "replace"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree"), (Path, "mkdir")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return seen


def test_a_finished_run_says_which_weights_it_speaks_of(old):
    settings = json.loads((old / "settings.json").read_text())
    assert settings["weights"] == run_folder._digest(old / "ptv2_model.safetensors")
    assert "before" not in settings and settings["row_length"] == 24
    assert facts(old) == OLD
    assert {path.name for path in old.iterdir()} == {
        "ptv2_model.safetensors",
        "ptv2_config.json",
        "settings.json",
        "metrics.json",
        "curves.png",
        "checkpoints",
    }


def test_overwrite_killed_before_its_first_save_leaves_no_old_checkpoint(place, old, straight, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(old, folder)
    metrics = (folder / "metrics.json").read_text()

    def killed(*arguments, **options):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(runs, "fit", killed)
        with pytest.raises(Killed):
            prepare(new_request(place), folder, overwrite=True).execute(title=None)
    assert list((folder / "checkpoints").glob("checkpoint-*")) == []
    assert facts(folder) == OLD and (folder / "metrics.json").read_text() == metrics, "the old adapter stays whole"
    resumed = prepare(new_request(place), folder, resume=True)
    result = resumed.execute(title=None)
    weights = [load_file(path / "ptv2_model.safetensors") for path in (folder, straight)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert result.epochs == 2 and facts(folder) == NEW


@pytest.mark.parametrize("seed", range(2))
def test_overwrite_killed_at_random_is_one_run_and_can_be_resumed(
    place, old, straight, all_changes, tmp_path, monkeypatch, seed
):
    moments = random.Random(seed).sample(range(1, all_changes + 1), 5)
    for moment in moments:
        folder = tmp_path / f"killed-{moment}"
        shutil.copytree(old, folder)
        with monkeypatch.context() as patch:
            killed_in(patch, moment)
            with pytest.raises(Killed):
                prepare(new_request(place), folder, overwrite=True).execute(title=None)
        assert facts(folder) in (OLD, NEW), moment
        if not (folder / "checkpoints" / "run.json").is_file():
            prepare(new_request(place), folder, overwrite=True).execute(title=None)
        elif json.loads((folder / "checkpoints" / "run.json").read_text())["asked"]["num_virtual_tokens"] == 3:
            with pytest.raises(ValueError, match="num_virtual_tokens was 3, is 2"):
                prepare(new_request(place), folder, resume=True)
            continue
        else:
            prepare(new_request(place), folder, resume=True).execute(title=None)
        assert facts(folder) == NEW, moment
        weights = [load_file(path / "ptv2_model.safetensors") for path in (folder, straight)]
        assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items()), moment
        assert not any(path.name.startswith(".") for path in folder.iterdir()), "leftovers are removed"


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} is read-only"):
        RunFolder(tmp_path / "new" / "run").check({}, resume=False, overwrite=False)


def test_resume_notices_other_data(place, tmp_path):
    data = tmp_path / "train.tsv"
    data.write_bytes((place / "train.tsv").read_bytes())
    mine = request(place, data=DataSource(str(data)))
    prepare(mine, tmp_path / "run").execute(title=None)
    moved = request(place, data=DataSource(str(place / "train.tsv")))
    prepare(moved, tmp_path / "run", resume=True), "the same rows elsewhere are the same data"
    data.write_text(data.read_text() + "good film\tpositive\n")
    with pytest.raises(ValueError, match="examples of --data are not those that the run began with.*--overwrite"):
        prepare(mine, tmp_path / "run", resume=True)
    other = request(place, dev=DataSource(str(place / "other.tsv")))
    with pytest.raises(ValueError, match="examples of --dev are not"):
        prepare(other, tmp_path / "run", resume=True)


def test_resume_notices_another_base(place, tmp_path):
    """The weights count, not their place; a pooler, which nothing reads, may be drawn anew by each load."""
    folder = tmp_path / "bert"
    shutil.copytree(place / "bert", folder)
    weights = load_file(folder / "model.safetensors")
    without = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    assert without.keys() != weights.keys()
    save_file(without, folder / "model.safetensors", {"format": "pt"})
    mine = request(place, model=str(folder))
    prepare(mine, tmp_path / "run").execute(title=None)
    torch.manual_seed(5)
    prepare(mine, tmp_path / "run", resume=True)
    without["encoder.layer.1.output.dense.weight"].view(-1)[7].add_(1e-5)
    save_file(without, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"weights of the base \(--model\) are not those .*--overwrite trains anew"):
        prepare(mine, tmp_path / "run", resume=True)
    run = tmp_path / "run" / "checkpoints" / "run.json"
    run.write_text(json.dumps({**json.loads(run.read_text()), "base": None}))
    with pytest.raises(ValueError, match="weights of the base"):
        prepare(mine, tmp_path / "run", resume=True)


def test_resume_says_what_differs_and_nothing_else(place, old):
    changed = request(place, dev=None, fit=FitSettings(learning_rate=3e-2, epochs=5, batch_size=8))
    with pytest.raises(ValueError) as caught:
        prepare(changed, old, resume=True)
    assert "dev was given, is not given; fit.epochs was 2, is 5" in str(caught.value)
    assert "{" not in str(caught.value)
    named = request(place, data=DataSource(str(place / "train.tsv"), text_column=("sentence",)))
    with pytest.raises(ValueError, match=r"data.text_column was \[\], is \['sentence'\]"):
        prepare(named, old, resume=True)


def test_differences_of_nested_values():
    lines = ["a.b was 1, is 2", "c was not given, is 3"]
    assert differences({"a": {"b": 1}, "c": None}, {"a": {"b": 2}, "c": 3}) == lines
    assert differences({"a": 1, "gone": 2}, {"a": 1}) == ["gone was 2, is not given"]


def test_a_folder_named_checkpoints_of_somebody_else_is_not_touched(place, tmp_path):
    (tmp_path / "settings.json").write_text('{"colour": "red"}')
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="something else than a run"):
        prepare(request(place), tmp_path, overwrite=True)
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        prepare(request(place), tmp_path, overwrite=True)


@pytest.mark.parametrize("text", ["{", "[]", '{"asked": 3}', "[" * 100_000])
def test_a_damaged_run_file_is_refused(place, old, tmp_path, text):
    shutil.copytree(old, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "run.json").write_text(text)
    with pytest.raises(ValueError, match="run.json"):
        prepare(request(place), tmp_path / "run", resume=True)


def test_settings_that_speak_of_other_weights_give_way_to_those_before(old, tmp_path):
    shutil.copytree(old, tmp_path / "run")
    settings = json.loads((old / "settings.json").read_text())
    both = {**settings, "row_length": 62, "weights": "0" * 64, "before": settings}
    (tmp_path / "run" / "settings.json").write_text(json.dumps(both))
    assert facts(tmp_path / "run") == OLD
    assert RunFolder(tmp_path / "run").settings() == settings


def test_pairs_and_single_texts_are_not_mixed(place, tmp_path):
    (tmp_path / "pairs.tsv").write_text("sentence1\tsentence2\tlabel\ngood\tfilm\tpositive\nbad\tfilm\tnegative\n")
    with pytest.raises(ValueError, match="expected label and text as in .*train.tsv; got label and text and text_pair"):
        prepare(request(place, dev=DataSource(str(tmp_path / "pairs.tsv"))), tmp_path / "run")


def test_weights_that_diverge_leave_the_best_epoch_before(place, tmp_path, monkeypatch):
    def poisoned(model, *arguments, **options):
        """Training in which the prompts become NaN in the second epoch."""

        class Poison(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 4:
                    with torch.no_grad():
                        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))

        return fit(model, *arguments, callbacks=[Poison()], **options)

    monkeypatch.setattr(runs, "fit", poisoned)
    with pytest.raises(runs.Diverged, match="smaller learning rate than 0.03.*epoch 1, the best before, is kept in"):
        prepare(request(place), tmp_path / "run").execute(title=None)
    weights = load_file(tmp_path / "run" / "ptv2_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["best_epoch"] == 1 and metrics["dev"]["accuracy"] >= 0.0
    assert facts(tmp_path / "run") == OLD


def test_json_has_no_nan():
    values = {"a": float("nan"), "b": [float("inf"), 1.5, {"c": -float("inf")}], "d": "NaN"}
    assert json.loads(plain_json(values)) == {"a": None, "b": [None, 1.5, {"c": None}], "d": "NaN"}
