"""One adapter: its configuration, its prompts and its heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.backbone.sharded_weights import device_of
from ptv2_fast.backbone.view import view_of
from ptv2_fast.config import FEATURE_TASKS, HEAD_TASKS, PTuningV2Config, checked_heads
from ptv2_fast.families.family import Family
from ptv2_fast.families.registry import family_of
from ptv2_fast.heads import Head, at_least_float32, copied_heads, in_own_dtype, labels_of, resize_heads, with_labels
from ptv2_fast.inputs.features import reads_text
from ptv2_fast.inputs.max_length import text_limit
from ptv2_fast.prompts.encoder import PromptEncoder
from ptv2_fast.storage.tensors import check_float
from ptv2_fast.task_types import TASKS
from ptv2_fast.typed_modules import ModuleDictOf

BASE_ROW = "__base__"  # an adapter name that means: this row runs without a prompt


class Adapter(nn.Module):
    """What is trained for one task: a PromptEncoder and heads.

    Attributes:
        config: the adapter's PTuningV2Config.
        encoder: the prompts.
        heads: our heads by name, where `config.heads` asks for them.
        base_heads: trainable copies of the base's own head, where it has one and `config.heads` is
            None.
        labels: names of the classes of `base_heads`, where they are not what the base's configuration says.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        config: PTuningV2Config,
        labels: Sequence[str] | None = None,
        *,
        device: torch.device | str | None = None,
    ):
        """Create the adapter's parameters for `base`.

        Args:
            labels: names of the classes of the copied head, which gets as many outputs; None means the base's own.
            device: None means the base's.

        Raises:
            ValueError: the base and the task do not fit together, or a layer does not exist.
        """
        super().__init__()
        backbone = backbone_of(base)
        family = family_of(backbone)
        sizes = family.sizes(backbone)
        _check_base(base, config)
        self.config = config.on_base(causal=family.causal).settled()
        self.encoder = PromptEncoder(
            config,
            config.resolve_layers(sizes.num_layers, sizes.decoder_layers),
            hidden_size=sizes.hidden_size,
            embedding_size=sizes.embedding_size,
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            std=config.init_std if config.init_std is not None else sizes.initializer_range,
        )
        heads = {name: Head(sizes.output_size, head) for name, head in checked_heads(self.config).items()}
        self.heads: ModuleDictOf[Head] = ModuleDictOf(heads)
        uses_base_head = config.task_type in HEAD_TASKS and not heads
        self.base_heads = copied_heads(base) if uses_base_head else nn.ModuleDict()
        self.labels: tuple[str, ...] | None = None
        if uses_base_head and labels is not None and tuple(labels) != labels_of(base.config):
            self.labels = tuple(labels)
            before = len(labels_of(base.config))
            if len(self.labels) != before:
                resize_heads(self.base_heads, before, len(self.labels))
        at_least_float32(self.to(device_of(backbone) if device is None else device))

    @classmethod
    def from_tensors(
        cls,
        base: PreTrainedModel,
        name: str,
        config: PTuningV2Config,
        tensors: dict[str, Tensor],
        labels: Sequence[str] | None = None,
    ) -> Adapter:
        """An adapter with the given tensors; nothing is allocated before they are known to be what `config` says.

        Raises:
            ValueError: a tensor is missing, unknown, of another shape or no floating point; the message says `name`.
        """
        try:
            with torch.device("meta"):
                expected = cls(base, config, labels, device="meta").state_dict()
        except (RuntimeError, TypeError, OverflowError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"adapter {name!r} has a configuration that no tensors can have: {reason}") from error
        check_tensors(f"adapter {name!r}", expected, tensors)
        adapter = cls(base, config, labels)
        adapter.load_state_dict(tensors)
        return adapter

    def base_with_head(self, base: PreTrainedModel) -> PreTrainedModel:
        """A view of the base with this adapter's copy of its head, and as many classes as that has."""
        attributes: dict[str, Any] = {}
        if self.labels is not None:
            attributes = {"config": with_labels(base.config, self.labels), "num_labels": len(self.labels)}
        heads = {name: in_own_dtype(head, base.dtype) for name, head in self.base_heads.items()}
        return view_of(base, children=heads, attributes=attributes)

    def saved_labels(self, base: PreTrainedModel) -> tuple[str, ...] | None:
        """The names of the copied head's classes; None where there is no such head, or it gives a score alone."""
        if not self.base_heads or TASKS[self.config.task_type].in_groups:
            return None
        return self.labels or labels_of(base.config)

    def head(self, task: str | None) -> Head:
        """The head named `task`; None where there is only one.

        Raises:
            ValueError: the name is unknown, or None is ambiguous.
        """
        names = list(self.heads)
        if task is None and len(names) == 1:
            return self.heads[names[0]]
        if task not in names:
            raise ValueError(f"task must be one of {', '.join(names)}; got {task!r}")
        return self.heads[task]

    def label_names(self) -> dict[int, str]:
        """The names of the classes, by id: of the adapter's single head, else of its copy of the base's."""
        if self.labels is not None:
            return dict(enumerate(self.labels))
        (head,) = self.heads.values()
        return dict(enumerate(head.config.labels or [f"LABEL_{i}" for i in range(head.config.num_labels)]))

    def rename_labels(self, names: Mapping[int, str]) -> None:
        """Give the classes of `label_names` other names; they are saved with the adapter.

        Raises:
            ValueError: there is not one name for every class.
        """
        count = len(self.label_names())
        by_id = {int(i): name for i, name in names.items()} if isinstance(names, Mapping) else {}
        if set(by_id) != set(range(count)):
            raise ValueError(f"id2label must name the head's {count} classes, by ids 0 to {count - 1}; got {names!r}")
        labels = [by_id[i] for i in range(count)]
        if self.labels is not None:
            self.labels = tuple(labels)
            return
        ((task, head),) = self.heads.items()
        head.config = replace(head.config, labels=labels)
        self.config = replace(self.config, heads={task: head.config}).settled()


