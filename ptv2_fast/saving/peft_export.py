"""Adapters of ours as folders that `peft.PeftModel.from_pretrained` reads; PEFT itself is not needed to write them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptv2_fast.adapter import Adapter
from ptv2_fast.adapter_set import AdapterSet
from ptv2_fast.backbone.at_rest import at_rest
from ptv2_fast.backbone.sharded_weights import weights_owner
from ptv2_fast.families.registry import family_of, sizes_of
from ptv2_fast.inputs.features import reads_text
from ptv2_fast.inputs.sliding_window import smallest_window
from ptv2_fast.prompts.projection import LayerProjections
from ptv2_fast.saving.checkpoint import LABELS_KEY, Part, save_adapters
from ptv2_fast.saving.flat_layout import PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME, flat_of
from ptv2_fast.saving.rotation import turned
from ptv2_fast.task_types import TASKS

# Families whose text, behind a prefix in PEFT, is known to stand at learned positions from P.
_LEARNED = ("bert", "electra", "gpt2", "opt", "roberta", "xlm-roberta")


def save_peft(model: AdapterSet, folder: Path, names: Sequence[str]) -> None:
    """Write adapters of a model so that PEFT gives the logits that they give here: one into the folder itself, several
    into a sub-folder each, all switched at once.

    prefix: as PREFIX_TUNING, a reparameterisation's MLP merged. deep: as the prefix K_p, V_p = the layers' projections
    of the prompts. In PEFT a prefix stands at positions 0..P-1 and the text at P..P+N-1: rotary keys are turned to
    there, learned positions have to be those already (`position_offset=P`).
    shallow: as PROMPT_TUNING, whose outputs have P rows more in PEFT. A causal sequence classifier reads the last slot
    there, padding or not, so its logits are those here for texts without padding only.

    Raises:
        ValueError: PEFT cannot do what an adapter does; nothing is written then.
    """
    with at_rest(model):
        parts = {name: _contents(model, name) for name in names}
    save_adapters(folder, parts, list(model.adapters), weights_name=PEFT_WEIGHTS_NAME, config_name=PEFT_CONFIG_NAME)


def _contents(model: AdapterSet, name: str) -> Part:
    """What stands in `adapter_config.json` and in `adapter_model.safetensors`."""
    adapter = model.adapters[name]
    config, sizes = adapter.config, sizes_of(model.backbone)
    _check(model, name, adapter)
    description: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": model.base_model.config.name_or_path or None,
        "inference_mode": True,
        "modules_to_save": list(adapter.base_heads) or None,
        "num_layers": sizes.encoder_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": config.num_virtual_tokens,
        "revision": None,
        "task_type": config.task_type,
    }
    if config.injection == "shallow":
        prompts = adapter.encoder()
        description |= {
            "num_attention_heads": sizes.num_heads,
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": "RANDOM",
            "token_dim": sizes.embedding_size,
        }
    else:
        prompts = flat_of(_keys_values(model, name))
        width = sizes.num_kv_heads * sizes.head_dim
        description |= {
            "encoder_hidden_size": width,
            "num_attention_heads": sizes.num_kv_heads,
            "peft_type": "PREFIX_TUNING",
            "prefix_projection": False,
            "token_dim": width,
        }
    heads = {f"base_model.{key}": tensor for key, tensor in adapter.base_heads.state_dict().items()}
    tensors = {"prompt_embeddings": prompts, **heads}
    labels = adapter.saved_labels(model.base_model)
    metadata = {} if labels is None else {LABELS_KEY: json.dumps(labels)}
    return Part(json.dumps(description, indent=2, sort_keys=True), tensors, metadata)


def _keys_values(model: AdapterSet, name: str) -> Tensor:
    """(L, 2, Hkv, P, d) float32, with rotary keys where PEFT has the text at P."""
    adapter = model.adapters[name]
    backbone, family = model.backbone, family_of(model.backbone)
    if adapter.config.injection == "prefix":
        made = adapter.encoder().float()  # not by way of the base's dtype: PEFT keeps float32 too
    else:
        projections = LayerProjections(backbone, family, adapter.encoder.layers)
        pairs = projections(adapter.encoder().to(backbone.dtype), "torch")
        made = torch.stack([torch.stack(pair) for pair in pairs]).float()
    by = adapter.config.num_virtual_tokens - adapter.config.text_offset
    if family.rotary and by:
        keys = torch.stack([turned(backbone, family, i, layer[0], by) for i, layer in enumerate(made)])
        made = torch.stack([keys, made[:, 1]], dim=1)
    return made


def _check(model: AdapterSet, name: str, adapter: Adapter) -> None:
    """Refuse what PEFT cannot do.

    Raises:
        ValueError: the message says what it is.
    """
    config, family, kind = adapter.config, family_of(model.backbone), model.backbone.config.model_type
    sizes = sizes_of(model.backbone)
    length, is_shallow = config.num_virtual_tokens, config.injection == "shallow"
    owner = weights_owner((model, model.base_model, model.backbone), family.layers(model.backbone))
    reason = None
    if owner is not None:
        reason = f"its weights come and go ({owner}): load the saved adapter over a whole base"
    elif adapter.heads:
        reason = f"the heads {', '.join(adapter.heads)} are ours, and PEFT trains heads of the base's own class only"
    elif not reads_text(family) or family.own_pooler:
        reason = f"PEFT puts prompts before embeddings or in a cache, and a {kind} takes no embeddings and has no cache"
    elif TASKS[config.task_type].in_groups:
        reason = f"PEFT has no task type for {config.task_type}"
    elif adapter.encoder.gate is not None:
        reason = "prompt_init='gated' trains a bias on the prompt's scores, which PEFT does not have"
    elif sizes.decoder_layers and not is_shallow:
        reason = "PEFT lets layers of an encoder-decoder share a prefix, in the decoder's self-attention alone"
    elif sizes.decoder_layers and config.task_type != "SEQ_2_SEQ_LM":
        reason = f"PEFT runs no {type(model.base_model).__name__} with prompts"
    elif len(adapter.encoder.layers) != sizes.encoder_layers:
        reason = f"only layers {adapter.encoder.layers} have prompts, and PEFT gives every layer one"
    elif is_shallow and config.task_type == "SEQ_CLS" and not family.causal:
        reason = "PEFT's head reads the first virtual token of an encoder, ours the first token of the text"
    elif not is_shallow and kind not in _LEARNED and not (family.rotary and family.causal):
        reason = f"PEFT has no prefix tuning for {kind} models, or none whose positions are known"
    elif not is_shallow and not family.rotary and config.text_offset != length:
        reason = (
            f"PEFT counts the positions of a {kind} model's text from P = {length} behind a prefix, and this adapter "
            f"has position_offset {config.text_offset}; train it with position_offset={length}"
        )
    if reason is not None:
        raise ValueError(f"adapter {name!r} cannot be saved with format='peft': {reason}")
    window = smallest_window(model.backbone)
    if window is not None:
        warnings.warn(
            f"adapter {name!r}: in PEFT the prompt leaves a sliding window of {window} once the text is longer; here "
            "it never does",
            stacklevel=5,
        )
