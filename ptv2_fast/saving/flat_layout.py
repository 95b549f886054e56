"""The flat form in which PEFT and the paper's code keep keys and values, and what stands in their adapter files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.config import HEAD_TASKS
from ptv2_fast.families.dimensions import Dimensions
from ptv2_fast.families.registry import sizes_of
from ptv2_fast.heads import own_heads
from ptv2_fast.storage.tensors import check_float, read_safetensors
from ptv2_fast.task_types import TASKS

# The files of an adapter in PEFT's folders.
PEFT_CONFIG_NAME = "adapter_config.json"
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def keys_values_of(flat: Tensor, sizes: Dimensions) -> Tensor:
    """(P, L * 2 * Hkv * d) -> (L, 2, Hkv, P, d): a token's values by layer, key before value, head, channel."""
    parts = (flat.shape[0], sizes.num_layers, 2, sizes.num_kv_heads, sizes.head_dim)
    return flat.reshape(parts).permute(1, 2, 3, 0, 4)


def flat_of(keys_values: Tensor) -> Tensor:
    """(L, 2, Hkv, P, d) -> (P, L * 2 * Hkv * d), what `keys_values_of` reads."""
    return keys_values.permute(3, 0, 1, 2, 4).flatten(1).contiguous()


def check_flat(where: str, name: str, flat: Tensor, sizes: Dimensions) -> None:
    """Refuse a flat prefix of another base.

    Raises:
        ValueError: it is no matrix with L * 2 * Hkv * d columns, or not of floating point.
    """
    check_float(where, name, flat)
    width = sizes.num_layers * 2 * sizes.num_kv_heads * sizes.head_dim
    if flat.dim() != 2 or flat.shape[1] != width:
        raise ValueError(
            f"{where} was trained on another base: {name} has shape {tuple(flat.shape)}, where this base's "
            f"{sizes.num_layers} layers of {sizes.num_kv_heads} key heads of {sizes.head_dim} need (P, {width})"
        )


def task_of(base: PreTrainedModel, stated: str | None) -> str:
    """The task of an adapter whose file may not say it: by the base's class.

    Raises:
        ValueError: nothing says it.
    """
    if stated is not None:
        return stated
    name = type(base).__name__
    for task in TASKS.values():
        if task.class_suffix is not None and name.endswith(task.class_suffix):
            return task.name
    if sizes_of(backbone_of(base)).decoder_layers and base.can_generate():
        return "SEQ_2_SEQ_LM"
    if backbone_of(base) is base:
        return "FEATURE_EXTRACTION"
    if base.get_output_embeddings() is not None:
        return "CAUSAL_LM"
    raise ValueError(f"task_type must be given: neither the adapter nor the class {name} says what it is for")


def head_tensors(where: str, base: PreTrainedModel, task_type: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a base's head, named as an `Adapter` names them.

    Parts of the head that were not trained are the base's own.

    Args:
        where: what the tensors come from, for messages.
        tensors: named as the base names its parameters, all of them the head's.

    Raises:
        ValueError: a tensor belongs to no head, or a part of the head has other tensors.
    """
    children = own_heads(base) if task_type in HEAD_TASKS else {}
    found: dict[str, Any] = {}
    expected: set[str] = set()
    for name, child in children.items():
        own = {f"{name}.{key}": tensor for key, tensor in child.state_dict().items()}
        is_trained = any(key in tensors for key in own)
        found |= {key: tensors.get(key) for key in own} if is_trained else own
        expected |= set(own)
    unknown, missing = sorted(set(tensors) - expected), sorted(key for key in found if found[key] is None)
    if unknown or missing:
        raise ValueError(
            f"{where} must hold the head of {type(base).__name__} for task_type={task_type!r}, and no other trained "
            f"modules; missing {missing}, unknown {unknown}"
        )
    if children and not tensors:
        warnings.warn(f"{where} holds no head; the one of {type(base).__name__} stays as it is", stacklevel=5)
    return {f"base_heads.{key}": tensor for key, tensor in found.items()}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: the file is missing, damaged or a pickle.
    """
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which could run any code, and is not read; write it anew with "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), ...)"
        )
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    return read_safetensors(path)[1]
