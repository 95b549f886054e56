"""Attention over a text whose keys somebody keeps in pages: rows of any two lengths, and no mask over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import torch
from torch import Tensor

from ptv2_fast.attention.layer import layer_attention
from ptv2_fast.attention.prompt_batch import LayerPrompt, PromptBatch

# Writes a layer's keys and values (1, Hkv, T, d), and reads all those that its rows have, (1, Hkv, K, d), in the order
# of `Layout.read_index`; they are the arguments, with the layer's number in front.
Update = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class RowGroup:
    """Neighbouring rows that one call of attention serves.

    Attributes:
        queries, keys: where their T' queries stand among all, and their keys.
        batch: which prompt each has; its boundaries, where the rows are packed.
        rows: how many they are, of equally many queries each and of M keys with padding in front; None where they are
            packed, each with as many keys as queries.
        key_mask: (rows, M) bool, false at padding; None where there is none.
    """

    queries: slice
    keys: slice
    batch: PromptBatch
    rows: int | None = None
    key_mask: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """How layers that keep the same part of the text read it.

    Attributes:
        groups: of all rows, in their order.
        read_index: (K,) which places of the pages are read: the rows' own, with padding where a group needs it.
    """

    groups: tuple[RowGroup, ...]
    read_index: Tensor


def layout(queries: Sequence[int], keys: Sequence[int], read_index: Tensor, batch: PromptBatch) -> Layout:
    """Group rows so that few calls of attention serve them, and none reads another row's keys.

    Rows with one query are one dense batch, their keys padded in front; rows without anything in the pages yet are
    packed; a part of a text behind other parts of it stands alone; rows without a query are left out.

    Args:
        queries, keys: how many tokens each of S rows has, and how many it sees, what is in the pages among them.
        read_index: (sum of keys,) integers, row by row; empty where no row has anything in the pages.
        batch: of these S rows.
    """
    device = read_index.device
    first_query, first_key = [0, *accumulate(queries)], [0, *accumulate(keys)]
    groups, parts, place = [], [], 0
    for rows in _neighbours(queries, keys, bool(read_index.numel())):
        begin, end = rows.start, rows.stop
        own = slice(first_query[begin], first_query[end])
        prompts = replace(batch, index=None if batch.index is None else batch.index[begin:end])
        part, mask, count = read_index[first_key[begin] : first_key[end]], None, None
        if queries[begin] == keys[begin] and (queries[begin] > 1 or not read_index.numel()):
            size = first_key[end] - first_key[begin]
            bounds = torch.tensor(first_query[begin : end + 1], dtype=torch.int32, device=device) - first_query[begin]
            prompts = replace(prompts, cu_seqlens=bounds, max_seqlen=max(queries[begin:end]))
        else:
            count, longest = end - begin, max(keys[begin:end])
            size = count * longest
            if len(set(keys[begin:end])) > 1:
                part, mask = _padded(part, keys[begin:end], longest)
        groups.append(RowGroup(own, slice(place, place + size), prompts, count, mask))
        parts.append(part)
        place += size
    return Layout(tuple(groups), torch.cat(parts) if len(parts) > 1 else parts[0])


def _neighbours(queries: Sequence[int], keys: Sequence[int], reads: bool) -> list[range]:
    """Runs of rows that are served together."""

    def kind(row: int) -> int:
        if queries[row] == 0:
            return -3
        if not reads:
            return -1
        if queries[row] == 1:
            return -2
        return -1 if queries[row] == keys[row] else row

    runs = (list(run) for of, run in groupby(range(len(queries)), kind) if of != -3)
    return [range(run[0], run[-1] + 1) for run in runs]


def _padded(index: Tensor, lengths: Sequence[int], longest: int) -> tuple[Tensor, Tensor]:
    """The places of rows of several lengths, (rows * longest,), with place 0 in front of the shorter ones; and which
    are the rows' own, (rows, longest) bool. What stands at place 0 is hidden: it may be anything."""
    sizes = torch.tensor(lengths, device=index.device)[:, None]
    mask = torch.arange(longest, device=index.device) >= longest - sizes
    return index.new_zeros(mask.shape).masked_scatter_(mask, index).flatten(), mask


@dataclass(frozen=True)
class Pages:
    """The text's keys and values in pages, for one forward; given to the model as the keyword argument `ptv2_pages`.

    Attributes:
        update: writes and reads them.
        layouts: how each layer reads them.
    """

    update: Update
    layouts: Sequence[Layout]

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prompt: LayerPrompt,
        *,
        scale: float | None,
        dropout_p: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """(1, T, H, D): each row's queries see its prompt, and its own text up to their places.

        Args:
            q, k, v: (1, H, T, D) and (1, Hkv, T, D), the rows one behind the other.
            prompt: of this layer; with an axis for the bank's entries where the rows have several.
        """
        k, v = self.update(layer, k, v)
        parts = []
        for group in self.layouts[layer].groups:
            own = (q[:, :, group.queries], k[:, :, group.keys], v[:, :, group.keys])
            if group.rows is not None:
                own = tuple(states[0].unflatten(1, (group.rows, -1)).transpose(0, 1) for states in own)
            queries, seen = own[0].shape[2], own[1].shape[2]
            part = layer_attention(
                *own,
                prompt,
                group.batch,
                index=group.batch.index if prompt.keys.dim() == 4 else None,
                key_mask=group.key_mask,
                bias=None,
                causal=True,
                scale=scale,
                dropout_p=dropout_p,
                # One query behind its keys: a window that holds all of them hides none.
                window=None if window is None or (queries == 1 and seen <= window) else window,
                softcap=softcap,
            )
            parts.append(part.flatten(0, 1)[None])
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]
