"""One adapter: its configuration, its prompts and its heads."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ptv2_fast.config import HEAD_TASKS, PTuningV2Config
from ptv2_fast.heads import Head, copied_heads
from ptv2_fast.models.backbone import backbone_of
from ptv2_fast.models.families import family_of
from ptv2_fast.models.limits import text_limit
from ptv2_fast.prompts.encoder import PromptEncoder

_BASE_SUFFIX = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


class Adapter(nn.Module):
    """What is trained for one task: a PromptEncoder and heads.

    Attributes:
        config: the adapter's PTuningV2Config.
        encoder: the prompts.
        heads: our heads by name, where `config.heads` asks for them.
        base_heads: trainable copies of the base's own head, where it has one and `config.heads` is
            None.
    """

    def __init__(self, base: PreTrainedModel, config: PTuningV2Config):
        """Create the adapter's parameters for `base`, on its device.

        Raises:
            ValueError: the base and the task do not fit together, or a layer does not exist.
        """
        super().__init__()
        backbone = backbone_of(base)
        sizes = family_of(backbone).sizes(backbone)
        _check_base(base, config)
        self.config = config
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
        heads = {name: Head(sizes.output_size, head) for name, head in (config.heads or {}).items()}
        self.heads = nn.ModuleDict(heads)
        uses_base_head = config.task_type in HEAD_TASKS and not heads
        self.base_heads = copied_heads(base) if uses_base_head else nn.ModuleDict()
        self.to(backbone.device)

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


def _check_base(base: PreTrainedModel, config: PTuningV2Config) -> None:
    """Refuse a base that cannot serve the task."""
    name = type(base).__name__
    backbone = backbone_of(base)
    family = family_of(backbone)
    has_positions = family.rotary or text_limit(backbone, family) is not None
    offset = None if config.injection == "shallow" else config.position_offset
    if offset and not has_positions:
        raise ValueError(f"position_offset must be None on {name}, which has no positions; got {offset}")
    decodes = family.sizes(backbone).decoder_layers > 0
    if config.task_type == "SEQ_2_SEQ_LM":
        if not decodes or not base.can_generate():
            raise ValueError(
                "base must be an encoder-decoder of type ...ForConditionalGeneration for task_type='SEQ_2_SEQ_LM'; "
                f"got {name}"
            )
    elif decodes and config.heads is not None:
        raise ValueError(
            f"heads must be None on {name}, whose output is its decoder's; take the encoder alone (T5EncoderModel), or "
            "a model with a head of its own"
        )
    elif decodes and backbone is base and base.can_generate():
        raise ValueError(f"task_type must be 'SEQ_2_SEQ_LM' for {name}; got {config.task_type!r}")
    elif config.task_type == "CAUSAL_LM":
        if not family.causal or base.get_output_embeddings() is None or not base.can_generate():
            raise ValueError(
                f"base must be a causal language model for task_type='CAUSAL_LM'; got {name}"
            )
    elif config.task_type in HEAD_TASKS and config.heads is None:
        suffix = _BASE_SUFFIX[config.task_type]
        if backbone is base:
            raise ValueError(
                f"heads must be given for task_type={config.task_type!r} on the backbone {name}, which has no head "
                f"of its own; or pass a model of type ...{suffix}"
            )
        if suffix not in name:
            raise ValueError(
                f"base must be of type ...{suffix} for task_type={config.task_type!r} without heads; got {name}"
            )
