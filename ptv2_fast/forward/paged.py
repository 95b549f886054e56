"""The way of continuous batching: rows one behind the other, whose text transformers keeps in pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ptv2_fast.attention.paged import Pages, layout
from ptv2_fast.attention.prompt_batch import PromptBatch
from ptv2_fast.frozen_base import FrozenBase

# What transformers hands to a model for its own attention, which ours gets as `Pages`.
_OF_PAGES = (
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "read_index", "write_index", "block_table",
    "logits_indices", "logits_processor_args", "is_causal", "attention_mask",
)  # fmt: skip


def run_paged(
    base: FrozenBase,
    run: Callable[..., Any],
    inputs: Mapping[str, Any],
    prompts: Callable[[torch.device], PromptBatch],
    offsets: Sequence[int],
) -> Any:
    """Call a model with each row's prompt beside what its text has in the pages.

    Args:
        run: the model, or its backbone, hooked.
        inputs: what transformers' continuous batching calls a model with: input_ids (1, T), position_ids (1, T),
            cu_seq_lens_q (S + 1,), the pages (`cache`) and their indices, of which read_index and write_index have one
            tensor for each kind of layer.
        prompts: gives those of the S rows.
        offsets: how far each row's positions are shifted.
    """
    ids = inputs["input_ids"]
    bounds = inputs["cu_seq_lens_q"].tolist()
    queries = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    batch = prompts(ids.device)
    positions = inputs["position_ids"] + base.family.first_position(base.backbone)
    if any(offsets):
        shifts = [offset for offset, count in zip(offsets, queries, strict=True) for _ in range(count)]
        positions = positions + torch.tensor(shifts, device=ids.device)
    given = {name: value for name, value in inputs.items() if name not in (*_OF_PAGES, "cache")}
    given["position_ids"] = positions
    # With a mask at hand transformers does not look for packed rows itself, and builds none.
    given["attention_mask"] = torch.ones_like(ids, dtype=torch.bool)
    output = run(**given, ptv2_prompts=batch, ptv2_pages=_pages(inputs, queries, batch))
    base.check_reached(batch)
    return output


def _pages(inputs: Mapping[str, Any], queries: Sequence[int], batch: PromptBatch) -> Pages:
    """How attention writes and reads transformers' pages: each kind of layer in a layout of its own."""
    cache = inputs["cache"]
    allocators = list(cache.cache_allocators.values())
    layouts = []
    for allocator in allocators:
        bounds = inputs["cu_seq_lens_k"][allocator.layer_type].tolist()
        keys = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
        layouts.append(layout(queries, keys, inputs["read_index"][allocator.index], batch))
    of_pages = {name: inputs[name] for name in ("cu_seq_lens_k", "max_length_k", "write_index")}
    of_pages["read_index"] = [one.read_index for one in layouts]

    def update(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        written: tuple[Tensor, Tensor] = cache.update(keys, values, layer, dict(of_pages))
        return written

    kinds = cache.layer_to_allocator
    return Pages(update, [layouts[kinds[layer].index] for layer in range(len(kinds))])
