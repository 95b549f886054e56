"""Checkpoints: what is trained, its configuration and the base it belongs to, never the base
itself.

An adapter is two files. `ptv2_model.safetensors` holds the tensors and, in its metadata, the
description below, so that this one file is whole by itself; `ptv2_config.json` is the same
description for people and for the hub.

    {"format_version": 1, "adapter_name": ..., "base": {...}, "config": {...}}
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.config import PTuningV2Config
from ptv2_fast.models.backbone import backbone_of
from ptv2_fast.models.families import sizes_of

FORMAT_VERSION = 1
WEIGHTS_NAME = "ptv2_model.safetensors"
CONFIG_NAME = "ptv2_config.json"
# Trainer writes a model's state dict under this name; ours carries its description as a tensor of
# bytes.
TRAINER_WEIGHTS_NAME = "model.safetensors"
DESCRIPTION_KEY = "ptv2_description"
# What the usual file systems take as one name.
MAX_NAME_BYTES = 200


def check_name(name: object) -> None:
    """Refuse an adapter name that cannot be a folder's, or a part of a state dict's keys.

    Raises:
        ValueError: see above.
    """
    fits = (
        isinstance(name, str)
        and 0 < len(name.encode(errors="replace")) <= MAX_NAME_BYTES
        and name.isprintable()
        and name == name.strip()
        and not set(name) & set('./\\:*?"<>|')
    )
    if not fits:
        raise ValueError(
            "name must be a printable string that can name a folder, without dots, slashes, or blanks at its ends; "
            f"got {name!r}"
        )
    # A ModuleDict cannot hold a module under the name of an attribute of its own.
    if hasattr(torch.nn.ModuleDict(), str(name)):
        raise ValueError(f"name must not be an attribute of torch.nn.ModuleDict; got {name!r}")


def describe(name: str, config: PTuningV2Config, base: PreTrainedModel) -> dict[str, Any]:
    """The description of one adapter: format version, name, base and configuration, as plain JSON values."""
    return {
        "format_version": FORMAT_VERSION,
        "adapter_name": name,
        "base": _base_facts(base),
        "config": config.to_dict(),
    }


def save_adapter(folder: str | Path, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write one adapter into a folder; killed at any moment, the folder holds the old adapter or
    the new one.

    Raises:
        ValueError: `folder` exists and is not a folder.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_directory must be a folder; {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(description, indent=2)
    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    metadata = {"format": "pt", "ptv2": text}
    write_whole(folder / WEIGHTS_NAME, lambda path: save_file(plain, path, metadata=metadata))
    write_whole(folder / CONFIG_NAME, lambda path: path.write_text(text + "\n", encoding="utf-8"))


def load_adapters(folder: str | Path, base: PreTrainedModel) -> dict[str, tuple[PTuningV2Config, dict[str, Tensor]]]:
    """Read every adapter of a folder: one in the folder itself, or one per sub-folder, or a Trainer
    checkpoint.

    Returns:
        name -> (configuration, tensors on the CPU).

    Raises:
        ValueError: nothing to load, a damaged or foreign file, an unknown version, or another base;
            the message names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"adapter folder {folder} does not exist")
    if (folder / WEIGHTS_NAME).is_file():
        return dict([_read(folder / WEIGHTS_NAME, base)])
    below = sorted(path.parent for path in folder.glob(f"*/{WEIGHTS_NAME}"))
    if below:
        return _read_all([path / WEIGHTS_NAME for path in below], base)
    if (folder / TRAINER_WEIGHTS_NAME).is_file():
        return _read_trainer(folder / TRAINER_WEIGHTS_NAME, base)
    raise ValueError(f"{folder} holds no {WEIGHTS_NAME}: it is not a ptv2_fast adapter folder")


