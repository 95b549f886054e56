"""One forward for rows of several tasks: the backbone runs once, and each row is read as its own task reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from ptv2_fast.adapter import BASE_ROW, Adapter
from ptv2_fast.backbone.locate import backbone_of, with_backbone
from ptv2_fast.backbone.view import outside_graphs, view_of
from ptv2_fast.heads import Head
from ptv2_fast.inputs.cache import CACHE, with_cache_name
from ptv2_fast.inputs.features import reads_text
from ptv2_fast.inputs.pooling import pool
from ptv2_fast.model import PTuningV2Model
from ptv2_fast.task_types import TASKS

_TARGETS = ("labels", "start_positions", "end_positions")
# What the rows that write text are called with beside their text: a decoder's head; an encoder-decoder's decoder.
_OF_HEAD = ("logits_to_keep",)
OF_DECODER = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")
# Hooks have seen the backbone run, and may have changed what it gave: they are not asked again.
_NO_HOOKS: Mapping[str, Any] = {
    name: {} for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
}
# What the call of one task knows, and several tasks do not share.
_NOT_SHARED = ("return_loss", "return_dict", "task", "adapter_names", *_TARGETS, *_OF_HEAD, *OF_DECODER)


@dataclass
class MixedOutput(ModelOutput):
    """What a forward gives whose rows have several tasks.

    Attributes:
        loss: always None: one task trains at a time.
        logits: one tensor for each row, of its own task's kind: (N, V) of a row that writes text, in an encoder-decoder
            (M, V) of its decoder's M tokens; (N, C) of tags; (C,) of a class; (N, 2) of a span's start and end; (D,) of
            length 1 of a text's embedding; (N, D) states.
        hidden_states: the backbone's, of all rows, where they are asked for.

    Example:
        ```python
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100))
        model = get_ptv2_model(base, PTuningV2Config("CAUSAL_LM"), "writer")
        topic = HeadConfig("SEQ_CLS", 3, pooling="last")
        model.add_adapter("topics", PTuningV2Config("SEQ_CLS", heads={"topic": topic}))
        output = model.eval()(torch.tensor([[5, 6, 7]] * 2), adapter_names=["writer", "topics"])
        assert [tuple(row.shape) for row in output.logits] == [(3, 100), (3,)]
        ```
    """

    loss: Tensor | None = None
    logits: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def run_mixed(model: PTuningV2Model, tasks: Sequence[str], given: Mapping[str, Any]) -> Any:
    """A forward of rows of several tasks.

    Args:
        tasks: of the rows.
        given: keyword arguments of the call, none of them None.

    Raises:
        ValueError: a loss or a cache is asked for, or tasks that no batch can have together.
    """
    model._check_read(given)
    given = with_cache_name(given)
    names = model._row_names(given["adapter_names"], None)
    check_mixable(model, tasks, names, given.get("task"))
    targets = [name for name in _TARGETS if name in given]
    if targets:
        raise ValueError(f"{', '.join(targets)} must be None with several adapters in one batch: train one at a time")
    if CACHE in given or given.get("use_cache"):
        raise ValueError(
            f"{CACHE} and use_cache must be None with rows of several tasks: generate reads them in its first pass"
        )
    inputs = {name: value for name, value in given.items() if name not in _NOT_SHARED}
    writes = any(TASKS[task].gives == "text" for task in tasks)
    stacks = model._frozen.sizes.decoder_layers > 0
    if writes and stacks and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(given):
        raise ValueError("decoder_input_ids must be given for the rows that write text")
    if writes and stacks:
        _check_decoder_rows(given)
    if writes and not stacks:
        inputs["use_cache"] = False
    output = model._run_states(inputs, given["adapter_names"])
    hidden = output.last_hidden_state
    names = model._row_names(given["adapter_names"], hidden.shape[0])
    rows = results_of_rows(model, names, hidden, inputs.get("attention_mask"), given.get("task"))
    texts = [row for row, result in enumerate(rows) if result is None]
    if texts and stacks:
        logits = _decoder_logits(model, output, texts, given, [names[row] for row in texts])
    elif texts:
        own = {name: given[name] for name in _OF_HEAD if name in given}
        logits = language_logits(model.base_model, output, texts, inputs, own)
    for place, row in enumerate(texts):
        rows[row] = logits[place]
    # Every row has a result by now.
    logits_of_rows = tuple(row for row in rows if row is not None)
    mixed = MixedOutput(logits=logits_of_rows, hidden_states=output.hidden_states)
    return model._as_asked(mixed, given.get("return_dict"))


def check_mixable(model: PTuningV2Model, tasks: Sequence[str], names: Sequence[str], task: str | None) -> None:
    """Refuse tasks that no batch can have together.

    Args:
        task: the name of a head, for adapters with several.

    Raises:
        ValueError: an example of one task is several rows, a row's head is a copy of the base's own, or it has none of
            that name.
    """
    grouped = [task for task in tasks if TASKS[task].in_groups and not TASKS[task].pools_itself]
    if grouped:
        others = ", ".join(task for task in tasks if task not in grouped)
        raise ValueError(
            f"adapter_names must not mix {' and '.join(grouped)}, whose examples are several rows, with other tasks; "
            f"got {others}"
        )
    copied = sorted({name for name in names if name != BASE_ROW and len(model.adapters[name].base_heads)})
    if copied:
        raise ValueError(
            "adapter_names must name one adapter where each has its own copy of the base's head; configure "
            f"heads={{...}} to mix them with other tasks in one batch; got {copied[0]!r} beside others"
        )
    if model._frozen.sizes.decoder_layers:
        decoded = [task for task in tasks if TASKS[task].gives == "states"]
        if any(not model.adapters[name].config.reads_encoder for name in names if name != BASE_ROW and decoded):
            raise ValueError(
                f"adapter_names must not mix {decoded[0]}, which gives the decoder's states, with other tasks; got "
                f"{', '.join(task for task in tasks if task not in decoded)}"
            )
    if BASE_ROW in names and not any(TASKS[task].gives == "text" for task in tasks):
        raise ValueError(f"adapter_names must not hold {BASE_ROW!r} with heads: such a row has no head")
    for name in dict.fromkeys(names):
        if name != BASE_ROW:
            _head_of(model.adapters[name], task)


def results_of_rows(
    model: PTuningV2Model, names: Sequence[str], hidden: Tensor, mask: Any, task: str | None
) -> list[Tensor | None]:
    """What each row's task reads of the backbone's states; None for a row that writes text.

    Each adapter's head reads all rows, as it does alone, so that a result has the same bits.

    Args:
        names: one for each row.
        hidden: (B, N, D).
        mask: what the call has as attention_mask.
        task: the name of a head, for adapters with several.
    """
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 and reads_text(model._family) else None
    adapters = {name: model.adapters[name] for name in names if name != BASE_ROW}
    read = {name: _read(model, adapter, hidden, mask, task) for name, adapter in adapters.items()}
    results: list[Tensor | None] = []
    for row, name in enumerate(names):
        own = read.get(name)
        results.append(None if own is None else own[row])
    return results


def _read(
    model: PTuningV2Model, adapter: Adapter, hidden: Tensor, mask: Tensor | None, task: str | None
) -> Tensor | None:
    """An adapter's result of every row; None where it writes text."""
    kind = TASKS[adapter.config.task_type]
    if kind.gives == "text":
        return None
    head = _head_of(adapter, task)
    if head is not None:
        return head(hidden, mask)
    if kind.pools_itself:
        pooling = adapter.config.pooling or ("last" if model._family.causal else "mean")
        return normalised(pool(hidden, mask, pooling))
    return hidden


