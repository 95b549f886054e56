"""PEFT's prompt learning adapters as models of ours: PEFT itself is not needed to read its files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.backbone.view import view_of
from ptv2_fast.config import TASK_TYPES, PTuningV2Config
from ptv2_fast.families.registry import family_of, sizes_of
from ptv2_fast.model import PTuningV2Model
from ptv2_fast.saving.checkpoint import Saved, read_labels
from ptv2_fast.saving.flat_layout import (
    PEFT_CONFIG_NAME,
    PEFT_WEIGHTS_NAME,
    check_flat,
    head_tensors,
    keys_values_of,
    read_weights,
    task_of,
)
from ptv2_fast.storage.files import locked
from ptv2_fast.storage.tensors import check_float, read_json

_PICKLE_NAME = "adapter_model.bin"
_PREFIX = ("PREFIX_TUNING", "CARTRIDGE")
_SHALLOW = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
# In PEFT's files a module of the base stands under this name.
_OF_BASE = "base_model."

Parts = tuple[PTuningV2Config, dict[str, Tensor]]


@dataclass(frozen=True)
class _Source:
    """One PEFT adapter, from a folder or from a PeftModel.

    Attributes:
        where: what it is called in messages.
        config: what `adapter_config.json` holds.
        tensors: what `adapter_model.safetensors` holds.
        mlp: the embeddings' and the MLP's tensors that still make the prefix, named as a PromptEncoder names them.
        labels: names of the head's classes, where the file was written here.
    """

    where: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    mlp: dict[str, Tensor] | None = None
    labels: tuple[str, ...] | None = None

    @property
    def peft_type(self) -> str:
        return str(self.config.get("peft_type"))

    @property
    def length(self) -> int:
        return self.config["num_virtual_tokens"]

    def tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ValueError(f"{self.where} lacks the tensor {name!r}; it has {sorted(self.tensors)}")
        check_float(self.where, name, self.tensors[name])
        return self.tensors[name]


def from_peft(
    model: Any,
    folder: str | Path | None = None,
    *,
    adapter_name: str | None = None,
    task_type: str | None = None,
    task_id: int | None = None,
    is_trainable: bool = False,
) -> PTuningV2Model:
    """Run a PEFT prompt learning adapter here, with the logits that it has in PEFT.

    PREFIX_TUNING and CARTRIDGE become injection "prefix", PROMPT_TUNING, P_TUNING and MULTITASK_PROMPT_TUNING become
    "shallow", and a trained head comes along; parts of the head that were not trained are the base's own. Prompts that
    PEFT makes by an MLP or an LSTM are taken as what it makes, as PEFT's own files have them; only the MLP of
    prefix_projection, which is the `reparameterization` here, goes on training where it still is there: in a PeftModel
    that is not in inference mode, with `is_trainable=True` and heads that add up to the hidden size.

    PEFT counts the text's positions from P behind a prefix too; `config.position_offset` is P to keep that. On an
    encoder-decoder a prefix is the decoder's, and prompt tuning the encoder's; the MLP of a prefix there is merged.

    The logits are those of PEFT wherever PEFT gives a row what it gives that row alone. Where it does not, they are the
    row's own: PEFT counts padding on the left as positions (except in OPT, and in RoBERTa's prefix tuning); a causal
    sequence classifier with a prompt (not a prefix) reads the last slot even if that is padding; an encoder's reads the
    first virtual token instead of the row's first token, so that its head has to be trained again here (a warning says
    so); a model with sliding windows loses its prompt there. Token labels and answer spans have the N places of the
    text, not P + N.

    Args:
        model: a PeftModel, whose base is taken over, or the base of the adapter in `folder`, a PreTrainedModel.
        folder: what `PeftModel.save_pretrained` wrote.
        adapter_name: the adapter of a PeftModel to take; None takes all of them. With a folder, the name that its
            adapter gets ("default").
        task_type: what the adapter is for, where its configuration does not say.
        task_id: which task of a MULTITASK_PROMPT_TUNING adapter to take; None makes an adapter `<name>_<task>` of each
            where there are several.
        is_trainable: whether the active adapter goes on training; otherwise everything is frozen and in eval mode.

    Returns:
        The model of the adapter's task.

    Raises:
        ValueError: nothing to load, a damaged or foreign or pickled file, another kind of adapter, another base; the
            message names the file or the tensor.

    Source: PEFT 0.21, `peft_model.py` and the encoders under `tuners/`.

    Example:
        ```python
        from transformers import BertConfig, BertForSequenceClassification

        from ptv2_fast import PTuningV2Config, from_peft, get_ptv2_model

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        base = BertForSequenceClassification(BertConfig(**sizes, num_labels=3))
        config = PTuningV2Config("SEQ_CLS", 8, injection="prefix", position_offset=8)  # as PEFT counts
        get_ptv2_model(base, config).save_pretrained("adapter", format="peft")  # what PEFT writes too

        model = from_peft(base, "adapter", is_trainable=True)
        assert model.ptv2_config["default"].injection == "prefix"
        ```
    """
    if isinstance(model, PreTrainedModel):
        if folder is None:
            raise ValueError("folder must be given with a base: it holds the PEFT adapter")
        active = "default" if adapter_name is None else adapter_name
        base, sources = model, {active: _read(Path(folder))}
    elif all(hasattr(model, name) for name in ("peft_config", "get_base_model", "active_adapter")):
        if folder is not None:
            raise ValueError(f"folder must be None with a PeftModel, which brings its adapters; got {folder!r}")
        active = model.active_adapter if adapter_name is None else adapter_name
        sources = _held_by(model, adapter_name, is_trainable)
        base = _without_wrappers(model.get_base_model())
    else:
        raise ValueError(f"model must be a PeftModel or a transformers PreTrainedModel; got {type(model).__name__}")
    adapters: dict[str, Saved] = {}
    for name, source in sources.items():
        parts = _adapters(name, source, base, task_type, task_id)
        made = {own: Saved(*part, source.labels) for own, part in parts.items()}
        if name == active:
            active = next(iter(made))
        adapters |= made
    if is_trainable and any(source.config.get("num_frozen_tokens") for source in sources.values()):
        warnings.warn("the tokens that PEFT's CARTRIDGE keeps frozen train with the others here", stacklevel=2)
    return PTuningV2Model.of_adapters(base, adapters, active, is_trainable=is_trainable)


def _read(folder: Path) -> _Source:
    """The adapter of a folder."""
    if not folder.is_dir():
        raise ValueError(f"adapter folder {folder} does not exist")
    path = folder / PEFT_CONFIG_NAME
    with locked(folder, shared=True):
        if not path.is_file():
            raise ValueError(f"{folder} holds no {PEFT_CONFIG_NAME}: it is not a PEFT adapter folder")
        config = read_json(path, path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError(f"{path} must hold an object; got {type(config).__name__}")
        _check_config(str(path), config)
        weights = folder / PEFT_WEIGHTS_NAME
        if not weights.is_file() and (folder / _PICKLE_NAME).is_file():
            weights = folder / _PICKLE_NAME
        return _Source(str(folder), config, read_weights(weights), labels=read_labels(weights))


def _check_config(where: str, config: Mapping[str, Any]) -> None:
    """Refuse what is no prompt learning adapter that can be read."""
    kind = config.get("peft_type")
    if kind not in _PREFIX + _SHALLOW:
        raise ValueError(
            f"{where} describes a {kind} adapter; from_peft reads {', '.join(_PREFIX + _SHALLOW)}. Adapters that "
            "change the base's own weights, such as LoRA, can be merged into the base before it is wrapped"
        )
    length = config.get("num_virtual_tokens")
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"{where} must have an integer num_virtual_tokens of at least 1; got {length!r}")


def _held_by(model: Any, adapter_name: str | None, is_trainable: bool) -> dict[str, _Source]:
    """The adapters of a PeftModel, as its `save_pretrained` would write them."""
    names = list(model.peft_config) if adapter_name is None else [adapter_name]
    sources = {}
    for name in names:
        if name not in model.peft_config:
            raise ValueError(f"adapter_name must be one of {', '.join(model.peft_config)}; got {name!r}")
        config = {key: getattr(value, "value", value) for key, value in model.peft_config[name].to_dict().items()}
        where = f"adapter {name!r} of the PeftModel"
        _check_config(where, config)
        encoder = model.prompt_encoder[name]
        tensors = {"prompt_embeddings": _made_by(model, encoder, name, config)}
        for part in ("prefix_task_cols", "prefix_task_rows"):
            if hasattr(encoder, part):
                tensors[part] = getattr(encoder, part).detach()
        for path, module in model.get_base_model().named_modules():
            if _is_wrapper(module) and name in module.modules_to_save:
                state = module.modules_to_save[name].state_dict()
                tensors |= {f"{_OF_BASE}{path}.{key}": tensor for key, tensor in state.items()}
        keeps_mlp = is_trainable and hasattr(encoder, "transform")
        mlp = None
        if keeps_mlp and config["token_dim"] == sizes_of(backbone_of(model.get_base_model())).hidden_size:
            mlp = {"encoder.embeddings": encoder.embedding.weight.detach()}
            mlp |= {f"encoder.mlp.{key}": tensor for key, tensor in encoder.transform.state_dict().items()}
        sources[name] = _Source(where, config, tensors, mlp)
    return sources


@torch.no_grad()
def _made_by(model: Any, encoder: nn.Module, name: str, config: Mapping[str, Any]) -> Tensor:
    """What a PEFT encoder makes; in inference mode PEFT has no MLP or LSTM left and reads the embeddings themselves."""
    if config["inference_mode"]:
        return encoder.embedding.weight.detach()
    was_training = encoder.training
    encoder.eval()  # the LSTM has a dropout
    try:
        return model.get_prompt_embedding_to_save(name).detach()
    finally:
        encoder.train(was_training)


def _is_wrapper(module: nn.Module) -> bool:
    """Whether a module is PEFT's wrapper around one that trains beside the prompt."""
    return hasattr(module, "modules_to_save") and hasattr(module, "original_module")


