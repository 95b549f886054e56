"""What becomes of requests while they wait or run: each one's end is its own."""

from __future__ import annotations

import pytest
import torch

from batched_generation import NEW, adapted, alone, needs_pages, pages, results, settings, texts
from tiny_models import tiny_prompts

pytestmark = needs_pages


@pytest.fixture(scope="module")
def model():
    return adapted()


def test_cancelling_ends_nothing_but_what_it_names(model):
    """Not what a request that runs was forked with, be the name one that is over, cancelled before or not there yet."""
    ids = texts(5)[0]
    expected = alone(model, ids, "prefix", 40)
    config = settings(max_new_tokens=40, num_return_sequences=2, do_sample=True, top_k=1)
    with model.continuous_batching_context_manager(config, continuous_batching_config=pages(num_blocks=60)) as manager:
        with manager.pause():
            first = manager.add_request(ids, adapter_name="prefix", max_new_tokens=NEW)
            for name in (f"{first}__child#0", "none of them"):
                manager.cancel_request(name)
        found = results(manager, 2)
        assert [result.generated_tokens for result in found.values()] == [alone(model, ids, "prefix")] * 2
        for cancelled, left in (("{}__child#0", "{}"), ("{}", "{}__child#0")):
            parent = manager.add_request(ids, adapter_name="prefix", streaming=True)
            assert manager.get_result(timeout=30).request_id.startswith(parent)
            for _ in range(3):
                manager.cancel_request(cancelled.format(parent))
                manager.cancel_request(first)
                with manager.pause():
                    pass
            found = results(manager, 1)
            assert found[left.format(parent)].generated_tokens == expected
        with manager.pause():
            whole = manager.add_request(ids, adapter_name="prefix")
            manager.cancel_request(whole)
        with manager.pause():
            pass
    assert not manager._bound.all()


def test_what_was_to_be_forked_fails_with_its_request(model):
    """transformers gives one result of a request whose arguments no processor knows; the id may come again."""
    config = settings(num_return_sequences=3, do_sample=True, temperature=0.5)
    few = pages(per_request_processors=True)
    with model.continuous_batching_context_manager(config, continuous_batching_config=few) as manager:
        for _ in range(2):
            manager.add_request([5, 6], request_id="mine", adapter_name="prefix", heat=2.0)
            found = results(manager, 3)
            assert set(found) == {"mine", "mine__child#0", "mine__child#1"}
            assert all("heat" in result.error for result in found.values())
            assert not manager._bound.all()


def test_a_deleted_adapter_fails_its_requests_alone():
    """Children that are not forked yet among them; the name may serve another adapter then."""
    model, ids = adapted(), texts(5)[0]
    kept = alone(model, ids, "shallow", 40)
    config = settings(max_new_tokens=40, num_return_sequences=2, do_sample=True, top_k=1)
    with model.continuous_batching_context_manager(config, continuous_batching_config=pages(num_blocks=60)) as manager:
        running = manager.add_request(ids, adapter_name="prefix", streaming=True)
        first = manager.get_result(timeout=30)
        assert first.request_id.startswith(running) and not first.is_finished()
        manager.add_request(ids, adapter_name="shallow", request_id="other")
        with manager.pause():
            manager.add_request(ids, adapter_name="prefix", request_id="waiting")
            model.delete_adapter("prefix")
        with pytest.raises(ValueError, match="adapter must be one of default, shallow, gated; got 'prefix'"):
            manager.add_request(ids, adapter_name="prefix")
        model.add_adapter("prefix", tiny_prompts("deep", "CAUSAL_LM", length=4))
        model.eval()
        manager.add_request(ids, adapter_name="prefix", request_id="later", max_new_tokens=NEW)
        found = results(manager, 8)
    failed = [found[one] for name in (running, "waiting") for one in (name, f"{name}__child#0")]
    assert all("adapter 'prefix' was deleted" in result.error for result in failed)
    assert found["other"].generated_tokens == found["other__child#0"].generated_tokens == kept
    assert found["later"].generated_tokens == found["later__child#0"].generated_tokens == alone(model, ids, "prefix")
    assert not manager._bound.all()


