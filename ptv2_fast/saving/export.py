"""Trained prompts as plain tensors, for servers and code that know nothing of this package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ptv2_fast.adapter_set import AdapterSet
from ptv2_fast.attention.prompt_batch import LayerPrompt, LazyPrompt
from ptv2_fast.backbone.at_rest import at_rest
from ptv2_fast.backbone.sharded_weights import is_sharded
from ptv2_fast.choices import EXPORTS as FORMATS
from ptv2_fast.prompts.placement import is_inline
from ptv2_fast.saving.checkpoint import describe
from ptv2_fast.storage.files import write_whole
from ptv2_fast.storage.tensors import read_metadata, write_tensors

_AT_HAND = (
    "model must have its weights at hand to be exported; got a sharded or offloaded one: load the saved adapter over a "
    "whole base"
)


def prompt_tensors(model: AdapterSet, what: str, adapter_name: str | None = None) -> dict[str, Tensor]:
    """An adapter's prompts as plain tensors on the CPU.

    Args:
        model: a PTuningV2Model.
        what: "kv": `layers.{i}.key` and `layers.{i}.value`, (Hkv, P, d) for every prompted layer, as attention reads
            them: projected, normalised and rotated to positions -P..-1 where the family is rotary; `layers.{i}.bias`
            (H, P), to be added to their scores, where there is a gate or a term for distances. Reparameterisation is
            merged. "embeddings": `prompt_embeddings` (P, D), to be put in front of the text's own embeddings.
        adapter_name: None means the active adapter.

    Raises:
        ValueError: the adapter is unknown, or its prompts cannot be written that way.

    Example:
        ```python
        from transformers import LlamaConfig, LlamaForCausalLM

        from ptv2_fast import PTuningV2Config, get_ptv2_model
        from ptv2_fast.export import prompt_tensors

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100))
        model = get_ptv2_model(base, PTuningV2Config("CAUSAL_LM", 5, injection="shallow"))
        assert prompt_tensors(model, "embeddings")["prompt_embeddings"].shape == (5, 32)
        ```
    """
    name = model.active_adapter if adapter_name is None else adapter_name
    model._check_name(name)
    model._follow_backbone()
    adapter = model.adapters[name]
    config = adapter.config
    if what not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {what!r}")
    if what == "embeddings" and config.injection != "shallow":
        raise ValueError(
            f"format 'embeddings' needs injection 'shallow'; adapter {name!r} has {config.injection!r}, whose prompts "
            "are not inputs of the model"
        )
    if what == "kv" and is_inline(config, model._family):
        raise ValueError(
            f"format 'kv' needs prompts that do not see the text; adapter {name!r} is shallow on a bidirectional model"
        )
    if any(is_sharded(tensor) for tensor in adapter.state_dict().values()):
        raise ValueError(_AT_HAND)
    with at_rest(model):
        if what == "embeddings":
            return {"prompt_embeddings": _plain(adapter.encoder())}
        return _keys_and_values(model._source(name)("torch"))


def _keys_and_values(prompts: Sequence[LayerPrompt | LazyPrompt | None]) -> dict[str, Tensor]:
    tensors = {}
    for layer, prompt in enumerate(prompts):
        if prompt is None:
            continue
        if isinstance(prompt, LazyPrompt):
            raise ValueError(_AT_HAND)
        tensors[f"layers.{layer}.key"] = _plain(prompt.keys)
        tensors[f"layers.{layer}.value"] = _plain(prompt.values)
        if prompt.bias is not None:
            tensors[f"layers.{layer}.bias"] = _plain(prompt.bias)
    return tensors


def export_prompts(model: AdapterSet, path: str | Path, what: str = "kv", adapter_name: str | None = None) -> None:
    """Write `prompt_tensors` as a safetensors file whose metadata describes the adapter and its base.

    An earlier export is replaced, nothing else is.

    Args:
        model: a PTuningV2Model.
        path: the file; its folder is made where it does not exist.
        what: "kv" or "embeddings", as `prompt_tensors` says.
        adapter_name: None means the active adapter.

    Raises:
        ValueError: as `prompt_tensors`, or `path` is there and no earlier export, or cannot be in its folder.

    Example:
        ```python
        from safetensors.torch import load_file
        from transformers import LlamaConfig, LlamaForCausalLM

        from ptv2_fast import PTuningV2Config, get_ptv2_model
        from ptv2_fast.export import export_prompts

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        model = get_ptv2_model(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100)), PTuningV2Config("CAUSAL_LM", 5))
        export_prompts(model, "prompts.safetensors")
        assert load_file("prompts.safetensors")["layers.1.key"].shape == (2, 5, 16)
        ```
    """
    path = Path(path)
    _check_free(path)
    name = model.active_adapter if adapter_name is None else adapter_name
    tensors = prompt_tensors(model, what, adapter_name)
    description = describe(name, model.adapters[name].config, model.base_model)
    metadata = {"content": what, "ptv2": json.dumps(description)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: write_tensors(file, tensors, metadata))


def _check_free(path: Path) -> None:
    """Refuse a path whose file an export must not replace."""
    if path.is_dir():
        raise ValueError(f"path must name a file; {path} is a folder")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"path must name a file in a folder; {above} is a file")
    if not path.exists():
        return
    try:
        is_export = path.is_file() and {"content", "ptv2"} <= set(read_metadata(path))
    except ValueError:
        is_export = False
    if not is_export:
        raise ValueError(f"path must be free or an earlier export; {path} is something else and is not overwritten")


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous()