def _without_wrappers(base: PreTrainedModel) -> PreTrainedModel:
    """A view of the base of a PeftModel with its own head; the PeftModel keeps what it has."""
    children = {name: child.original_module for name, child in base.named_children() if _is_wrapper(child)}
    return view_of(base, children=children) if children else base


def _adapters(
    name: str, source: _Source, base: PreTrainedModel, task_type: str | None, task_id: int | None
) -> dict[str, Parts]:
    """Configuration and tensors of each adapter of ours that a PEFT adapter becomes."""
    stated = source.config.get("task_type")
    task = task_of(base, stated if stated is not None else task_type)
    if task not in TASK_TYPES:
        raise ValueError(f"{source.where} must be for one of {', '.join(TASK_TYPES)}; got task_type {task!r}")
    own = ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")
    others = {key: tensor for key, tensor in source.tensors.items() if key not in own}
    foreign = sorted(key for key in others if not key.startswith(_OF_BASE))
    if foreign:
        raise ValueError(f"{source.where} holds unknown tensors {foreign}")
    named = {key.removeprefix(_OF_BASE): tensor for key, tensor in others.items()}
    heads = head_tensors(source.where, base, task, named)
    decodes = sizes_of(backbone_of(base)).decoder_layers > 0
    if decodes and (task != "SEQ_2_SEQ_LM" or source.peft_type == "MULTITASK_PROMPT_TUNING"):
        raise ValueError(
            f"{source.where} must be for SEQ_2_SEQ_LM and without virtual tokens in front of the decoder's text to run "
            f"on {type(base).__name__}; got a {source.peft_type} adapter for {task}"
        )
    if source.peft_type in _PREFIX:
        return {name: _decoder_prefix(source, base) if decodes else _prefix(source, base, task, heads)}
    if source.peft_type != "MULTITASK_PROMPT_TUNING":
        prompts = source.tensor("prompt_embeddings")
        if decodes and prompts.shape[0] == 2 * source.length:
            prompts = prompts[: source.length]  # PEFT keeps as many for a decoder, and reads them nowhere
        return {name: _shallow(source, base, task, heads, prompts)}
    by_task = _prompts_of_tasks(source)
    if task_id is None and len(by_task) == 1:
        task_id = 0
    if task_id is not None:
        if not 0 <= task_id < len(by_task):
            raise ValueError(f"task_id must be one of the adapter's {len(by_task)} tasks; got {task_id!r}")
        return {name: _shallow(source, base, task, heads, by_task[task_id])}
    return {f"{name}_{i}": _shallow(source, base, task, heads, prompt) for i, prompt in enumerate(by_task)}


