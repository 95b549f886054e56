"""Padded texts and what is written for them, in sizes that repeat: how steps of encoder-decoders are captured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ptv2_fast.losses import IGNORED_LABEL
from ptv2_fast.step.host_batch import Array
from ptv2_fast.step.packed import Buckets

# What such a batch is made of; anything else runs eagerly.
PADDED_INPUTS = ("input_ids", "attention_mask", "decoder_input_ids", "labels")
# Of an encoder's slot, and of a decoder's, that the batch does not have.
_FILLING = {"input_ids": 0, "attention_mask": 0, "decoder_input_ids": 0, "labels": IGNORED_LABEL}


class PaddedSizes(NamedTuple):
    """B rows of N tokens, and of M tokens that are written."""

    rows: int
    tokens: int
    written: int


@dataclass(frozen=True)
class PaddedBatch:
    """Rows of texts and what is written for them, padded.

    Attributes:
        input_ids: (B, N) the encoder's text, and attention_mask (B, N), 0 where there is none.
        decoder_input_ids: (B, M), which no later token changes.
        labels: (B, M), -100 where there is none.
    """

    input_ids: Tensor
    attention_mask: Tensor
    decoder_input_ids: Tensor
    labels: Tensor

    @property
    def sizes(self) -> PaddedSizes:
        """Two batches of the same sizes run the same kernels."""
        rows, tokens = self.input_ids.shape
        return PaddedSizes(rows, tokens, self.labels.shape[1])

    def to(self, device: torch.device) -> PaddedBatch:
        """On another device."""
        return replace(self, **{name: value.to(device) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass
class HostPadded:
    """A padded batch on the host, (B, N) and (B, M) arrays by the names of a `PaddedBatch`."""

    arrays: Mapping[str, Array]

    @property
    def sizes(self) -> PaddedSizes:
        """Those of the batch itself."""
        rows, tokens = self.arrays["input_ids"].shape
        return PaddedSizes(rows, tokens, self.arrays["labels"].shape[1])

    def filled(self, buckets: Buckets, limit: int | None) -> PaddedSizes:
        """Those that it is filled up to, for a model whose texts have at most `limit` tokens; rows are as they are."""
        rows, tokens, written = self.sizes
        return PaddedSizes(rows, buckets.slots_of(tokens, limit), buckets.slots_of(written, limit))

    def write(self, sizes: PaddedSizes, places: Mapping[str, Array]) -> None:
        """Write the batch, with slots of no text behind its own.

        Args:
            sizes: at least its own.
            places: an array of one dimension for each tensor of a `PaddedBatch` of these sizes.
        """
        for name, own in self.arrays.items():
            place = places[name].reshape(sizes.rows, -1)
            place[:, : own.shape[1]] = own
            place[:, own.shape[1] :] = _FILLING[name]

    def packed(self, sizes: PaddedSizes | None = None) -> PaddedBatch:
        """The batch of these sizes, its own by default, in memory of its own."""
        sizes = self.sizes if sizes is None else sizes
        widths = {"input_ids": sizes.tokens, "attention_mask": sizes.tokens}
        places = {name: np.empty((sizes.rows, widths.get(name, sizes.written)), np.int64) for name in self.arrays}
        self.write(sizes, {name: place.reshape(-1) for name, place in places.items()})
        return PaddedBatch(**{name: torch.from_numpy(place) for name, place in places.items()})


def pad(batch: Mapping[str, Any]) -> HostPadded:
    """A batch on the CPU, whose decoder's inputs are known.

    Raises:
        ValueError: `why_not_padded` says why.
    """
    if reason := why_not_padded(batch):
        raise ValueError(reason)
    mask = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask != 0
    tensors = {**{name: batch[name] for name in PADDED_INPUTS if name != "attention_mask"}, "attention_mask": mask}
    return HostPadded({name: tensors[name].numpy() for name in PADDED_INPUTS})


def why_not_padded(batch: Mapping[str, Any]) -> str | None:
    """Why a call's arguments are no texts (B, N) with labels (B, M); None where they are. Looks at no number."""
    known = {name: batch[name] for name in PADDED_INPUTS if batch.get(name) is not None}
    for name in ("input_ids", "decoder_input_ids", "labels"):
        if not isinstance(known.get(name), Tensor):
            return f"the batch has no {name}"
    ids, labels = known["input_ids"], known["labels"]
    if ids.dim() != 2 or labels.dim() != 2 or ids.shape[0] != labels.shape[0] or not ids.numel() * labels.numel():
        return f"labels must have shape ({ids.shape[0]}, M); got {tuple(labels.shape)} for a text {tuple(ids.shape)}"
    for name, value in known.items():
        like = ids if name in ("input_ids", "attention_mask") else labels
        if not isinstance(value, Tensor) or value.shape != like.shape:
            return f"{name} must have shape {tuple(like.shape)}; got {tuple(getattr(value, 'shape', ()))}"
        if name != "attention_mask" and (value.is_floating_point() or value.dtype == torch.bool):
            return f"{name} must be integers; got {value.dtype}"
    return None
