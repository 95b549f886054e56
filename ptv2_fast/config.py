"""The configuration of one adapter: everything but the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeGuard, cast

from ptv2_fast.choices import BACKENDS, INITS, INJECTIONS, POOLINGS, STACKS
from ptv2_fast.task_types import SINGLE_LABEL, TASKS

TASK_TYPES = tuple(TASKS)
# Tasks with trained heads, those among them that read one vector per row, and those whose rows are images or sounds.
HEAD_TASKS = tuple(name for name, task in TASKS.items() if task.has_head)
ROW_TASKS = tuple(name for name in HEAD_TASKS if TASKS[name].gives == "row")
FEATURE_TASKS = {name: task.reads for name, task in TASKS.items() if task.reads != "input_ids"}

# A prompt longer than this is a mistake far more often than a wish: cartridges use a few thousand
# tokens.
MAX_VIRTUAL_TOKENS = 1 << 17
# Larger initial values are no numbers any more in half precision, and no prompt that could be trained.
MAX_INIT_STD = 1e4
# Positions and sizes beyond are no integers to the device.
_MAX_INTEGER = (1 << 31) - 1
# What can be iterated and holds no names in an order.
_NO_NAMES = (str, bytes, Mapping, set, frozenset)


@dataclass(frozen=True)
class HeadConfig:
    """One trained head on the backbone's output; on an encoder-decoder's encoder.

    Attributes:
        task_type: SEQ_CLS (one vector per row; IMAGE_CLS and AUDIO_CLS where rows are images or sounds), TOKEN_CLS
            (one per token, patch or frame), QUESTION_ANS (start and end logits) or MULTIPLE_CHOICE (one score per row,
            a row for each choice).
        num_labels: number of classes; 2 for QUESTION_ANS (start, end), 1 for MULTIPLE_CHOICE (the score).
        pooling: what a head with one vector per row reads: the row's "first" or "last" real token, or the "mean" of
            its real tokens. None means "last" on causal models, where the first token has seen nothing of the text,
            else "first". An image's first is its class token; IMAGE_CLS and AUDIO_CLS have no "last".
        dropout: dropout before the linear layer, in [0, 1).
        labels: names of the classes in the order of their ids, or None.
        problem_type: what a head with one vector per row solves, in transformers' words: "single_label_classification"
            (the default; labels (B,)), "regression" (labels (B,) for one number a row, else (B, num_labels), floating;
            mean squared error) or "multi_label_classification" (labels (B, num_labels), floating in [0, 1]; binary
            cross-entropy).

    Raises:
        ValueError: a value is unknown or two values contradict each other; the message names the field.

    Example:
        ```python
        from ptv2_fast import HeadConfig, PTuningV2Config

        topic = HeadConfig("SEQ_CLS", 3, labels=["sports", "politics", "science"])
        stars = HeadConfig("SEQ_CLS", 1, pooling="mean", problem_type="regression")
        config = PTuningV2Config("SEQ_CLS", heads={"topic": topic, "stars": stars})
        assert config.heads["topic"].labels[2] == "science"
        ```
    """

    task_type: str
    num_labels: int
    pooling: str | None = None
    dropout: float = 0.0
    labels: Sequence[str] | None = None
    problem_type: str = SINGLE_LABEL

    def __post_init__(self) -> None:
        _one_of("task_type", self.task_type, HEAD_TASKS)
        _integer("num_labels", self.num_labels, 1, _MAX_INTEGER)
        if self.pooling is not None:
            _one_of("pooling", self.pooling, POOLINGS)
        _probability("dropout", self.dropout)
        TASKS[self.task_type].solving(self.problem_type)
        if self.labels is not None:
            ordered = isinstance(self.labels, Iterable) and not isinstance(self.labels, _NO_NAMES)
            object.__setattr__(self, "labels", tuple(self.labels) if ordered else self.labels)
            named = ordered and all(isinstance(label, str) for label in self.labels)
            if not named or len(self.labels) != self.num_labels or len(set(self.labels)) != self.num_labels:
                raise ValueError(f"labels must be {self.num_labels} distinct names; got {self.labels!r}")
        if self.task_type in FEATURE_TASKS and self.pooling == "last":
            raise ValueError(f"pooling must be 'first' or 'mean' for {self.task_type}; got 'last'")
        if self.task_type == "QUESTION_ANS" and self.num_labels != 2:
            raise ValueError(f"num_labels must be 2 for QUESTION_ANS (start, end); got {self.num_labels}")
        if TASKS[self.task_type].in_groups and self.num_labels != 1:
            raise ValueError(f"num_labels must be 1 for {self.task_type} (a row's score); got {self.num_labels}")


@dataclass
class PTuningV2Config:
    """How prompts are injected into a frozen model, and what is trained on top.

    Attributes:
        task_type: SEQ_CLS, TOKEN_CLS, QUESTION_ANS, MULTIPLE_CHOICE, CAUSAL_LM, SEQ_2_SEQ_LM, FEATURE_EXTRACTION,
            SENTENCE_RETRIEVAL, IMAGE_CLS or AUDIO_CLS.
        num_virtual_tokens: P, the length of the prompt.
        injection: "deep" (a trained hidden state per layer and token), "shallow" (one at the
            embeddings, evolving through the layers) or "prefix" (trained keys and values per
            layer).
        layers: which layers get prompts, as indices (negative ones count from the end); None means
            all. Not for "shallow". They count inside each of the `stacks`.
        prompt_init: "text" (what the frozen model itself computes for a given text), "normal", or
            "gated" ("normal" plus a trained bias on the prompt's scores that starts so low that the
            prompt starts as a no-op). None means "text" where a text and a tokenizer are given,
            else "normal".
        prompt_dropout: dropout on the prompt's elements while training, in [0, 1).
        reparameterization: hidden size of the MLP that makes the prompts from P embeddings, or None
            for trained prompts. Not for "shallow".
        heads: trained heads on a backbone, name -> number of labels or HeadConfig (or its dict).
            None where the base brings its own head or needs none.
        position_offset: added to the position of every text token. None means the injection's own:
            0 for "deep" and "prefix", P for "shallow". P with "prefix" is what PEFT and the paper's
            code do on BERT-like models. In an encoder-decoder it shifts the texts of the `stacks`.
        backend: which backend of `prompt_attention` serves the model.
        init_std: standard deviation of "normal" initialisation; None means the model's own
            initializer_range.
        pooling: what SENTENCE_RETRIEVAL makes its vectors of: a row's "first" or "last" real token, or the "mean".
            None means "last" on causal models, else "mean". Heads have their own.
        stacks: which attention of an encoder-decoder gets prompts, out of "encoder" and "decoder" (their
            self-attention) and "cross" (the decoder's look at the encoder's states); None means encoder and
            decoder, and the encoder alone where its states are read (`reads_encoder`). Not for "shallow", whose
            virtual tokens stand in front of the encoder's text.

    Raises:
        ValueError: a value is unknown or two values contradict each other; the message names the field.

    Example:
        ```python
        from ptv2_fast import PTuningV2Config

        config = PTuningV2Config("SEQ_CLS", num_virtual_tokens=8, injection="prefix", heads={"topic": 4})
        assert config.heads["topic"].num_labels == 4
        assert PTuningV2Config.from_dict(config.to_dict()) == config
        ```
    """

    task_type: str
    num_virtual_tokens: int = 20
    injection: str = "deep"
    layers: Sequence[int] | None = None
    prompt_init: str | None = None
    prompt_dropout: float = 0.0
    reparameterization: int | None = None
    heads: Mapping[str, int | HeadConfig | Mapping[str, Any]] | None = None
    position_offset: int | None = None
    backend: str = "auto"
    init_std: float | None = field(default=None)
    stacks: Sequence[str] | None = None
    pooling: str | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """As everywhere; of an adapter's own configuration `backend` alone can be set.

        Raises:
            ValueError: the adapter was made with the old value, and would be saved with the new one.
        """
        if "_settled" in self.__dict__ and name != "backend":
            raise ValueError(
                f"{name} must stay what the adapter was made with, {getattr(self, name, None)!r}: add_adapter makes "
                f"another one; got {value!r}"
            )
        super().__setattr__(name, value)

    def settled(self) -> PTuningV2Config:
        """A copy for an adapter's own: what it was made with does not change any more, whoever goes on with `self`."""
        copied = copy.deepcopy(self)
        copied.__dict__["_settled"] = True
        return copied

    def on_base(self, *, causal: bool) -> PTuningV2Config:
        """A copy whose heads say what they read; `causal`: a token of the base sees only those before it."""
        heads = {}
        for name, head in checked_heads(self).items():
            default = "last" if causal and head.task_type not in FEATURE_TASKS else "first"
            heads[name] = replace(head, pooling=head.pooling or default)
        return replace(self, heads=heads or None)

    def __post_init__(self) -> None:
        _one_of("task_type", self.task_type, TASK_TYPES)
        _integer("num_virtual_tokens", self.num_virtual_tokens, 1, MAX_VIRTUAL_TOKENS)
        _one_of("injection", self.injection, INJECTIONS)
        if self.prompt_init is not None:
            _one_of("prompt_init", self.prompt_init, INITS)
        _probability("prompt_dropout", self.prompt_dropout)
        _one_of("backend", self.backend, BACKENDS)
        if self.position_offset is not None:
            _integer("position_offset", self.position_offset, 0, _MAX_INTEGER)
        if self.reparameterization is not None:
            _integer("reparameterization", self.reparameterization, 1, _MAX_INTEGER)
        if self.init_std is not None and not (_is_number(self.init_std) and 0 < self.init_std <= MAX_INIT_STD):
            raise ValueError(
                f"init_std must be a positive number of at most {MAX_INIT_STD:g}, or None; got {self.init_std!r}"
            )
        if self.pooling is not None:
            if not TASKS[self.task_type].pools_itself:
                raise ValueError(f"pooling must be None for {self.task_type}: heads have it; got {self.pooling!r}")
            _one_of("pooling", self.pooling, POOLINGS)
        self._check_injection()
        self._check_layers()
        self._check_stacks()
        self._check_heads()

    def _check_injection(self) -> None:
        if self.injection == "shallow":
            for name in ("layers", "stacks", "reparameterization"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} must be None with injection='shallow'; got {getattr(self, name)!r}")
            if self.position_offset not in (None, self.num_virtual_tokens):
                raise ValueError(
                    "position_offset must be None or num_virtual_tokens with injection='shallow', whose virtual "
                    f"tokens take positions; got {self.position_offset}"
                )
            if self.prompt_init == "gated":
                raise ValueError("prompt_init must be 'text' or 'normal' with injection='shallow'; got 'gated'")
        if self.prompt_init == "text" and self.reparameterization is not None:
            raise ValueError(
                "prompt_init must be 'normal' or 'gated' with reparameterization: an MLP's output cannot be "
                "set to given states; got 'text'"
            )

    def _check_layers(self) -> None:
        if self.layers is None:
            return
        if isinstance(self.layers, (str, bytes)) or not isinstance(self.layers, Sequence):
            raise ValueError(f"layers must be a sequence of integers or None; got {self.layers!r}")
        for layer in self.layers:
            _integer("layers", layer, None)
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers must name at least one layer, none of them twice; got {self.layers!r}")
        self.layers = tuple(self.layers)

    def _check_stacks(self) -> None:
        if self.stacks is None:
            return
        is_sequence = isinstance(self.stacks, Sequence) and not isinstance(self.stacks, (str, bytes))
        named = is_sequence and all(isinstance(stack, str) for stack in self.stacks)
        if not named or not self.stacks or len(set(self.stacks)) != len(self.stacks):
            raise ValueError(f"stacks must be a sequence of distinct names or None; got {self.stacks!r}")
        for stack in self.stacks:
            _one_of("stacks", stack, STACKS)
        self.stacks = tuple(stack for stack in STACKS if stack in self.stacks)

    def _check_heads(self) -> None:
        if self.heads is None:
            return
        if not isinstance(self.heads, Mapping) or not self.heads:
            raise ValueError(f"heads must be a non-empty mapping of names or None; got {self.heads!r}")
        if TASKS[self.task_type].gives == "text":
            raise ValueError(f"heads must be None with task_type={self.task_type!r}: the model's own head is used")
        if TASKS[self.task_type].pools_itself:
            raise ValueError(f"heads must be None with task_type={self.task_type!r}: its pooled states are its output")
        self.heads = head_configs(self.task_type, self.heads)
        from torch import nn  # what only describes an adapter does not wait for it

        for name in self.heads:
            # A ModuleDict cannot hold a module under the name of an attribute of its own.
            if hasattr(nn.ModuleDict(), name):
                raise ValueError(f"heads must not be named like an attribute of torch.nn.ModuleDict; got {name!r}")

    def resolve_layers(self, num_layers: int, decoder_layers: int = 0) -> tuple[int, ...]:
        """The prompted layers of a model with `num_layers` layers, sorted, all non-negative.

        Args:
            decoder_layers: in an encoder-decoder, whose layers are the encoder's, then the decoder's self-attention,
                then its cross-attention: the number of the last two. 0 elsewhere.

        Raises:
            ValueError: a layer does not exist, or there are no stacks to choose from.
        """
        if not decoder_layers:
            if self.stacks is not None:
                raise ValueError(f"stacks must be None on a base that is no encoder-decoder; got {self.stacks}")
            return self._counted(num_layers)
        sizes = dict(zip(STACKS, (num_layers - 2 * decoder_layers, decoder_layers, decoder_layers), strict=True))
        found, start = [], 0
        for stack, size in sizes.items():
            if stack in self.prompted_stacks:
                found += [start + layer for layer in self._counted(size)]
            start += size
        return tuple(found)

    def _counted(self, num_layers: int) -> tuple[int, ...]:
        """The prompted ones of `num_layers` layers."""
        if self.layers is None:
            return tuple(range(num_layers))
        for layer in self.layers:
            if not -num_layers <= layer < num_layers:
                raise ValueError(f"layers must lie in [{-num_layers}, {num_layers - 1}] for this model; got {layer}")
        resolved = {layer % num_layers for layer in self.layers}
        if len(resolved) != len(self.layers):
            raise ValueError(f"layers names a layer twice for {num_layers} layers; got {self.layers!r}")
        return tuple(sorted(resolved))

    @property
    def reads_encoder(self) -> bool:
        """Whether the states of an encoder-decoder's encoder are what is read there: by heads, or pooled."""
        return self.heads is not None or TASKS[self.task_type].pools_itself

    @property
    def prompted_stacks(self) -> tuple[str, ...]:
        """The stacks of an encoder-decoder that have prompts; "encoder" where virtual tokens stand before its text."""
        if self.stacks is not None:
            return tuple(self.stacks)
        return ("encoder",) if self.injection == "shallow" or self.reads_encoder else ("encoder", "decoder")

    @property
    def text_offset(self) -> int:
        """How far the text's positions are shifted."""
        if self.position_offset is not None:
            return self.position_offset
        return self.num_virtual_tokens if self.injection == "shallow" else 0

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of plain JSON values, which `from_dict` reads."""
        values = asdict(self)
        for name in ("layers", "stacks"):
            value = getattr(self, name)
            values[name] = list(value) if value is not None else None
        # What needs no later version says nothing that an earlier one does not read.
        if self.pooling is None:
            del values["pooling"]
        for head in (values["heads"] or {}).values():
            if head["problem_type"] == SINGLE_LABEL:
                del head["problem_type"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PTuningV2Config:
        """Build a configuration from `to_dict`'s output.

        Raises:
            ValueError: a key is unknown, `task_type` is missing, or a value is refused.
        """
        known = {f.name for f in fields(cls)}
        unknown = set(values) - known
        if unknown:
            raise ValueError(f"unknown configuration keys {sorted(unknown)}; known are {sorted(known)}")
        if "task_type" not in values:
            raise ValueError("the configuration lacks task_type")
        return cls(**values)


def checked_heads(config: PTuningV2Config) -> Mapping[str, HeadConfig]:
    """The heads that a configuration asks for, as its own checks have made them."""
    return cast("Mapping[str, HeadConfig]", config.heads or {})


def head_configs(task_type: str, heads: Mapping[str, Any]) -> dict[str, HeadConfig]:
    """The heads of an adapter, name -> HeadConfig, from what `PTuningV2Config.heads` may be; torch is not needed.

    Raises:
        ValueError: a name or a head is not as expected.
    """
    found = {}
    for name, head in heads.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"heads must have identifiers as names; got {name!r}")
        if isinstance(head, Mapping):
            unknown = set(head) - {f.name for f in fields(HeadConfig)}
            if unknown:
                raise ValueError(f"heads[{name!r}] has unknown keys {sorted(map(str, unknown))}")
            if "num_labels" not in head:
                raise ValueError(f"heads[{name!r}] lacks num_labels; got {dict(head)!r}")
            head = HeadConfig(**{"task_type": task_type, **head})
        elif not isinstance(head, HeadConfig):
            _integer(f"heads[{name!r}]", head, 1, _MAX_INTEGER)
            if task_type not in HEAD_TASKS:
                raise ValueError(
                    f"heads[{name!r}] must be a HeadConfig where task_type={task_type!r} does not say "
                    f"what kind of head it is; got {head!r}"
                )
            head = HeadConfig(task_type, head)
        found[name] = head
    return found


def _one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _integer(name: str, value: Any, low: int | None, high: int | None = None) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits or (low is not None and value < low) or (high is not None and value > high):
        limits = "" if low is None else f" of at least {low}" + ("" if high is None else f", at most {high}")
        raise ValueError(f"{name} must be an integer{limits}; got {value!r}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _probability(name: str, value: object) -> None:
    if not _is_number(value) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1); got {value!r}")
