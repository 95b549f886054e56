"""A cache of a text whose memory stays in its place: what captured decode steps write to and read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin

# The least room. All are multiples of it, so that a row of a mask begins where kernels are compiled for it.
_LEAST = 64


def room_for(tokens: int) -> int:
    """How many slots rows of so many tokens have: the least of 64, 128, 192, 256, 384, 512, 768, ... that holds them.

    Few sizes are captured for texts of all lengths; of more than 128 slots at most a third is empty.
    """
    power = 1 << (max(tokens, _LEAST) - 1).bit_length()
    smaller = power // 4 * 3
    return smaller if smaller > 2 * _LEAST and tokens <= smaller else power


class SlotCache(Cache):
    """Keys and values of a text in memory that is kept from call to call, and taken anew where a text outgrows it.

    To a model it is what a dynamic cache is: keys in the order of their tokens, as many as there are. Only `in_place`,
    for a single token, it is a static one: keys of all slots, of which the device knows how many are written.

    Attributes:
        position: (1,) int64, on the device: the slot that a token in place is written to.
        moves: how often memory was taken anew; addresses seen before the last time are gone.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        """No memory is taken yet."""
        with torch.inference_mode(False):
            self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self._own = [_SlotLayer(self.position) for _ in range(layers)]
        super().__init__(layers=list(self._own))

    @property
    def moves(self) -> int:
        return sum(layer.moves for layer in self._own)

    @property
    def length(self) -> int:
        """How many tokens a row has."""
        return self._own[0].length

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows and slots."""
        return self._own[0].rows, self._own[0].room

    def clear(self, new: int | None = None) -> None:
        """Forget the text, not the memory.

        Args:
            new: no more tokens will follow the first ones of the next text; None where nobody knows.
        """
        for layer in self._own:
            layer.clear(new)

    def make_room(self, tokens: int) -> None:
        """Let every row have slots for so many tokens."""
        # Asked for every token; the layers have the same.
        if tokens > self._own[0].room:
            for layer in self._own:
                layer.lay_out(layer.rows, tokens)

    def advance(self) -> None:
        """Count the token that was written in place."""
        for layer in self._own:
            layer.length += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context a token is written to the slot `position`, and all slots are read."""
        for layer in self._own:
            layer.in_place = True
        try:
            yield
        finally:
            for layer in self._own:
                layer.in_place = False

    def as_dynamic(self, config: PretrainedConfig) -> DynamicCache:
        """A copy as the cache that `generate` makes by default, for who keeps it."""
        copied = DynamicCache(config=config.get_text_config(decoder=True))
        for index, layer in enumerate(self._own):
            if layer.length:
                keys, values = layer.written()
                copied.update(keys.clone(), values.clone(), index)
        return copied


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: (B, Hkv, slots, d), the first elements of memory that may be larger.

    Attributes:
        length: how many slots of each row are written.
        rows, room: B and the number of slots.
        most: tokens that the text may come to, as far as that is known.
        in_place, position, moves: as the cache says.
    """

    def __init__(self, position: Tensor) -> None:
        super().__init__()
        self.position = position
        self.in_place = False
        self.moves = 0
        self._memory: list[Tensor] = []
        self.clear(None)

    def clear(self, new: int | None) -> None:
        self.length = self.rows = self.room = 0
        self.most = self._new = new or 0

    def written(self) -> tuple[Tensor, Tensor]:
        """(B, Hkv, length, d) twice, views of the memory."""
        keys: Any = self.keys
        values: Any = self.values
        return keys[:, :, : self.length], values[:, :, : self.length]

    def lay_out(self, rows: int, tokens: int, states: tuple[Tensor, Tensor] | None = None) -> None:
        """Make room for rows of so many tokens; those that are written stay, if the rows do.

        Args:
            states: the first (B, Hkv, N, d) that are written; None where some are.
        """
        room = max(self.room, room_for(tokens))
        if states is None and (rows, room) == (self.rows, self.room):
            return
        # Old and new layout lie over each other.
        kept = [part.clone() for part in self.written()] if self.length and rows == self.rows else []
        views = []
        for index, part in enumerate(states or self.written()):
            shape = (rows, part.shape[1], room, part.shape[3])
            view = self._view(index, shape, part)
            start = kept[index].shape[2] if kept else 0
            # What no mask shows is multiplied by zero in some backends, and must be a number.
            view[:, :, start:].zero_()
            if kept:
                view[:, :, :start].copy_(kept[index])
            views.append(view)
        self.keys, self.values = views
        self.rows, self.room, self.is_initialized = rows, room, True

    def _view(self, index: int, shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
        """A tensor of a shape at the beginning of the memory of keys (0) or values (1)."""
        rows, heads, room, width = shape
        size = rows * heads * room * width
        found = self._memory[index] if index < len(self._memory) else None
        if found is None or found.numel() < size or (found.dtype, found.device) != (like.dtype, like.device):
            # Memory that is taken anew costs all that was captured.
            spare = min(2 * room, max(room, room_for(self.most)))
            # What inference mode makes could not be written to outside of it.
            with torch.inference_mode(False):
                found = torch.empty(size // room * spare, dtype=like.dtype, device=like.device)
            self._memory[index : index + 1] = [found]
            self.moves += 1
        return found[:size].view(shape)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.lay_out(key_states.shape[0], key_states.shape[2], (key_states, value_states))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (B, Hkv, N, d) behind what is there; gives all keys and values of the text, in place those of all
        slots."""
        if self.in_place:
            assert self.keys is not None and self.values is not None
            self.keys.index_copy_(2, self.position, key_states)
            self.values.index_copy_(2, self.position, value_states)
            return self.keys, self.values
        # The next token is likely to have its slot in place.
        rows, start, end = key_states.shape[0], self.length, self.length + key_states.shape[2]
        if not start:
            self.most = end + self._new
        self.lay_out(rows, end + 1, None if start else (key_states, value_states))
        self.length = end
        keys, values = self.written()
        keys[:, :, start:].copy_(key_states)
        values[:, :, start:].copy_(value_states)
        return (keys, values) if start else (key_states, value_states)

    def get_seq_length(self) -> Any:
        return self.position[0] if self.in_place else self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.room if self.in_place else self.length + query_length), 0

    def get_max_length(self) -> int:
        return -1

    # As transformers calls it up to 5.17.
    get_max_cache_shape = get_max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each row the text of another one, in place."""
        for part in self.written():
            part.copy_(part.index_select(0, beam_idx.to(part.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the rows, (R,) of them."""
        keys, values = (part.index_select(0, indices) for part in self.written())
        length, self.length = self.length, 0
        self.lay_out(indices.shape[0], length + 1, (keys, values))
        self.length = length
        for part, states in zip(self.written(), (keys, values), strict=True):
            part.copy_(states)