def _prefix(source: _Source, base: PreTrainedModel, task: str, heads: dict[str, Tensor]) -> Parts:
    """A prefix adapter of ours, its text's positions shifted as PEFT shifts them."""
    sizes, flat = sizes_of(backbone_of(base)), source.tensor("prompt_embeddings")
    check_flat(source.where, "prompt_embeddings", flat, sizes)
    here = {"num_layers": sizes.num_layers, "num_attention_heads": sizes.num_kv_heads}
    for key, value in here.items():
        if source.config.get(key) not in (None, value):
            raise ValueError(
                f"{source.where} was trained on another base: {key} {source.config[key]!r} (this base: {value})"
            )
    _check_length(source, flat)
    width = None if source.mlp is None else source.mlp["encoder.mlp.0.weight"].shape[0]
    config = PTuningV2Config(
        task, source.length, injection="prefix", position_offset=source.length, reparameterization=width
    )
    prompts = source.mlp or {"encoder.prompts": keys_values_of(flat, sizes)}
    return config, {**prompts, **heads}


def _decoder_prefix(source: _Source, base: PreTrainedModel) -> Parts:
    """A prefix adapter of ours on an encoder-decoder: PEFT's prefix is in the decoder's self-attention alone.

    Of its L pairs of keys and values PEFT gives every second one, counted around, to the decoder's layers: it cuts two
    copies of them into pieces of self- and cross-attention, and drops what is for the latter.
    """
    backbone, flat = backbone_of(base), source.tensor("prompt_embeddings")
    sizes = sizes_of(backbone)
    if family_of(backbone).relative_positions:
        raise ValueError(
            f"{source.where} cannot run on {type(base).__name__} as it does in PEFT: a prefix there stands right "
            "before the decoder's text, whose scores have a bias for the distance; here it would stand far in front"
        )
    width = 2 * sizes.num_kv_heads * sizes.head_dim
    pairs = flat.shape[-1] // width
    if flat.dim() != 2 or flat.shape[1] % width or pairs < sizes.decoder_layers:
        raise ValueError(
            f"{source.where} was trained on another base: prompt_embeddings has shape {tuple(flat.shape)}, where this "
            f"base's {sizes.decoder_layers} decoder layers need (P, {width} for each of them, or more)"
        )
    _check_length(source, flat)
    made = keys_values_of(flat, replace(sizes, num_layers=pairs, decoder_layers=0))
    chosen = [2 * layer % pairs for layer in range(sizes.decoder_layers)]
    config = PTuningV2Config(
        "SEQ_2_SEQ_LM", source.length, injection="prefix", stacks=("decoder",), position_offset=source.length
    )
    return config, {"encoder.prompts": made[chosen]}


