"""Safetensors files with a checksum over all that they say, and JSON that others wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CHECKSUM_KEY = "ptv2_checksum"
# Of what a parameter may be stored in; a cast from anything else would change what it says.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose metadata has a checksum of the rest."""
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    said = {"format": "pt", **metadata}
    save_file(plain, path, metadata={**said, CHECKSUM_KEY: _checksum(said, plain)})


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors, on the CPU, of a safetensors file.

    Raises:
        ValueError: the file is damaged: it is not whole, or its checksum, where it has one, is not its own.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    said = {key: value for key, value in metadata.items() if key != CHECKSUM_KEY}
    if CHECKSUM_KEY in metadata and metadata[CHECKSUM_KEY] != _checksum(said, tensors):
        raise ValueError(f"{path} is damaged: its checksum is not that of what it holds")
    return metadata, tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, no tensor read.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def check_float(where: str, name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not of floating point: a cast would change what it says.

    Raises:
        ValueError: see above.
    """
    found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
    if found not in FLOATS:
        raise ValueError(f"{where}: {name} must be of floating point, 16 bits or more; got {found}")


def read_json(where: str | Path, text: str | bytes) -> Any:
    """The values of a JSON text.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or holds what is no Unicode text; the message begins with
            `where`.
    """
    try:
        values = json.loads(text)
        json.dumps(values, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError(f"{where} is not JSON that can be read: it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is not JSON that can be read: it holds half a surrogate pair") from error
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    return values


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over metadata, names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
