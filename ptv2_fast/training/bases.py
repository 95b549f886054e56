"""Bases: from a hub name, a folder or a GGUF file to a model and its tokenizer."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ptv2_fast.families.registry import families
from ptv2_fast.inputs.features import reads_text
from ptv2_fast.task_types import TASKS
from ptv2_fast.training.locating import locate, not_loaded

# What the families call the dropout of hidden states.
_DROPOUTS = ("hidden_dropout_prob", "resid_pdrop", "embd_pdrop")


def load_base(
    name: str | Path,
    task_type: str,
    *,
    own_head: bool = False,
    num_labels: int | None = None,
    dropout: float | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A float32 model and its tokenizer.

    Args:
        name: a name on the hub, a folder, or a .gguf file.
        task_type: CAUSAL_LM loads a language model; the others the backbone, or with `own_head` the
            transformers model that has a head for the task.
        own_head: see task_type.
        num_labels: outputs of that head; None means as the base's configuration says.
        dropout: of the base's hidden states while training; None keeps the model's own.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: transformers cannot load it, and the message is its own, in one line; or there is no tokenizer.
    """
    source, options = locate(name)
    row = TASKS[task_type]
    kind = row.auto_class if own_head or row.gives == "text" else "AutoModel"
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if num_labels is not None and config.num_labels != num_labels:
            config.num_labels = num_labels
        family = families().get(config.model_type)
        if family is not None and not reads_text(family):
            raise ValueError(f"it reads {family.reads}; the command line and ptv2_fast.training serve texts")
        for key in _DROPOUTS if dropout is not None else ():
            if hasattr(config, key):
                setattr(config, key, dropout)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        loader = getattr(transformers, kind)
        base = loader.from_pretrained(source, config=config, dtype=torch.float32, **options)
    except Exception as error:  # a damaged file makes transformers and its parts raise anything
        raise not_loaded(name, error) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"model {str(name)!r} must come with its tokenizer's files; there are none that hold words")
    if options:
        # The weights are plain floats once loaded; the flag would make Trainer refuse to train on them.
        base.is_quantized = False
    base.config.name_or_path = str(Path(source, *options.values()))
    return base.eval(), tokenizer


def digest_of_weights(base: PreTrainedModel) -> str:
    """A digest of a base's weights on the CPU, in which any change of a number shows.

    Poolers are left out: no head here reads one, and where a model's file has none it is drawn anew by each load.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(base.state_dict().items()):
        if "pooler" not in name.split("."):
            content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {zlib.crc32(content)}\n".encode())
    return digest.hexdigest()


def head_size(name: str | Path, task_type: str, shapes: Mapping[str, Sequence[int]]) -> int | None:
    """How many outputs a saved copy of a base's head has; None where no tensor tells.

    Args:
        shapes: of the saved tensors, by their names in the adapter file ("base_heads.classifier.bias").
    """
    source, options = locate(name)
    try:
        config = AutoConfig.from_pretrained(source, **options)
        # A number that no other size of the model is: the tensors that have it are the outputs'.
        config.num_labels = mark = 7919
        with torch.device("meta"):
            model = getattr(transformers, TASKS[task_type].auto_class).from_config(config)
    except (OSError, ValueError, KeyError, ImportError):
        return None
    outputs = (f"base_heads.{key}" for key, tensor in model.named_parameters() if tensor.shape[0] == mark)
    return next((shapes[key][0] for key in outputs if key in shapes), None)
