"""What there is to know of an adapter folder or a model without loading weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ptv2_fast.storage.names import CONFIG_NAME, WEIGHTS_NAME
from ptv2_fast.task_types import SINGLE_LABEL
from ptv2_fast.training.described import config_in, read_description
from ptv2_fast.training.locating import check_base, locate, not_loaded
from ptv2_fast.training.plain_configs import plain_facts, stored_parameters
from ptv2_fast.training.shell import quiet


def facts_of(name: str) -> list[dict[str, Any]]:
    """Facts by name, one dictionary for each adapter of a folder, or one for a model.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file is damaged, or the model is of no supported family.
    """
    folder = Path(name)
    if (folder / CONFIG_NAME).is_file() or (folder / WEIGHTS_NAME).is_file():
        return [_adapter_facts(folder)]
    below = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    return [_adapter_facts(path) for path in below] or [_model_facts(name)]


def _adapter_facts(folder: Path) -> dict[str, Any]:
    description = read_description(folder)
    config, base = description["config"], description["base"]
    try:
        config_in(config)
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS_NAME} holds an unusable configuration: {error}") from error
    sizes = _tensor_sizes(folder / WEIGHTS_NAME)
    heads = {name: _head_facts(head) for name, head in (config.get("heads") or {}).items()}
    return {
        "adapter": str(folder),
        "name": description.get("adapter_name"),
        "format_version": description.get("format_version"),
        "task_type": config.get("task_type"),
        "injection": config.get("injection"),
        "num_virtual_tokens": config.get("num_virtual_tokens"),
        "layers": config.get("layers") or "all",
        "trained_parameters": sum(sizes.values()),
        "prompt_parameters": sum(size for key, size in sizes.items() if key.startswith("encoder.")),
        "heads": heads,
        **({"pooling": config["pooling"]} if config.get("pooling") else {}),
        "base": base,
    }


def _head_facts(head: Any) -> dict[str, Any]:
    """What a configuration says of a head, which may be its number of labels alone."""
    said = head if isinstance(head, dict) else {"num_labels": head}
    facts = {key: said.get(key) for key in ("task_type", "num_labels", "labels", "pooling")}
    return {**facts, "problem_type": said.get("problem_type", SINGLE_LABEL)}


def _tensor_sizes(path: Path) -> dict[str, int]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {key: math.prod(file.get_slice(key).get_shape()) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _model_facts(name: str) -> dict[str, Any]:
    """What prompts for a model cost; the parameters that its files hold, or those of the backbone."""
    source, options = locate(name)
    check_base(name)
    plain = None if options else plain_facts(Path(source))
    if plain is None:
        facts, counted = _built_facts(name, source, options)
    else:
        facts, counted = plain, {"stored_parameters": stored_parameters(Path(source))}
    embedding = facts.pop("embedding_size")
    keys_and_values = 2 * facts["num_layers"] * facts["num_kv_heads"] * facts["head_dim"]
    cost = {"deep": facts["num_layers"] * facts["hidden_size"], "shallow": embedding, "prefix": keys_and_values}
    known = {key: value for key, value in counted.items() if value is not None}
    return {"model": name, **facts, **known, "parameters_per_virtual_token": cost}


def _built_facts(name: str, source: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of any model, which is built without its weights."""
    quiet()
    import torch
    from transformers import AutoConfig, AutoModel

    from ptv2_fast.families.registry import family_of, sizes_of

    try:
        config = AutoConfig.from_pretrained(source, **options)
        with torch.device("meta"):
            backbone = AutoModel.from_config(config)
    except Exception as error:  # a damaged file makes transformers and its parts raise anything
        raise not_loaded(name, error) from error
    family, sizes = family_of(backbone), sizes_of(backbone)
    facts = {
        "model_type": config.model_type,
        "reads": family.reads,
        "causal": family.causal,
        "num_layers": sizes.num_layers,
        "hidden_size": sizes.hidden_size,
        "num_heads": sizes.num_heads,
        "num_kv_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "embedding_size": sizes.embedding_size,
    }
    return facts, {"backbone_parameters": sum(p.numel() for p in backbone.parameters())}
