"""Checkpoints: what is trained, its configuration and the base it belongs to, never the base
itself.

An adapter is two files. `ptv2_model.safetensors` holds the tensors and, in its metadata, the
description below and a checksum, so that this one file is whole by itself; `ptv2_config.json` is the
same description for people and for the hub.

    {"format_version": 1, "adapter_name": ..., "base": {...}, "config": {...}, "labels": [...]}

`labels` are there where a copy of the base's own head was trained.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.config import PTuningV2Config
from ptv2_fast.families.registry import sizes_of
from ptv2_fast.storage.files import locked, write_set
from ptv2_fast.storage.files import write_whole as write_whole
from ptv2_fast.storage.names import CONFIG_NAME as CONFIG_NAME
from ptv2_fast.storage.names import WEIGHTS_NAME as WEIGHTS_NAME
from ptv2_fast.storage.names import check_key, namesake
from ptv2_fast.storage.tensors import read_json, read_metadata, read_safetensors, write_tensors

FORMAT_VERSION = 1
# Trainer writes a model's state dict under this name; ours carries its description as a tensor of
# bytes.
TRAINER_WEIGHTS_NAME = "model.safetensors"
DESCRIPTION_KEY = "ptv2_description"
# In the metadata of adapters that were saved together: the names of all of them.
SET_KEY = "ptv2_set"
# In the metadata of PEFT's files, which have no description: the labels of a copied head.
LABELS_KEY = "ptv2_labels"


class Saved(NamedTuple):
    """An adapter as it is read: its configuration, its tensors on the CPU, and the labels of a copied head."""

    config: PTuningV2Config
    tensors: dict[str, Tensor]
    labels: tuple[str, ...] | None = None


class Part(NamedTuple):
    """What stands in the two files of one adapter that is to be saved."""

    text: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = {}


def describe(
    name: str, config: PTuningV2Config, base: PreTrainedModel, labels: Collection[str] | None = None
) -> dict[str, Any]:
    """The description of one adapter: format version, name, base and configuration, as plain JSON values.

    Args:
        labels: the names of the classes of a copied head, in the order of their ids; None where there is no such head.

    Raises:
        ValueError: a name in it is no Unicode text, and could not be read again.
    """
    labelled = {} if labels is None else {"labels": list(labels)}
    description = {
        "format_version": FORMAT_VERSION,
        "adapter_name": name,
        "base": _base_facts(base),
        "config": config.to_dict(),
        **labelled,
    }
    return read_json(f"the description of adapter {name!r}", json.dumps(description))


def part_of(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part:
    """The files of an adapter that `describe` described."""
    text = json.dumps(description, indent=2)
    return Part(text, tensors, {"ptv2": text})


def save_adapters(
    folder: str | Path,
    parts: Mapping[str, Part],
    kept: Collection[str] = (),
    *,
    weights_name: str = WEIGHTS_NAME,
    config_name: str = CONFIG_NAME,
) -> None:
    """Write one adapter into a folder itself, several into a sub-folder each; killed at any moment, what loads is what
    was there before or what is there now.

    What an earlier save of several left behind is removed, but for adapters in `kept` that are not written now.

    Raises:
        ValueError: a file stands where a folder is to be, or two names would be one folder on some system.
    """
    folder, names = Path(folder), list(parts)
    _check_places(folder, names)
    files: dict[str, Callable[[Path], Any]] = {}
    for name, part in parts.items():
        below, together = ("", {}) if len(names) == 1 else (f"{name}/", {SET_KEY: json.dumps(names)})
        text, metadata = part.text + "\n", {**part.metadata, **together}
        files[below + weights_name] = functools.partial(write_tensors, tensors=part.tensors, metadata=metadata)
        files[below + config_name] = functools.partial(Path.write_text, data=text, encoding="utf-8")

    def outdated() -> list[str]:
        written = [folder / name for name in names if len(names) > 1 and (folder / name).is_dir()]
        gone = [
            f"{name}/"
            for name in _saved_together(folder, weights_name)
            if name not in set(kept) - set(names) and not any(place.samefile(folder / name) for place in written)
        ]
        # An adapter saved here by itself before would be the one that is loaded.
        return [below + name for below in ["", *gone] for name in (weights_name, config_name)]

    write_set(folder, files, outdated)


def _check_places(folder: Path, names: list[str]) -> None:
    """Refuse to save where a file is in the way, or two adapters would be in each other's."""
    for index, name in enumerate(names):
        place = folder if len(names) == 1 else folder / name
        taken = next((one for one in (place, *place.absolute().parents) if one.exists() and not one.is_dir()), None)
        if taken is not None:
            raise ValueError(f"save_directory must be a folder; {taken} is a file")
        other = namesake(name, names[:index])
        if other is not None:
            raise ValueError(f"adapter_names must differ in more than case; got {other!r} and {name!r}")