def test_what_is_written_into_an_adapter_is_read_by_the_next_request():
    model, ids = adapted(), texts(9)[0]
    before = alone(model, ids, "prefix")
    with model.continuous_batching_context_manager(settings(), continuous_batching_config=pages()) as manager:
        manager.add_requests([ids, ids], adapter_names=["prefix", "shallow"])
        results(manager, 2)
        with torch.no_grad():
            model.adapters["prefix"].encoder.prompts.mul_(-2)
        manager.add_requests([ids, ids], adapter_names=["prefix", "shallow"])
        found = results(manager, 2)
    after = alone(model, ids, "prefix")
    assert before != after == found["req_2"].generated_tokens
    assert found["req_3"].generated_tokens == alone(model, ids, "shallow")


def test_what_is_written_into_an_adapter_is_read_by_requests_that_wait():
    """Blocks of before are none of theirs, and what they write is nobody's: part of it may be of before."""
    model, ids, config = adapted(), texts(14)[0], pages(max_batch_tokens=32)
    with model.continuous_batching_context_manager(settings(), continuous_batching_config=config) as manager:
        manager.add_request(ids, adapter_name="prefix")
        results(manager, 1)
        with manager.pause():
            waiting = manager.add_request(ids, adapter_name="prefix")
            with torch.no_grad():
                model.adapters["prefix"].encoder.prompts.mul_(-2)
        found = results(manager, 1)
        later = manager.add_request(ids, adapter_name="prefix")
        found |= results(manager, 1)
    assert found[waiting].generated_tokens == found[later].generated_tokens == alone(model, ids, "prefix")


@pytest.mark.parametrize("count", [1, 2], ids=["alone", "forked"])
def test_a_request_that_outgrows_the_pages_fails_alone(model, count):
    """Which end after 40 tokens; the others wait for its blocks, and others come after it."""
    ids, other = texts(20, 5)
    config = settings(num_return_sequences=count, do_sample=count > 1, top_k=1)
    with model.continuous_batching_context_manager(config, continuous_batching_config=pages(num_blocks=10)) as manager:
        with manager.pause():
            manager.add_request(ids, adapter_name="prefix", max_new_tokens=30, request_id="long")
            manager.add_request(other, adapter_name="shallow", request_id="short")
        found = results(manager, 2 * count)
        manager.add_request(other, adapter_name="gated", request_id="later")
        found |= results(manager, count)
    for name, result in found.items():
        if name.startswith("long"):
            assert "must fit into 10 blocks of 4 tokens; got 41" in result.error
            assert result.generated_tokens == alone(model, ids, "prefix", 21)
        else:
            adapter = "shallow" if name.startswith("short") else "gated"
            assert result.generated_tokens == alone(model, other, adapter), name
    assert len(found) == 3 * count and not manager._bound.all()


@pytest.mark.parametrize("room", [8, 64], ids=["in parts", "at once"])
def test_a_text_that_never_fits_fails_alone(model, monkeypatch, room):
    """How many blocks there are may not be known yet when it is added."""
    monkeypatch.setattr("ptv2_fast.task_models.batching_manager.check_pages", lambda *_: None)
    inputs, config = texts(50, 5, 60, 7), pages(num_blocks=10, max_batch_tokens=room)
    with model.continuous_batching_context_manager(settings(), continuous_batching_config=config) as manager:
        manager.add_requests(inputs, adapter_names=["prefix", "shallow", "gated", "gated"])
        found = results(manager, 4)
    for index, count in ((0, 50), (2, 60)):
        assert f"must fit into 10 blocks of 4 tokens; got {count}" in found[f"req_{index}"].error
    assert found["req_1"].generated_tokens == alone(model, inputs[1], "shallow")
    assert found["req_3"].generated_tokens == alone(model, inputs[3], "gated")
