"""The place of a captured pass's batch: the batch itself, by one copy, from memory that no copy reads any more."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ptv2_fast.step import staging
from ptv2_fast.step.packed import PackedBatch
from ptv2_fast.step.staging import ALIGNMENT, MOST_IN_FLIGHT, Staging

CPU = torch.device("cpu")


def _batch(tokens=5, rows=2, targets=3, types=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=torch.int64):
        return torch.randint(-9, 1 << 30, shape, generator=generator).to(dtype)

    kinds = draw(1, tokens) if types else None
    bounds = draw(rows + 1, dtype=torch.int32)
    return PackedBatch(draw(1, tokens), kinds, bounds, 16, draw(targets), draw(targets))


def _writer(batch):
    """Puts a batch into arrays."""

    def write(places):
        for name, tensor in batch.tensors().items():
            places[name][:] = tensor.flatten().numpy()

    return write


def _assert_holds(place, batch):
    held = place.batch.tensors()
    assert held.keys() == batch.tensors().keys() and place.batch.longest == batch.longest
    for name, tensor in batch.tensors().items():
        assert torch.equal(held[name], tensor) and held[name].dtype == tensor.dtype, name


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 300), st.integers(1, 40), st.integers(0, 90)),
    types=st.booleans(),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=4),
)
def test_it_holds_what_it_was_filled_with(sizes, types, seeds):
    place = Staging(_batch(*sizes, types), CPU)
    addresses = {name: tensor.data_ptr() for name, tensor in place.batch.tensors().items()}
    base = place.batch.input_ids.untyped_storage().data_ptr()
    for seed in seeds:
        batch = _batch(*sizes, types, seed=seed)
        place.fill(_writer(batch))
        _assert_holds(place, batch)
        assert place.batch.sizes == batch.sizes
    for name, tensor in place.batch.tensors().items():
        assert tensor.data_ptr() == addresses[name] and tensor.is_contiguous()
        assert not tensor.numel() or (tensor.data_ptr() - base) % ALIGNMENT == 0


def test_integers_of_another_width_are_converted():
    place, batch = Staging(_batch(), CPU), _batch(seed=4)
    narrow = PackedBatch(**{**batch.__dict__, "input_ids": batch.input_ids.int(), "targets": batch.targets.int()})
    place.fill(_writer(narrow))
    _assert_holds(place, batch)


class _Copies(TorchDispatchMode):
    """Notes every copy that reaches the device: there it is the memory of one place."""

    def __init__(self, place):
        super().__init__()
        self.memory, self.flags = place.batch.input_ids.untyped_storage().data_ptr(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and args[0].untyped_storage().data_ptr() == self.memory:
            self.flags.append(args[2] if len(args) > 2 else (kwargs or {}).get("non_blocking", False))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("types", [True, False])
def test_one_copy_brings_a_batch_and_nobody_waits(types):
    place = Staging(_batch(types=types), CPU)
    place.fill(_writer(_batch(types=types)))
    with _Copies(place) as copies:
        place.fill(_writer(_batch(types=types, seed=1)))
    assert copies.flags == [True]


def test_only_cuda_has_pinned_sources(monkeypatch):
    asked, empty = [], torch.empty

    def note(*args, pin_memory=False, **kwargs):
        asked.append((kwargs["device"].type, pin_memory))
        return empty(*args, **{**kwargs, "device": "cpu"})

    monkeypatch.setattr(torch, "empty", note)
    monkeypatch.setattr(Staging, "_event", lambda self: staging._Immediate())
    for device in ("cpu", "cuda"):
        Staging(_batch(), torch.device(device)).fill(_writer(_batch()))
    assert asked == [("cpu", False), ("cpu", False), ("cuda", False), ("cpu", True)]


class Slow(Staging):
    """A device that copies when it gets to it, from what the source holds by then."""

    def __init__(self, batch):
        self.waiting, self.waited = [], 0
        super().__init__(batch, CPU)

    def _event(self):
        return _Landing(self)

    def _send(self, source):
        source.copied.landed = False
        self.waiting.append(source)

    def land(self):
        """Make the oldest copy."""
        source = self.waiting.pop(0)
        self._bytes.copy_(source.bytes)
        source.copied.landed = True


class _Landing:
    def __init__(self, place):
        self._place, self.landed = place, True

    def query(self):
        return self.landed

    def synchronize(self):
        self._place.waited += 1
        while not self.landed:
            self._place.land()


@settings(max_examples=60, deadline=None)
@given(moves=st.lists(st.booleans(), max_size=40))
def test_a_source_is_written_to_when_its_copy_has_ended(moves):
    place, sent, landed = Slow(_batch()), [], 0
    for fills in moves:
        if fills and len(place.waiting) < MOST_IN_FLIGHT:
            sent.append(_batch(seed=len(sent)))
            place.fill(_writer(sent[-1]))
        elif place.waiting:
            place.land()
            _assert_holds(place, sent[landed])
            landed += 1
    assert place.waited == 0 and len(place._sources) <= MOST_IN_FLIGHT
    while place.waiting:
        place.land()
        _assert_holds(place, sent[landed])
        landed += 1


def test_many_copies_under_way_are_waited_for():
    place = Slow(_batch())
    batches = [_batch(seed=seed) for seed in range(MOST_IN_FLIGHT + 2)]
    for batch in batches:
        place.fill(_writer(batch))
    assert place.waited == 2 and len(place._sources) == MOST_IN_FLIGHT
    _assert_holds(place, batches[1])


def test_a_device_that_keeps_up_needs_one_source():
    place = Slow(_batch())
    for seed in range(5):
        place.fill(_writer(_batch(seed=seed)))
        place.land()
    assert len(place._sources) == 1