def load_adapters(folder: str | Path, base: PreTrainedModel) -> dict[str, Saved]:
    """Read every adapter of a folder: one in the folder itself, or one per sub-folder, or a Trainer
    checkpoint.

    Raises:
        ValueError: nothing to load, a damaged or foreign file, an unknown version, or another base;
            the message names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"adapter folder {folder} does not exist")
    with locked(folder, shared=True):
        if (folder / WEIGHTS_NAME).is_file():
            return dict([_read(folder / WEIGHTS_NAME, base)])
        below = sorted(path for path in folder.glob(f"*/{WEIGHTS_NAME}") if path.is_file())
        if below:
            return _read_all(below, base)
        if (folder / TRAINER_WEIGHTS_NAME).is_file():
            return _read_trainer(folder / TRAINER_WEIGHTS_NAME, base)
    raise ValueError(f"{folder} holds no {WEIGHTS_NAME}: it is not a ptv2_fast adapter folder")


def read_description(folder: str | Path) -> dict[str, Any]:
    """The description of the single adapter in a folder, out of the file that holds its weights; no tensor is read.

    Raises:
        ValueError: there is none, or the file is damaged.
    """
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no {WEIGHTS_NAME}: it is not a ptv2_fast adapter folder")
    description = _described(path, read_metadata(path))
    _check_description(path, description)
    return description


def pack_description(descriptions: list[dict[str, Any]]) -> Tensor:
    """Descriptions as a tensor of bytes, for a state dict that describes itself."""
    return torch.frombuffer(bytearray(json.dumps(descriptions).encode()), dtype=torch.uint8)


def _saved_together(folder: Path, weights_name: str) -> list[str]:
    """The adapters of the sub-folders that were saved into this folder together; what was put there singly is not."""
    sets: dict[str, list[str]] = {}
    for path in folder.glob(f"*/{weights_name}"):
        try:
            sets[path.parent.name] = json.loads(read_metadata(path)[SET_KEY])
        except (OSError, ValueError, KeyError, RecursionError):
            continue
    return [name for name, members in sets.items() if isinstance(members, list) and set(map(str, members)) <= set(sets)]


def _read(path: Path, base: PreTrainedModel) -> tuple[str, Saved]:
    name, config, labels = _check(path, _described(path, read_metadata(path)), base)
    return name, Saved(config, read_safetensors(path)[1], labels)


def _described(path: Path, metadata: Mapping[str, str]) -> Any:
    if "ptv2" not in metadata:
        raise ValueError(f"{path} was not written by ptv2_fast: its metadata has no 'ptv2' entry")
    return read_json(f"the description in {path}", metadata["ptv2"])


def _read_all(paths: list[Path], base: PreTrainedModel) -> dict[str, Saved]:
    adapters: dict[str, Saved] = {}
    origin: dict[str, Path] = {}
    for path in paths:
        name, saved = _read(path, base)
        if name in adapters:
            raise ValueError(f"{origin[name]} and {path} both hold an adapter named {name!r}; load one of the folders")
        adapters[name], origin[name] = saved, path
    return adapters


def _read_trainer(path: Path, base: PreTrainedModel) -> dict[str, Saved]:
    """A state dict written by Trainer: every adapter of the model, told apart by the prefix of its keys."""
    _, tensors = read_safetensors(path)
    if DESCRIPTION_KEY not in tensors:
        raise ValueError(f"{path} was not written by ptv2_fast: it has no {DESCRIPTION_KEY!r} entry")
    packed = tensors.pop(DESCRIPTION_KEY)
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise ValueError(f"{path} must hold {DESCRIPTION_KEY} as bytes; got {packed.dtype} {tuple(packed.shape)}")
    found = read_json(f"the description in {path}", packed.numpy().tobytes())
    descriptions = found if isinstance(found, list) else [found]
    if not descriptions:
        raise ValueError(f"{path} describes no adapter")
    adapters: dict[str, Saved] = {}
    for description in descriptions:
        name, config, labels = _check(path, description, base)
        if name in adapters:
            raise ValueError(f"{path} describes two adapters named {name!r}")
        prefix = f"adapters.{name}."
        own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        adapters[name] = Saved(config, own, labels)
    unknown = [key for key in tensors if not key.startswith(tuple(f"adapters.{name}." for name in adapters))]
    if unknown:
        raise ValueError(f"{path} holds tensors of no adapter that it describes: {unknown[:5]}")
    return adapters


def _check(path: Path, description: Any, base: PreTrainedModel) -> tuple[str, PTuningV2Config, tuple[str, ...] | None]:
    """The adapter's name, configuration and labels, once version and base are known to fit."""
    _check_description(path, description)
    here, there = _base_facts(base), description["base"]
    differing = [
        f"{key} {there.get(key)!r} (this base: {here[key]!r})"
        for key in here
        if key != "name_or_path" and there.get(key) != here[key]
    ]
    if differing:
        raise ValueError(f"{path} was trained on another base: {', '.join(differing)}")
    try:
        config = PTuningV2Config.from_dict(description["config"])
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} holds an unusable configuration: {error}") from error
    return description["adapter_name"], config, _labels(path, description.get("labels"))


