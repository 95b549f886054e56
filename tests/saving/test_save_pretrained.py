"""What save_pretrained is asked for happens or is refused; what a folder holds afterwards is the last save."""

from __future__ import annotations

import json
import shutil
import threading
import types
import unicodedata

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ptv2_fast import HeadConfig, PTuningV2Model, from_peft
from ptv2_fast.saving.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from tiny_models import tiny_base, tiny_model, tiny_prompts
from tolerances import assert_same_bits

HEADS = {"topic": HeadConfig("SEQ_CLS", 3)}
PROMPTS = "adapters.default.encoder.prompts"


def _model(*names):
    model = tiny_model("bert", "deep", "SEQ_CLS", heads=HEADS)
    for name in names:
        model.add_adapter(name, tiny_prompts("prefix", "SEQ_CLS", heads=HEADS))
    return model


def _loaded(folder):
    return PTuningV2Model.from_pretrained(tiny_base("bert", "SEQ_CLS"), folder)


# Arguments that save_pretrained has elsewhere.


def test_a_state_dict_is_what_is_written(tmp_path):
    model = _model("other")
    state = {key: torch.full_like(t, 3.0) if t.is_floating_point() else t for key, t in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    for name, tensor in _loaded(tmp_path).adapters.state_dict().items():
        assert torch.all(tensor == 3.0), name
    one = {key: t for key, t in state.items() if "default" in key}
    model.save_pretrained(tmp_path / "one", state_dict=one, adapter_names=["default"])
    with pytest.raises(ValueError, match="state_dict, adapter 'other': tensors missing"):
        model.save_pretrained(tmp_path / "two", state_dict=one)
    with pytest.raises(ValueError, match="tensors missing .*'encoder.prompts'"):
        model.save_pretrained(tmp_path / "two", state_dict={})
    with pytest.raises(ValueError, match=r"encoder.prompts must have shape \(2, 5, 32\); got \(2, 4, 32\)"):
        model.save_pretrained(tmp_path / "two", state_dict={**state, PROMPTS: torch.ones(2, 4, 32)})
    with pytest.raises(ValueError, match="state_dict must be None with format='peft'"):
        model.save_pretrained(tmp_path / "two", state_dict=state, format="peft")
    assert not (tmp_path / "two").exists()


def test_the_recipe_of_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(_model())
    with torch.no_grad():
        model.adapters["default"].encoder.prompts.fill_(2.0)
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(
        tmp_path,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    assert torch.all(_loaded(tmp_path).adapters["default"].encoder.prompts == 2.0)

    class Second:
        """An accelerator of another process."""

        is_main_process = False

        def get_state_dict(self):
            raise AssertionError

        def save(self, obj, f):
            raise AssertionError

    unwrapped.save_pretrained(tmp_path / "two", save_function=Second().save)
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"save_function": torch.save},
        {"save_function": print},
        {"safe_serialization": False},
        {"push_to_hub": True},
        {"max_shard_size": "5MB"},
        {"variant": "fp16"},
        {"selected_adapters": ["default"]},
        {"adapter_name": "default"},
        {"adapter_names": []},
        {"adapter_names": "default"},
    ],
    ids=lambda arguments: " ".join(f"{name}={getattr(v, '__name__', v)}" for name, v in arguments.items()),
)
def test_what_does_not_happen_is_refused_by_name(tmp_path, arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"^{name} "):
        _model().save_pretrained(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_what_happens_anyway_may_be_said(tmp_path):
    _model().save_pretrained(tmp_path, safe_serialization=True, push_to_hub=False, variant=None, token=None)
    assert (tmp_path / WEIGHTS_NAME).is_file()


@pytest.mark.parametrize("part", ["bert.embeddings.LayerNorm.weight", "bert.pooler.dense.bias", "classifier.bias"])
def test_parameters_of_the_base_that_train_are_not_lost_without_a_word(tmp_path, part):
    model = tiny_model("bert", "deep", "SEQ_CLS")
    parameter = model.base_model.get_parameter(part).requires_grad_(True)
    for save in (
        model.state_dict,
        lambda: model.save_pretrained(tmp_path / "new"),
        lambda: model.save_pretrained(tmp_path / "new", format="peft"),
        lambda: model.push_to_hub("me/x"),
    ):
        with pytest.raises(ValueError, match=f"{part} train"):
            save()
    assert not (tmp_path / "new").exists()
    parameter.requires_grad_(False)
    model.save_pretrained(tmp_path / "new")


# What a folder holds afterwards.


def test_a_deleted_adapter_stays_away(tmp_path):
    model = _model("second", "third")
    model.save_pretrained(tmp_path)
    model.delete_adapter("second")
    model.save_pretrained(tmp_path)
    assert set(_loaded(tmp_path).adapters) == {"default", "third"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["default", "third"]
    model.delete_adapter("third")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    model.add_adapter("fourth", tiny_prompts("deep", "SEQ_CLS", heads=HEADS))
    model.save_pretrained(tmp_path)
    assert set(_loaded(tmp_path).adapters) == {"default", "fourth"}
    _model("fifth").save_pretrained(tmp_path)
    assert set(_loaded(tmp_path).adapters) == {"default", "fifth"}


def test_a_deleted_adapter_stays_away_in_the_format_of_peft(tmp_path):
    model = tiny_model("llama", "prefix", "CAUSAL_LM")
    model.add_adapter("second", tiny_prompts("shallow", "CAUSAL_LM"))
    model.add_adapter("third", tiny_prompts("shallow", "CAUSAL_LM"))
    model.save_pretrained(tmp_path, format="peft")
    model.delete_adapter("second")
    model.save_pretrained(tmp_path, format="peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["default", "third"]
    model.save_pretrained(tmp_path)
    assert len(list((tmp_path / "third").iterdir())) == 4
    assert from_peft(tiny_base("llama", "CAUSAL_LM"), tmp_path / "third").ptv2_config["default"].injection == "shallow"


def test_no_adapter_is_removed_that_the_model_has_or_that_came_there_by_itself(tmp_path):
    model = _model("a", "b")
    model.save_pretrained(tmp_path)
    # The others are updated, b stays.
    with torch.no_grad():
        model.adapters["a"].encoder.prompts.fill_(1.0)
    model.save_pretrained(tmp_path, adapter_names=["default", "a"])
    loaded = _loaded(tmp_path)
    assert set(loaded.adapters) == {"default", "a", "b"} and torch.all(loaded.adapters["a"].encoder.prompts == 1.0)
    model.save_pretrained(tmp_path, adapter_names=["a"])
    assert set(_loaded(tmp_path).adapters) == {"a"} and (tmp_path / "b" / WEIGHTS_NAME).is_file()
    # Saved singly, and copied out of a set.
    _model().save_pretrained(tmp_path / "new" / "own")
    _model("p", "q").save_pretrained(tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere" / "p", tmp_path / "new" / "p")
    (tmp_path / "new" / "p" / "notes.txt").write_text("mine")
    _model("x", "y").save_pretrained(tmp_path / "new")
    _model("x").save_pretrained(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["default", "own", "p", "x"]


def test_a_folder_that_has_two_names_is_written_and_not_removed(tmp_path):
    """As "A" and "a" are one where case does not count."""
    model = _model("a")
    model.save_pretrained(tmp_path)
    (tmp_path / "A").symlink_to("a")
    model.save_pretrained(tmp_path)
    (tmp_path / "A").unlink()
    assert set(_loaded(tmp_path).adapters) == {"default", "a"}


def test_files_of_others_in_the_folder_of_a_deleted_adapter_stay(tmp_path):
    model = _model("second")
    model.save_pretrained(tmp_path)
    (tmp_path / "second" / "notes.txt").write_text("mine")
    model.delete_adapter("second")
    model.save_pretrained(tmp_path)
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("place", ["taken", "taken/below", "taken/far/below"])
def test_a_file_in_the_way_is_said_and_left_alone(tmp_path, place):
    (tmp_path / "taken").write_text("mine")
    model = _model("second")
    for names in (None, ["second"]):
        with pytest.raises(ValueError, match="save_directory must be a folder; .*taken is a file"):
            model.save_pretrained(tmp_path / place, adapter_names=names)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "second").write_text("mine")
    with pytest.raises(ValueError, match="save_directory must be a folder; .*second is a file"):
        model.save_pretrained(tmp_path / "set")
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["second"]
    assert (tmp_path / "taken").read_text() == "mine"


def test_threads_that_save_into_one_folder(tmp_path):
    models, errors = [_model(), _model("second")], []

    def save(model):
        try:
            for _ in range(10):
                model.save_pretrained(tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in models * 2]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "default").exists() or (tmp_path / WEIGHTS_NAME).exists():
            assert set(_loaded(tmp_path).adapters) in ({"default"}, {"default", "second"})
    assert not errors
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_a_folder_of_an_earlier_version_loads_and_is_replaced(tmp_path):
    model = _model()
    model.save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS_NAME
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert set(metadata) == {"format", "ptv2", "ptv2_checksum"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    save_file(tensors, path, metadata={"format": "pt", "ptv2": metadata["ptv2"]})
    assert_same_bits(_loaded(tmp_path).adapters["default"].encoder.prompts, model.adapters["default"].encoder.prompts)
    model.save_pretrained(tmp_path)
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata


def test_weights_and_description_come_from_one_file(tmp_path):
    _model().save_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"format_version": 1, "adapter_name": "wrong"}))
    assert set(_loaded(tmp_path).adapters) == {"default"}
    (tmp_path / CONFIG_NAME).unlink()
    assert set(_loaded(tmp_path).adapters) == {"default"}


# Names.


@pytest.mark.parametrize("name", ["CON", "con", "Nul", "COM1", "lpt9", "CONIN$", "aux", "com³"])
def test_names_of_devices_are_refused(tmp_path, name):
    model = _model()
    with pytest.raises(ValueError, match="device on Windows"):
        model.add_adapter(name, tiny_prompts("deep", "SEQ_CLS", heads=HEADS))
    assert list(model.adapters) == ["default"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a", "A"),
        ("Straße", "STRASSE"),
        (unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")),
        (unicodedata.normalize("NFC", "É"), unicodedata.normalize("NFD", "é")),
    ],
)
def test_names_that_are_one_folder_on_some_systems(tmp_path, one, other):
    model = _model(one)
    with pytest.raises(ValueError, match="name must differ from"):
        model.add_adapter(other, tiny_prompts("deep", "SEQ_CLS", heads=HEADS))
    _model().save_pretrained(tmp_path / "single")
    with pytest.raises(ValueError, match="name must differ from"):
        model.load_adapter(tmp_path / "single", other)
    # A folder of an earlier version may have both.
    model.adapters[other] = model.adapters[one]
    with pytest.raises(ValueError, match="adapter_names must differ in more than case"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_name_that_is_no_longer_taken_still_loads_under_another(tmp_path):
    model = _model()
    model.adapters["con"] = model.adapters["default"]
    model.save_pretrained(tmp_path, adapter_names=["con"])
    with pytest.raises(ValueError, match="device on Windows"):
        _loaded(tmp_path)
    loaded = PTuningV2Model.from_pretrained(tiny_base("bert", "SEQ_CLS"), tmp_path, adapter_name="console")
    assert list(loaded.adapters) == ["console"]


def test_a_module_s_own_save_function_is_no_accelerator(tmp_path):
    bound = types.SimpleNamespace(is_main_process=True)
    with pytest.raises(ValueError, match="save_function must be None or accelerate's"):
        _model().save_pretrained(tmp_path / "new", save_function=types.MethodType(print, bound))