def _head_of(adapter: Adapter, task: str | None) -> Head | None:
    """The head that reads an adapter's rows; None where its task needs none.

    Raises:
        ValueError: it has none of the name.
    """
    needed = TASKS[adapter.config.task_type].has_head or task is not None
    return adapter.head(task) if len(adapter.heads) and needed else None


def normalised(pooled: Tensor) -> Tensor:
    """(B, D) vectors made as long as 1; float32, or float64 of such ones."""
    # Lengths of half precision would be too coarse to compare.
    return F.normalize(pooled.to(torch.promote_types(pooled.dtype, torch.float32)), dim=-1)


def language_logits(
    base: PreTrainedModel, output: Any, rows: Sequence[int], inputs: Mapping[str, Any], own: Mapping[str, Any]
) -> Tensor:
    """(R, N, V) what a causal model's own forward makes of some rows of its backbone's output.

    Args:
        output: the backbone's, of all rows.
        rows: R of them.
        inputs: what the backbone was called with.
        own: what the model's forward is called with beside that.
    """
    index = torch.tensor(rows, device=output.last_hidden_state.device)
    chosen = type(output)(last_hidden_state=output.last_hidden_state.index_select(0, index))
    name = "input_ids" if "input_ids" in inputs else "inputs_embeds"
    text = {name: inputs[name].index_select(0, index)}
    logits: Tensor = _with_output(base, chosen)(**text, **own, use_cache=False, return_dict=True).logits
    return logits


def encoded_rows(encoded: Any, rows: Sequence[int]) -> BaseModelOutput:
    """Some rows of an encoder's output, states (B, N, D), as its decoder takes them."""
    last, states = encoded.last_hidden_state, encoded.hidden_states
    index = torch.tensor(rows, device=last.device)
    return BaseModelOutput(
        last_hidden_state=last.index_select(0, index),
        hidden_states=None if states is None else tuple(state.index_select(0, index) for state in states),
    )


def _check_decoder_rows(given: Mapping[str, Any]) -> None:
    """Refuse a decoder's text whose rows are not the encoder's.

    Raises:
        ValueError: see above.
    """
    text = next((name for name in ("input_ids", "inputs_embeds") if name in given), None)
    for name in OF_DECODER:
        if text is not None and name in given and len(given[name]) != len(given[text]):
            raise ValueError(f"{name} must have {len(given[text])} rows, as {text} has; got {len(given[name])}")


def _decoder_logits(
    model: PTuningV2Model, encoded: Any, rows: Sequence[int], given: Mapping[str, Any], names: Sequence[str]
) -> Tensor:
    """(R, M, V) what an encoder-decoder says of the encoder's states of some rows.

    Args:
        encoded: the encoder's output, of all rows.
        given: keyword arguments of the call, for all rows.
        names: the adapters of these rows.
    """
    call = {
        name: given[name][torch.tensor(rows, device=given[name].device)]
        for name in ("attention_mask", *OF_DECODER)
        if name in given
    }
    inputs = {"encoder_outputs": encoded_rows(encoded, rows), **call, "use_cache": False}
    logits: Tensor = model.run(model.base_model, inputs, names).logits
    return logits


@outside_graphs
def _with_output(base: PreTrainedModel, output: Any) -> PreTrainedModel:
    """A view of a model whose backbone has run already: whatever of it the model's forward calls gives `output`."""

    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        return output

    backbone = backbone_of(base)
    # OPT's forward calls the decoder inside its backbone.
    parts = {
        name: view_of(part, forward=forward, attributes=_NO_HOOKS)
        for name, part in backbone.named_children()
        if isinstance(part, PreTrainedModel)
    }
    return with_backbone(base, view_of(backbone, children=parts, forward=forward, attributes=_NO_HOOKS))
