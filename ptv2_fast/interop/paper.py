"""Checkpoints of the P-Tuning v2 paper's own code as models of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.config import HEAD_TASKS, TASK_TYPES, PTuningV2Config
from ptv2_fast.families.dimensions import Dimensions
from ptv2_fast.families.registry import sizes_of
from ptv2_fast.heads import own_heads
from ptv2_fast.model import PTuningV2Model
from ptv2_fast.saving.flat_layout import PICKLES, check_flat, head_tensors, keys_values_of, read_weights, task_of
from ptv2_fast.storage.tensors import check_float

WEIGHTS_NAME = "model.safetensors"
_EMBEDDING = "prefix_encoder.embedding.weight"
_LAYERS = tuple(f"prefix_encoder.trans.{i}.{part}" for i in (0, 2) for part in ("weight", "bias"))


def from_paper(
    base: PreTrainedModel,
    checkpoint: str | Path | Mapping[str, Tensor],
    *,
    adapter_name: str = "default",
    task_type: str | None = None,
    is_trainable: bool = False,
) -> PTuningV2Model:
    """Run what the P-Tuning v2 paper's code has trained, with the logits that it has there.

    `prefix_encoder.embedding.weight` (P, L * 2 * D), or (P, D) behind it the MLP `prefix_encoder.trans`, becomes
    injection "prefix"; the MLP stays one with `is_trainable` and is merged otherwise. As in that code the text's
    positions count from P (`config.position_offset`). The head comes along: `classifier` or `qa_outputs`; RoBERTa's
    sequence classifier also needs the pooler `roberta.pooler` out of the full state, which is part of transformers'
    head for it. What else a full state holds is the frozen base.

    The hidden dropout that the code applies to keys and values is here `prompt_dropout`, 0 unless set in training.

    Args:
        base: the frozen model, with a head of the checkpoint's task.
        checkpoint: a state dict, a safetensors file, or a folder with a `model.safetensors`.
        adapter_name: what the adapter is called here.
        task_type: what it is for; None reads that off the class of `base`.
        is_trainable: whether it goes on training; otherwise everything is frozen and in eval mode.

    Raises:
        ValueError: nothing to load, a damaged or foreign or pickled file, another base, a head that the base does not
            have, or the code's `--prompt` mode, which runs the text through the embeddings twice.

    Source: P-Tuning v2 (Liu et al., 2022) and the code released with it.

    Example:
        ```python
        import torch
        from transformers import BertConfig, BertForSequenceClassification

        from ptv2_fast import from_paper

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        base = BertForSequenceClassification(BertConfig(**sizes, num_labels=3))
        state = {
            "prefix_encoder.embedding.weight": torch.randn(8, 2 * 2 * 32),  # (P, L * 2 * D)
            "classifier.weight": torch.randn(3, 32),
            "classifier.bias": torch.zeros(3),
        }
        model = from_paper(base, state)  # or the folder of a run
        assert model.ptv2_config["default"].position_offset == 8
        ```
    """
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"base must be a transformers PreTrainedModel; got {type(base).__name__}")
    where, state = _state_of(checkpoint)
    task = task_of(base, task_type)
    if task not in TASK_TYPES:
        raise ValueError(f"task_type must be one of {', '.join(TASK_TYPES)}; got {task!r}")
    if "prefix_encoder.weight" in state:
        raise ValueError(
            f"{where} holds 'prefix_encoder.weight', prompts of the --prompt mode: that mode runs the text through the "
            "embeddings twice, which no prompt here does"
        )
    if _EMBEDDING not in state:
        raise ValueError(f"{where} holds no {_EMBEDDING!r}: it is no checkpoint of the P-Tuning v2 paper's code")
    backbone_prefix = f"{base.base_model_prefix}."
    heads = {}
    if task in HEAD_TASKS:
        heads = {k: t for k, t in state.items() if not k.startswith(("prefix_encoder.", backbone_prefix))}
        heads = head_tensors(where, base, task, _with_pooler(where, base, state, heads))
    config, prompts = _prefix(where, base, state, task, is_trainable)
    adapters = {adapter_name: (config, {**prompts, **heads})}
    return PTuningV2Model.of_adapters(base, adapters, adapter_name, is_trainable=is_trainable)


def _state_of(checkpoint: str | Path | Mapping[str, Tensor]) -> tuple[str, Mapping[str, Tensor]]:
    if isinstance(checkpoint, Mapping):
        return "checkpoint", checkpoint
    path = Path(checkpoint)
    if path.is_dir():
        pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLES)
        weights = path / WEIGHTS_NAME
        path = weights if weights.is_file() or not pickles else pickles[0]
    return str(path), read_weights(path)


def _prefix(
    where: str, base: PreTrainedModel, state: Mapping[str, Tensor], task: str, is_trainable: bool
) -> tuple[PTuningV2Config, dict[str, Tensor]]:
    """Configuration and prompt tensors of an adapter."""
    sizes, embedding = sizes_of(backbone_of(base)), state[_EMBEDDING]
    flat, prompts, width = embedding, None, None
    if any(name in state for name in _LAYERS):
        first, first_bias, second, second_bias = _mlp(where, state, embedding, sizes)
        flat = torch.tanh(embedding @ first.T + first_bias) @ second.T + second_bias
        if is_trainable:
            width = first.shape[0]
            named = {f"encoder.mlp.{name.removeprefix('prefix_encoder.trans.')}": state[name] for name in _LAYERS}
            prompts = {"encoder.embeddings": embedding, **named}
    check_flat(where, "the prefix", flat, sizes)
    length = flat.shape[0]
    config = PTuningV2Config(task, length, injection="prefix", position_offset=length, reparameterization=width)
    return config, prompts or {"encoder.prompts": keys_values_of(flat, sizes)}


def _mlp(where: str, state: Mapping[str, Tensor], embedding: Tensor, sizes: Dimensions) -> list[Tensor]:
    """Weight and bias of the MLP's two layers.

    Raises:
        ValueError: one is missing or not of floating point, or they do not fit.
    """
    missing = [name for name in _LAYERS if name not in state]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    first, first_bias, second, second_bias = parts = [state[name] for name in _LAYERS]
    for name in (_EMBEDDING, *_LAYERS):
        check_float(where, name, state[name])
    fits = embedding.dim() == first.dim() == second.dim() == 2 and embedding.shape[1] == sizes.hidden_size
    fits = fits and first.shape[1] == embedding.shape[1] and second.shape[1] == first.shape[0]
    fits = fits and second.shape[0] == sizes.num_layers * 2 * sizes.num_kv_heads * sizes.head_dim
    if not fits or first_bias.shape != first.shape[:1] or second_bias.shape != second.shape[:1]:
        shapes = ", ".join(str(tuple(part.shape)) for part in (embedding, *parts))
        raise ValueError(
            f"{where} was trained on another base: the MLP must lead from (P, {sizes.hidden_size}) to keys and values; "
            f"got {shapes}"
        )
    return parts


def _with_pooler(
    where: str, base: PreTrainedModel, state: Mapping[str, Tensor], heads: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The head's tensors as transformers' RoBERTa classifier has them: the pooler's layer, then the code's own."""
    names = {f"{name}.{key}" for name, child in own_heads(base).items() for key in child.state_dict()}
    if "classifier.out_proj.weight" not in names or "classifier.weight" not in heads:
        return heads
    pooler = f"{base.base_model_prefix}.pooler.dense."
    if f"{pooler}weight" not in state:
        raise ValueError(
            f"{where} lacks {pooler}weight: {type(base).__name__} has the pooler of the paper's classifier in its "
            "head, so the full state is needed"
        )
    renamed = {key.replace("classifier.", "classifier.out_proj."): tensor for key, tensor in heads.items()}
    return renamed | {f"classifier.dense.{part}": state[pooler + part] for part in ("weight", "bias")}