def language_task(base: PreTrainedModel) -> str | None:
    """The task of the base's own head where it writes text; None where it does not."""
    if not base.can_generate():
        return None
    backbone = backbone_of(base)
    family = family_of(backbone)
    if family.sizes(backbone).decoder_layers:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if family.causal and base.get_output_embeddings() is not None else None


def _check_base(base: PreTrainedModel, config: PTuningV2Config) -> None:
    """Refuse a base that cannot serve the task."""
    name = type(base).__name__
    backbone = backbone_of(base)
    family = family_of(backbone)
    _check_input(name, family, config)
    decodes = family.sizes(backbone).decoder_layers > 0
    if config.injection == "shallow" and not (family.causal or decodes or family.has_shallow_view):
        raise ValueError(f"injection must be 'deep' or 'prefix' on {name}, whose family has no shallow_view")
    has_positions = family.rotary or text_limit(backbone, family) is not None
    offset = None if config.injection == "shallow" else config.position_offset
    if offset and not has_positions:
        raise ValueError(f"position_offset must be None on {name}, which has no positions; got {offset}")
    if config.task_type == "SEQ_2_SEQ_LM":
        if language_task(base) != "SEQ_2_SEQ_LM":
            raise ValueError(
                "base must be an encoder-decoder of type ...ForConditionalGeneration for task_type='SEQ_2_SEQ_LM'; "
                f"got {name}"
            )
    elif decodes and config.reads_encoder:
        if config.prompted_stacks != ("encoder",):
            reader = f"task_type={config.task_type!r}" if config.heads is None else "heads"
            raise ValueError(
                f"stacks must be None or ('encoder',) with {reader} on {name}: the encoder's states are read, and its "
                f"decoder does not run; got {config.stacks}"
            )
    elif decodes and backbone is base and base.can_generate():
        raise ValueError(f"task_type must be 'SEQ_2_SEQ_LM' for {name} without heads; got {config.task_type!r}")
    elif config.task_type == "CAUSAL_LM":
        if language_task(base) != "CAUSAL_LM":
            raise ValueError(f"base must be a causal language model for task_type='CAUSAL_LM'; got {name}")
    elif config.task_type in HEAD_TASKS and config.heads is None:
        suffix = str(TASKS[config.task_type].class_suffix)
        if backbone is base:
            raise ValueError(
                f"heads must be given for task_type={config.task_type!r} on the backbone {name}, which has no head "
                f"of its own; or pass a model of type ...{suffix}"
            )
        if suffix not in name:
            raise ValueError(
                f"base must be of type ...{suffix} for task_type={config.task_type!r} without heads; got {name}, which "
                'takes a head of our own: heads={"name": number of labels}'
            )


def _check_input(name: str, family: Family, config: PTuningV2Config) -> None:
    """Refuse tasks whose rows are not what the base reads, and what only a text has."""
    heads = [head.task_type for head in checked_heads(config).values()]
    if reads_text(family):
        wrong = [task for task in (config.task_type, *heads) if task in FEATURE_TASKS]
        if wrong:
            raise ValueError(f"task_type must be one for texts on {name}, which reads {family.reads}; got {wrong[0]!r}")
        return
    own = next(task for task, reads in FEATURE_TASKS.items() if reads == family.reads)
    if config.task_type not in (own, "FEATURE_EXTRACTION"):
        raise ValueError(
            f"task_type must be {own} or FEATURE_EXTRACTION on {name}, which reads {family.reads}; "
            f"got {config.task_type!r}"
        )
    # A head for every patch or frame suits any backbone.
    wrong = [task for task in heads if task not in (own, "TOKEN_CLS")]
    if wrong:
        raise ValueError(f"heads must be {own} or TOKEN_CLS on {name}, which reads {family.reads}; got {wrong[0]!r}")
    if config.prompt_init == "text":
        raise ValueError(
            f"prompt_init must be 'normal' or 'gated' on {name}, which reads {family.reads} and no text; got 'text'"
        )
    if config.position_offset is not None:
        raise ValueError(
            f"position_offset must be None on {name}, whose positions no call gives; got {config.position_offset}"
        )


def check_tensors(where: str, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not of the names, shapes and kinds that are expected.

    Raises:
        ValueError: see above.
    """
    if set(expected) != set(tensors):
        missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        raise ValueError(f"{where}: tensors missing {missing}, unknown {unknown}")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(f"{where}: {key} must have shape {tuple(expected[key].shape)}; got {tuple(tensor.shape)}")
        if tensor.dtype != expected[key].dtype:
            check_float(where, key, tensor)