def _shallow(source: _Source, base: PreTrainedModel, task: str, heads: dict[str, Tensor], prompts: Tensor) -> Parts:
    """A shallow adapter of ours."""
    width = sizes_of(backbone_of(base)).embedding_size
    if prompts.dim() != 2 or prompts.shape[1] != width:
        raise ValueError(
            f"{source.where} was trained on another base: prompt_embeddings has shape {tuple(prompts.shape)}, where "
            f"this base's word embeddings need (P, {width})"
        )
    _check_length(source, prompts)
    if task == "SEQ_CLS" and not family_of(backbone_of(base)).causal:
        warnings.warn(
            f"{source.where}: PEFT's head reads the first virtual token of an encoder, ours the first token of the "
            "text; its logits differ, train the head again",
            stacklevel=4,
        )
    return PTuningV2Config(task, source.length, injection="shallow"), {"encoder.prompts": prompts, **heads}


def _check_length(source: _Source, prompts: Tensor) -> None:
    if prompts.shape[0] != source.length:
        raise ValueError(
            f"{source.where} must hold prompts of num_virtual_tokens {source.length}; got {prompts.shape[0]} rows"
        )


def _prompts_of_tasks(source: _Source) -> list[Tensor]:
    """Each task's prompt (P, E): the shared one, scaled element by element by the task's matrix of low rank."""
    shared, columns, rows = (
        source.tensor(name) for name in ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")
    )
    fits = columns.dim() == rows.dim() == 3 and columns.shape[0] == rows.shape[0] and columns.shape[2] == rows.shape[1]
    if not fits or (columns.shape[1], rows.shape[2]) != tuple(shared.shape):
        raise ValueError(
            f"{source.where} must hold prefix_task_cols (T, P, r) and prefix_task_rows (T, r, D) that fit "
            f"prompt_embeddings {tuple(shared.shape)}; got {tuple(columns.shape)} and {tuple(rows.shape)}"
        )
    return list((shared * (columns @ rows)).unbind(0))
