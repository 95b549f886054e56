"""What stays of prompts between steps: as little as is in use, as right as if it was made now."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn

from ptv2_fast.prompts.kept_bank import KeptBank, versions
from tiny_models import tiny_model, tiny_prompts
from tolerances import assert_equal, assert_same_bits


def _bank():
    model = tiny_model("llama", "deep", "CAUSAL_LM", length=3)
    for name, length in (("long", 9), ("short", 2), ("unused", 4)):
        model.add_adapter(name, tiny_prompts("deep", "CAUSAL_LM", length=length))
    model.eval()
    made = []

    def source_of(encoder):
        name = next(name for name, adapter in model.adapters.items() if adapter.encoder is encoder)
        made.append(name)
        return model._source(name)

    return model, KeptBank(source_of, 2), made


def _of(model, bank, rows, in_use=()):
    def encoder(name):
        return None if name == "base" else model.adapters[name].encoder

    with torch.no_grad():
        return bank.of([encoder(name) for name in rows], {encoder(name) for name in (*rows, *in_use)}, "torch")


def test_each_row_finds_its_own_prompt():
    model, bank, made = _bank()
    rows = ["short", "base", "long", "short"]
    layers, entries = _of(model, bank, rows)
    for name, entry in zip(rows, entries, strict=True):
        length = 0 if name == "base" else model.adapters[name].config.num_virtual_tokens
        assert int(layers[0].lens[entry]) == length
        if length:
            (own, _), _ = _of(model, bank, [name])
            assert_equal(layers[0].keys[entry][:, :length], own.keys, name)
    assert sorted(made) == ["long", "short"]


def test_a_bank_stays_while_its_members_do():
    model, bank, made = _bank()
    first, _ = _of(model, bank, ["short", "long"], ["default"])
    again, entries = _of(model, bank, ["default", "long", "long"])
    assert again is first and len(set(entries)) == 2 and len(made) == 3
    # The longest one is in no use any more, and nobody pays for its length.
    smaller, _ = _of(model, bank, ["default", "short"])
    assert smaller[0].keys.shape[2] == 3 and len(made) == 3


def test_a_write_is_seen_in_the_bank_that_is_there():
    model, bank, _ = _bank()
    layers, entries = _of(model, bank, ["short", "long"])
    with torch.no_grad():
        model.adapters["long"].encoder.prompts.add_(1)
    _of(model, bank, ["long"])
    after, places = _of(model, bank, ["short", "long"])
    assert not torch.equal(after[0].keys[places[1]], layers[0].keys[entries[1]])
    assert_same_bits(after[0].keys[places[0]], layers[0].keys[entries[0]], "what nobody wrote to")


def test_nothing_is_kept_of_an_adapter_that_is_gone():
    model, bank, _ = _bank()
    layers, _ = _of(model, bank, ["unused"])
    kept = weakref.ref(layers[0].keys)
    del layers
    model.delete_adapter("unused")
    gc.collect()
    assert kept() is None


def test_other_parameters_are_never_taken_for_those_of_before():
    """Python gives an object the id of one that is gone: of every third in such a row."""
    model, bank, made = _bank()
    encoder, seen = model.adapters["short"].encoder, set()
    for count in range(1, 7):
        _of(model, bank, ["short"])
        seen.add(versions(encoder))
        for _ in range(count):
            encoder.prompts = nn.Parameter(torch.randn(encoder.prompts.shape))
    assert len(seen) == len(made) == 6
