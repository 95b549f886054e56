"""The cache of captured decode steps, against transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from ptv2_fast.step.slot_cache import SlotCache, room_for
from tiny_models import tiny_config

LAYERS, HEADS, WIDTH = 2, 3, 5
CONFIG = tiny_config("llama")


def _states(rows, tokens):
    return torch.randn(rows, HEADS, tokens, WIDTH), torch.randn(rows, HEADS, tokens, WIDTH)


def _both():
    return SlotCache(LAYERS, torch.device("cpu")), DynamicCache(config=CONFIG)


def _update(caches, rows, tokens):
    """The same states into every cache; what all of them give back must be the same."""
    for layer in range(LAYERS):
        states = _states(rows, tokens)
        found, expected = (cache.update(*states, layer) for cache in caches)
        assert all(map(torch.equal, found, expected))


def test_rooms_are_few_and_never_too_small():
    rooms = [room_for(tokens) for tokens in range(1, 4000)]
    assert all(room >= tokens and room % 64 == 0 for tokens, room in enumerate(rooms, 1))
    assert all(room <= 1.5 * tokens for tokens, room in enumerate(rooms, 1) if tokens > 128)
    assert sorted(set(rooms))[:8] == [64, 128, 192, 256, 384, 512, 768, 1024] and len(set(rooms)) == 12


def test_it_is_a_dynamic_cache_to_a_model():
    """Texts in pieces, over several rooms; rows in another order, fewer of them."""
    caches = slots, dynamic = _both()
    slots.clear(new=8)
    for tokens in (60, 1, 1, 40, 90):
        _update(caches, 4, tokens)
        assert slots.get_seq_length() == dynamic.get_seq_length()
        assert slots.get_mask_sizes(3, 0) == dynamic.get_mask_sizes(3, 0)
    order = torch.tensor([2, 2, 0, 1])
    for cache in caches:
        cache.reorder_cache(order)
    _update(caches, 4, 1)
    for cache in caches:
        cache.batch_select_indices(torch.tensor([3, 0]))
    _update(caches, 2, 2)
    assert not slots.is_compileable and slots.sizes == (2, 256)
    for copied, layer in zip(slots.as_dynamic(CONFIG).layers, dynamic.layers, strict=True):
        assert torch.equal(copied.keys, layer.keys) and torch.equal(copied.values, layer.values)


def test_a_token_in_place_is_the_next_one():
    slots, dynamic = _both()
    _update((slots, dynamic), 2, 7)
    for _ in range(3):
        slots.make_room(slots.length + 1)
        slots.position.fill_(slots.length)
        for layer in range(LAYERS):
            states = _states(2, 1)
            with slots.in_place():
                assert slots.get_mask_sizes(1, layer) == (64, 0) and int(slots.get_seq_length()) == slots.length
                found = slots.update(*states, layer)
            expected = dynamic.update(*states, layer)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.shape[2] == 64 and torch.equal(ours[:, :, : theirs.shape[2]], theirs)
        slots.advance()
    _update((slots, dynamic), 2, 2)


def test_slots_that_are_not_written_hold_numbers():
    """Backends multiply what no mask shows by zero: a NaN of another text would stay one."""
    slots, _ = _both()
    for layer in range(LAYERS):
        slots.update(*(torch.full((4, HEADS, 60, WIDTH), float("nan")) for _ in range(2)), layer)
    slots.clear()
    for layer in range(LAYERS):
        slots.update(*_states(2, 3), layer)
    slots.make_room(100)
    for layer in slots.layers:
        assert layer.keys.isfinite().all() and layer.values.isfinite().all()


@pytest.mark.parametrize(("new", "moves"), [(None, 2), (40, 1), (4000, 1)])
def test_memory_is_taken_ahead_for_what_may_follow(new, moves):
    """Of one room more, and for no more than may follow: what was captured on the old memory is lost."""
    slots, _ = _both()
    slots.clear(new)
    for tokens in (60, 20):
        for layer in range(LAYERS):
            slots.update(*_states(2, tokens), layer)
    assert slots.moves == moves * 2 * LAYERS and slots.sizes == (2, 128)
    before = slots.moves
    slots.clear(new)
    for layer in range(LAYERS):
        slots.update(*_states(1, 80), layer)
    assert slots.moves == before
