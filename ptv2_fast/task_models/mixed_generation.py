"""`generate` of a batch in which some rows write text and others want a class or tags, of one pass over all texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from ptv2_fast.adapter import BASE_ROW
from ptv2_fast.inputs.cache import CACHE, cached_tokens
from ptv2_fast.model import PTuningV2Model
from ptv2_fast.step.slot_cache import SlotCache
from ptv2_fast.task_models.mixed_rows import (
    OF_DECODER,
    check_mixable,
    encoded_rows,
    language_logits,
    results_of_rows,
)
from ptv2_fast.task_types import TASKS

# What `generate` takes with a row for each text.
_BY_ROW = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds")
_TEXTS = ("input_ids", "inputs_embeds")


@dataclass
class MixedGeneration(ModelOutput):
    """What `generate` gives for rows of several tasks.

    Attributes:
        sequences: (R, L) what the rows have that write text, as `generate` gives it for those alone.
        rows: which rows of the batch those are, in order; (R,) int64, on the CPU. Several returned sequences follow one
            another.
        logits: one for each of the B rows, None where it writes text; otherwise as `MixedOutput` has them.
        generated: all that `generate` gives, where return_dict_in_generate asks for more.

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
        output = model.eval().generate(
            torch.tensor([[5, 6, 7]] * 2), adapter_names=["topics", "writer"], max_new_tokens=4, eos_token_id=None
        )
        assert output.sequences.shape == (1, 7) and output.rows.tolist() == [1]
        assert output.logits[0].shape == (3,) and output.logits[1] is None
        ```
    """

    sequences: Tensor | None = None
    rows: Tensor | None = None
    logits: tuple[Tensor | None, ...] | None = None
    generated: Any = None


def generate_mixed(
    model: PTuningV2Model,
    generate: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    adapter_names: Sequence[str],
) -> MixedGeneration:
    """Run `generate` for the rows that write text; the first pass over their texts reads the others' too.

    In an encoder-decoder that pass is the encoder's, whose states are handed on. Where it has another form (a cache
    that is not made of whole rows, or one that is filled already; a text that is read in chunks; drafts), the others'
    texts have a pass of their own.

    Args:
        model: as the class that writes text.
        generate: its `generate` of rows that all do.
        args, kwargs: of the call.
        adapter_names: one for each row.

    Raises:
        ValueError: the rows are not of a batch, or tasks that no batch can have together.
    """
    call = _named(args, kwargs)
    batch = {name: call.pop(name) for name in (*_BY_ROW, *OF_DECODER) if call.get(name) is not None}
    if not set(_TEXTS) & set(batch):
        raise ValueError("input_ids must be given with rows of several tasks; got none")
    rows = next(iter(batch.values())).shape[0]
    uneven = [name for name, value in batch.items() if value.shape[0] != rows]
    if uneven or len(adapter_names) != rows:
        what = uneven[0] if uneven else "adapter_names"
        found = batch[what].shape[0] if uneven else len(adapter_names)
        raise ValueError(f"{what} must have {rows} rows, as {next(iter(batch))} has; got {found}")
    if "attention_mask" not in batch and (mask := _inferred_mask(model, batch, call)) is not None:
        batch["attention_mask"] = mask
    names = list(model._row_names(adapter_names, rows))
    tasks = {row: _task_of(model, name) for row, name in enumerate(names)}
    writers = [row for row in range(rows) if TASKS[tasks[row]].gives == "text"]
    others = [row for row in range(rows) if row not in writers]
    check_mixable(model, list(dict.fromkeys(tasks.values())), names, call.get("task"))

    def part(of: Sequence[int]) -> dict[str, Any]:
        return {name: value[torch.tensor(of, device=value.device)] for name, value in batch.items()}

    task, of_writers = call.pop("task", None), [names[row] for row in writers]
    if model._frozen.sizes.decoder_layers:
        if call.get("encoder_outputs") is not None:
            raise ValueError("encoder_outputs must be None with rows of several tasks: the encoder reads all of them")
        config = call.get("generation_config") or model.generation_config
        states = call.get("output_hidden_states", getattr(config, "output_hidden_states", None))
        with torch.no_grad():
            encoded = model._run_states({**_without(batch, OF_DECODER), "output_hidden_states": states}, names)
        every = results_of_rows(model, names, encoded.last_hidden_state, batch.get("attention_mask"), task)
        results = [every[row] for row in others]
        call["encoder_outputs"] = encoded_rows(encoded, writers)
        written = generate(**part(writers), **call, adapter_names=of_writers)
    else:
        beside = _Beside(model, part(others), [names[row] for row in others], task)
        written = generate(**part(writers), **call, adapter_names=of_writers, first_pass=beside)
        results = beside.results()
    sequences = written if isinstance(written, Tensor) else written.sequences
    copies = sequences.shape[0] // len(writers)
    logits: list[Tensor | None] = [None] * rows
    for row, result in zip(others, results, strict=True):
        logits[row] = result
    return MixedGeneration(
        sequences=sequences,
        rows=torch.tensor(writers).repeat_interleave(copies),
        logits=tuple(logits),
        generated=None if isinstance(written, Tensor) else written,
    )


def _named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` by name, the text as input_ids.

    Raises:
        ValueError: the text is given twice.
    """
    call = dict(kwargs)
    if len(args) > 1:
        raise ValueError(f"generate must have one positional argument, the text, with several tasks; got {len(args)}")
    for text in (*args, call.pop("inputs", None)):
        if text is None:
            continue
        if call.get("input_ids") is not None:
            raise ValueError("input_ids must be given once; got inputs too")
        call["input_ids"] = text
    return call


def _inferred_mask(model: PTuningV2Model, batch: Mapping[str, Any], call: Mapping[str, Any]) -> Tensor | None:
    """The mask (B, N) that `generate` reads off the padding id of the text where it is given none; None without one."""
    config = call.get("generation_config") or model.generation_config
    padding, ends = (
        getattr(config, name, None) if call.get(name) is None else call[name]
        for name in ("pad_token_id", "eos_token_id")
    )
    if padding is None or "input_ids" not in batch or int(padding) in torch.as_tensor([] if ends is None else ends):
        return None
    real = batch["input_ids"].ne(int(padding))
    return None if bool(real.all()) else real.long()


def _without(inputs: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}


def _task_of(model: PTuningV2Model, name: str) -> str:
    return str(model.task_type) if name == BASE_ROW else model.adapters[name].config.task_type


class _Beside:
    """Rows that want no text, beside the first pass of `generate`, which asks this before it runs the model itself."""

    def __init__(self, model: PTuningV2Model, inputs: Mapping[str, Any], names: Sequence[str], task: str | None):
        self._model, self._inputs, self._names, self._task = model, inputs, names, task
        self._found: list[Tensor | None] | None = None

    @torch.no_grad()
    def results(self) -> list[Tensor | None]:
        """One for each row; of a pass of their own where no other one had a place for them."""
        if self._found is None:
            inputs = {**self._inputs, "use_cache": False}
            return self._read(self._model.run(self._model.backbone, inputs, self._names).last_hidden_state)
        return self._found

    def __call__(self, model: PTuningV2Model, names: Sequence[str], inputs: Mapping[str, Any]) -> Any:
        """The output of the first pass over the rows that write text, with these rows in the same batch.

        Args:
            model: the one that the passes of this `generate` run.
            names: of the rows that write text; each stands for as many as there turn out to be.
            inputs: what `generate` calls the model with.

        Returns:
            None where the rows have no place in this pass.
        """
        joined = None if self._found is not None else self._joined(inputs)
        if joined is None:
            return None
        count = joined[_text_of(joined)].shape[0] - len(self._names)
        every = [name for name in names for _ in range(count // len(names))]
        output = model.run(model.backbone, joined, [*every, *self._names])
        self._found = self._read(output.last_hidden_state[count:])
        own = {"logits_to_keep": inputs["logits_to_keep"]} if "logits_to_keep" in inputs else {}
        logits = language_logits(model.base_model, output, range(count), joined, own)
        cache, states = inputs[CACHE], output.hidden_states
        cache.batch_select_indices(torch.arange(count, device=logits.device))
        states = None if states is None else tuple(state[:count] for state in states)
        return CausalLMOutputWithPast(logits=logits, hidden_states=states, **{CACHE: cache})

    def _joined(self, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The keyword arguments of a pass over all rows; None where they do not go together."""
        if type(inputs.get(CACHE)) not in (DynamicCache, SlotCache) or cached_tokens(inputs):
            return None
        given = {name: value for name, value in inputs.items() if value is not None and name != "logits_to_keep"}
        others = dict(self._inputs)
        text = _text_of(given)
        if text not in others or given[text].shape[1:] != others[text].shape[1:]:
            return None
        if {"attention_mask"} & (set(given) | set(others)):
            for rows in (given, others):
                rows.setdefault("attention_mask", torch.ones(rows[text].shape[:2], device=rows[text].device))
        if "position_ids" not in others:
            # Those that `generate` counts are the ones that a model counts off the mask.
            given.pop("position_ids", None)
        by_row = [name for name in _BY_ROW if name in given]
        if any((name in others) != (name in given) for name in _BY_ROW if name not in _TEXTS):
            return None
        if any(isinstance(value, Tensor) and value.dim() > 1 for name, value in given.items() if name not in by_row):
            return None
        return {**given, **{name: torch.cat([given[name], others[name].to(given[name].dtype)]) for name in by_row}}

    def _read(self, hidden: Tensor) -> list[Tensor | None]:
        return results_of_rows(self._model, self._names, hidden, self._inputs.get("attention_mask"), self._task)


def _text_of(inputs: Mapping[str, Any]) -> str:
    return "inputs_embeds" if inputs.get("inputs_embeds") is not None else "input_ids"