def pack_description(descriptions: list[dict[str, Any]]) -> Tensor:
    """Descriptions as a tensor of bytes, for a state dict that describes itself."""
    return torch.frombuffer(bytearray(json.dumps(descriptions).encode()), dtype=torch.uint8)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, make it durable, then rename it over `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors, on the CPU, of a safetensors file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            return metadata, {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def remove_adapter(folder: str | Path) -> None:
    """Remove the adapter that stands in a folder itself, if there is one; what else is there stays."""
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        (Path(folder) / name).unlink(missing_ok=True)


def _read(path: Path, base: PreTrainedModel) -> tuple[str, tuple[PTuningV2Config, dict[str, Tensor]]]:
    metadata, tensors = read_safetensors(path)
    if "ptv2" not in metadata:
        raise ValueError(f"{path} was not written by ptv2_fast: its metadata has no 'ptv2' entry")
    name, config = _check(path, _parse(path, metadata["ptv2"]), base)
    return name, (config, tensors)


def _read_all(paths: list[Path], base: PreTrainedModel) -> dict[str, tuple[PTuningV2Config, dict[str, Tensor]]]:
    adapters: dict[str, tuple[PTuningV2Config, dict[str, Tensor]]] = {}
    origin: dict[str, Path] = {}
    for path in paths:
        name, parts = _read(path, base)
        if name in adapters:
            raise ValueError(f"{origin[name]} and {path} both hold an adapter named {name!r}; load one of the folders")
        adapters[name], origin[name] = parts, path
    return adapters


def _read_trainer(path: Path, base: PreTrainedModel) -> dict[str, tuple[PTuningV2Config, dict[str, Tensor]]]:
    """A state dict written by Trainer: every adapter of the model, told apart by the prefix of its keys."""
    _, tensors = read_safetensors(path)
    if DESCRIPTION_KEY not in tensors:
        raise ValueError(f"{path} was not written by ptv2_fast: it has no {DESCRIPTION_KEY!r} entry")
    descriptions = _parse(path, bytes(tensors.pop(DESCRIPTION_KEY).tolist()).decode(errors="replace"))
    adapters = {}
    for description in descriptions if isinstance(descriptions, list) else [descriptions]:
        name, config = _check(path, description, base)
        prefix = f"adapters.{name}."
        own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        adapters[name] = (config, own)
    return adapters


def _parse(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} holds a description that is not JSON: {error}") from error


def _check(path: Path, description: Any, base: PreTrainedModel) -> tuple[str, PTuningV2Config]:
    """The adapter's name and configuration, once version and base are known to fit."""
    if not isinstance(description, dict) or "format_version" not in description:
        raise ValueError(f"{path} holds no ptv2_fast description")
    version = description["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version!r}; this version of ptv2_fast reads {FORMAT_VERSION}"
        )
    missing = {"adapter_name", "base", "config"} - set(description)
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))} in its description")
    try:
        check_name(description["adapter_name"])
    except ValueError as error:
        raise ValueError(f"{path} holds an adapter of an unusable name: {error}") from error
    here, there = _base_facts(base), description["base"]
    if not isinstance(there, dict) or not isinstance(description["config"], dict):
        raise ValueError(f"{path} must hold a description whose 'base' and 'config' are objects")
    differing = [
        f"{key} {there.get(key)!r} (this base: {here[key]!r})"
        for key in here
        if key != "name_or_path" and there.get(key) != here[key]
    ]
    if differing:
        raise ValueError(f"{path} was trained on another base: {', '.join(differing)}")
    try:
        config = PTuningV2Config.from_dict(description["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds an unusable configuration: {error}") from error
    return description["adapter_name"], config


def _base_facts(base: PreTrainedModel) -> dict[str, Any]:
    """What a base must have in common with the one an adapter was trained on."""
    sizes = sizes_of(backbone_of(base))
    # Two bases may have as many layers in all, and not the same ones.
    stacks = {"decoder_layers": sizes.decoder_layers} if sizes.decoder_layers else {}
    return {
        "name_or_path": base.config.name_or_path,
        "model_type": backbone_of(base).config.model_type,
        "hidden_size": sizes.hidden_size,
        "num_layers": sizes.num_layers,
        "num_heads": sizes.num_heads,
        "num_kv_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        **stacks,
    }