def _check_description(path: Path, description: Any) -> None:
    """Refuse what is no description of ours, or of another version.

    Raises:
        ValueError: see above; the message names the file.
    """
    if not isinstance(description, dict) or "format_version" not in description:
        raise ValueError(f"{path} holds no ptv2_fast description")
    version = description["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {version!r}; this version of ptv2_fast reads {FORMAT_VERSION}")
    missing = {"adapter_name", "base", "config"} - set(description)
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))} in its description")
    try:
        check_key(description["adapter_name"])
    except ValueError as error:
        raise ValueError(f"{path} holds an adapter of an unusable name: {error}") from error
    if not isinstance(description["base"], dict) or not isinstance(description["config"], dict):
        raise ValueError(f"{path} must hold a description whose 'base' and 'config' are objects")
    _labels(path, description.get("labels"))


def read_labels(path: Path) -> tuple[str, ...] | None:
    """The labels that the metadata of PEFT's file has, where it was written here with a copied head.

    Raises:
        ValueError: the file is damaged.
    """
    text = read_metadata(path).get(LABELS_KEY)
    return None if text is None else _labels(path, read_json(f"{LABELS_KEY} in {path}", text))


def _labels(path: Path, labels: Any) -> tuple[str, ...] | None:
    if labels is None:
        return None
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{path} must hold labels that are a list of names; got {str(labels)[:100]}")
    return tuple(labels)


def _base_facts(base: PreTrainedModel) -> dict[str, Any]:
    """What a base must have in common with the one an adapter was trained on."""
    sizes = sizes_of(backbone_of(base))
    # Two bases may have as many layers in all, and not the same ones.
    stacks = {"decoder_layers": sizes.decoder_layers} if sizes.decoder_layers else {}
    return {
        # A path on the disk need not be Unicode.
        "name_or_path": str(base.config.name_or_path).encode(errors="replace").decode(),
        "model_type": backbone_of(base).config.model_type,
        "hidden_size": sizes.hidden_size,
        "num_layers": sizes.num_layers,
        "num_heads": sizes.num_heads,
        "num_kv_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        **stacks,
    }
