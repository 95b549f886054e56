"""Continuous batching with an adapter for each request: the tokens of each are those of `generate` alone."""

from __future__ import annotations

import asyncio
import copy
import random
import threading

import pytest
import torch

from batched_generation import NAMES, NEW, adapted, alone, needs_pages, pages, results, settings, texts
from ptv2_fast.prompts.encoder import PromptEncoder
from tiny_models import tiny_model, tiny_prompts

pytestmark = needs_pages
# Learned positions; grouped heads; windows in all layers or some, a cap on scores; positions that begin elsewhere.
FAMILIES = ["gpt2", "llama", "qwen3", "mistral", "gemma2", "gemma3_text", "opt", "gpt_neox"]
LENGTHS = (1, 17, 5, 2, 9, 3, 13, 4, 6, 1)


@pytest.fixture(scope="module")
def model():
    return adapted()


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_requests_get_the_tokens_of_generate(family):
    """Adapters at random, texts of one token and of several parts, more requests than there are pages."""
    model = adapted(family)
    inputs, draw = texts(*LENGTHS), random.Random(1)
    names = [draw.choice(NAMES) for _ in inputs]
    found = model.generate_batch(inputs, settings(), pages(), adapter_names=names)
    assert [result.prompt_ids for result in found.values()] == inputs
    expected = [alone(model, ids, name) for ids, name in zip(inputs, names, strict=True)]
    assert [result.generated_tokens for result in found.values()] == expected
    others = [alone(model, ids, "__base__") for ids in inputs]
    assert sum(map(list.__ne__, expected, others)) > 3, "prompts change too few tokens: the test could not fail"


def test_requests_that_arrive_while_others_run(model):
    inputs = texts(*LENGTHS, *LENGTHS, seed=7)
    names = [NAMES[index % len(NAMES)] for index in range(len(inputs))]
    with model.continuous_batching_context_manager(settings(max_new_tokens=9), continuous_batching_config=pages()) as m:
        ids = m.add_requests(inputs[:4], adapter_names=names[:4])
        for text, name in zip(inputs[4:], names[4:], strict=True):
            m.get_result(timeout=0.01, request_id="none of them")
            ids.append(m.add_request(text, adapter_name=name))
        found = results(m, len(inputs))
    for request_id, text, name in zip(ids, inputs, names, strict=True):
        assert found[request_id].generated_tokens == alone(model, text, name, 9), (request_id, name)
    assert not m._bound.all()


@pytest.mark.parametrize("room", [64, 12], ids=["forked", "some children wait"])
def test_children_keep_the_adapter_of_their_parent(model, room):
    """Several sequences of a request; with one candidate a step sampling is greedy."""
    config = settings(num_return_sequences=3, do_sample=True, top_k=1)
    inputs = texts(7, 2, 11)
    found = model.generate_batch(
        inputs, config, pages(num_blocks=room), adapter_names=["prefix", "__base__", "shallow"]
    )
    assert len(found) == 9
    tokens = [result.generated_tokens for result in found.values()]
    for index, (ids, name) in enumerate(zip(inputs, ["prefix", "__base__", "shallow"], strict=True)):
        assert tokens[3 * index : 3 * index + 3] == [alone(model, ids, name)] * 3


def test_children_of_a_text_that_came_before(model):
    """Nine tokens, two blocks of which are there and whose last one is read by each child."""
    ids, config = texts(9)[0], settings(num_return_sequences=2, do_sample=True, top_k=1)
    with model.continuous_batching_context_manager(config, continuous_batching_config=pages()) as manager:
        for _ in range(2):
            manager.add_request(ids, adapter_name="prefix")
            found = results(manager, 2)
            assert [result.generated_tokens for result in found.values()] == [alone(model, ids, "prefix")] * 2


def test_a_text_of_one_token_has_no_children(model):
    """transformers forks before the last token has been read; a step without any would end its loop."""
    config = settings(num_return_sequences=2, do_sample=True)
    with pytest.raises(ValueError, match=r"input_ids must be two or more where num_return_sequences is 2; got \[7\]"):
        model.init_continuous_batching(config, pages()).add_request([7])
    with pytest.raises(ValueError, match=r"input_ids must be two or more where num_return_sequences is 2; got \[7\]"):
        model.generate_batch([[5, 6], [7]], config, pages())


def test_sampling_draws_from_the_distribution_of_each_adapter(model):
    config = settings(do_sample=True, top_k=0, max_new_tokens=1, temperature=1.0)
    ids, count = texts(5)[0], 400
    torch.manual_seed(0)
    found = model.generate_batch(
        [ids] * count, config, pages(max_batch_tokens=64, num_blocks=200), adapter_names=["prefix"] * count
    )
    tokens = torch.tensor([result.generated_tokens[0] for result in found.values()])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), adapter_names=["prefix"]).logits[0, -1]
    share = tokens.bincount(minlength=len(logits)) / count
    # Half the sum of differences: 0 for the same distribution, 1 for two that have nothing in common.
    assert float((share - logits.softmax(-1)).abs().sum() / 2) < 0.2


def test_none_is_the_adapter_that_is_active_when_a_request_is_added():
    model, ids = adapted(), texts(6)[0]
    with model.continuous_batching_context_manager(settings(), continuous_batching_config=pages()) as manager:
        first = manager.add_request(ids)
        model.set_adapter("prefix")
        second = manager.add_request(ids)
        with model.disable_adapter():
            third = manager.add_request(ids)
        found = results(manager, 3)
    tokens = [found[request_id].generated_tokens for request_id in (first, second, third)]
    assert tokens == [alone(model, ids, name) for name in ("default", "prefix", "__base__")]
    assert tokens[0] != tokens[1] != tokens[2]


def test_streaming_handlers_and_cancelling(model):
    ids = texts(5)[0]
    expected = alone(model, ids, "shallow")

    async def handled(manager):
        seen, done = [], asyncio.Event()

        def note(result):
            seen.append(list(result.generated_tokens))
            if result.is_finished():
                done.set()

        manager.register_result_handler("mine", note)
        manager.add_request(ids, request_id="mine", streaming=True, adapter_name="shallow")
        await asyncio.wait_for(done.wait(), 30)
        return seen

    with model.continuous_batching_context_manager(settings(), continuous_batching_config=pages()) as manager:
        request_id = manager.add_request(ids, streaming=True, adapter_name="shallow")
        parts = [list(part.generated_tokens) for part in manager.request_id_iter(request_id)]
        assert parts == [expected[: count + 1] for count in range(NEW)]
        assert asyncio.run(handled(manager)) == parts
        endless = manager.add_request(ids, max_new_tokens=60, adapter_name="prefix")
        manager.cancel_request(endless)
        other = manager.add_request(ids, adapter_name="gated")
        assert results(manager, 1)[other].generated_tokens == alone(model, ids, "gated")
        assert manager.get_result(timeout=0.3) is None
    assert not manager._bound.all()


def test_prompts_are_made_once_and_not_once_a_step(model, monkeypatch):
    made, forward = [], PromptEncoder.forward
    monkeypatch.setattr(PromptEncoder, "forward", lambda self: made.append(self) or forward(self))
    inputs = texts(*LENGTHS)
    names = [NAMES[index % len(NAMES)] for index in range(len(inputs))]
    model.generate_batch(inputs, settings(), pages(), adapter_names=names)
    assert len(made) == len(set(names)) - 1


def test_blocks_are_shared_within_an_adapter_alone():
    """The second time a text comes, what it shares is not read again; with another adapter all of it is."""
    model = adapted()
    ids, read = texts(14)[0], []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, given: read.append(given[0].numel()))
    config = pages(max_batch_tokens=32)
    with model.continuous_batching_context_manager(settings(), continuous_batching_config=config) as manager:

        def tokens(name):
            read.clear()
            request_id = manager.add_request(ids, adapter_name=name)
            return results(manager, 1)[request_id].generated_tokens, read[0]

        found = [tokens(name) for name in ("default", "prefix", "default", "__base__", "prefix", "__base__")]
    assert [count for _, count in found] == [14, 14, 2, 14, 2, 2]
    read.clear()
    names = ("default", "prefix", "default", "__base__", "prefix", "__base__")
    assert [said for said, _ in found] == [alone(model, ids, name) for name in names]


def test_blocks_whose_number_is_forgotten_are_nobodys(monkeypatch):
    """As many first tokens are known as there is room for; the texts are read again, by whichever adapter."""
    monkeypatch.setattr("ptv2_fast.task_models.shared_blocks._KNOWN", 2)
    model, config = adapted(), pages(num_blocks=60)
    inputs, names = [*texts(9, 9), texts(9)[0]] * 4, ["prefix", "default", "default", "shallow"] * 3
    with model.continuous_batching_context_manager(settings(), continuous_batching_config=config) as manager:
        for ids, name in zip(inputs, names, strict=True):
            request_id = manager.add_request(ids, adapter_name=name)
            assert results(manager, 1)[request_id].generated_tokens == alone(model, ids, name)


def test_the_base_stays_as_it_is():
    model = adapted().train()
    base = model.base_model
    before = (base.config.to_json_string(), base.config._attn_implementation, copy.deepcopy(base.generation_config))
    attributes = {name: set(module.__dict__) for name, module in base.named_modules()}
    with model.continuous_batching_context_manager(continuous_batching_config=pages()) as manager:
        manager.add_request([5, 6], max_new_tokens=3)
        assert results(manager, 1)
        assert base.config._attn_implementation == before[1]
    assert (base.config.to_json_string(), base.config._attn_implementation, base.generation_config) == before
    assert all(module.training for module in model.modules())
    assert {name: set(module.__dict__) for name, module in base.named_modules()} == attributes
    copy.deepcopy(model)


def test_a_persistent_manager_is_found_again_and_ends(model):
    inputs, options = texts(3, 8), {"persistent_manager": True, "adapter_names": ["prefix", "shallow"]}
    expected = [alone(model, ids, name) for ids, name in zip(inputs, options["adapter_names"], strict=True)]
    for _ in range(2):
        found = model.generate_batch(inputs, settings(), pages(), **options)
        assert [result.generated_tokens for result in found.values()] == expected
    manager = model.init_continuous_batching()
    assert manager is model.init_continuous_batching() and "req_3" in found
    model.destroy_cached_continuous_batching_manager()
    assert manager is not model.init_continuous_batching()


def test_two_managers_and_generate_at_once(model):
    """Contexts are the threads' own: one of them has the adapters off."""
    ids = texts(6)[0]
    expected = {name: alone(model, ids, name) for name in NAMES}
    got: dict[str, list[int]] = {}

    def batch(name):
        found = model.generate_batch([ids] * 3, settings(), pages(), adapter_names=[name] * 3)
        got[name] = [result.generated_tokens for result in found.values()]

    threads = [threading.Thread(target=batch, args=(name,)) for name in ("prefix", "gated")]
    for thread in threads:
        thread.start()
    with model.disable_adapter():
        bare = [alone(model, ids, "prefix") for _ in range(3)]
    for thread in threads:
        thread.join()
    assert got == {name: [expected[name]] * 3 for name in got} and len(got) == 2
    assert bare == [expected["__base__"]] * 3


def test_within_disable_adapter_it_is_the_bare_models_own(model):
    inputs = texts(4, 9)
    with model.disable_adapter():
        found = model.generate_batch(inputs, settings(), pages())
        manager = model.init_continuous_batching(settings(), pages())
    assert type(manager).__name__ == "ContinuousBatchingManager"
    assert [result.generated_tokens for result in found.values()] == [alone(model, ids, "__base__") for ids in inputs]


REFUSED = {
    "an unknown adapter": ({"adapter_names": ["prefix", "other"]}, "adapter must be one of .* got 'other'"),
    "a name too few": ({"adapter_names": ["prefix"]}, "adapter_names must be one name for each of 2 inputs"),
    "a string": ({"adapter_names": "prefix"}, "adapter_names must be one name for each of 2 inputs"),
    "no ids": ({"inputs": [[5], []]}, r"input_ids must be one or more ids below 40; got \[\]"),
    "ids of another model": ({"inputs": [[5], [40]]}, r"input_ids must be one or more ids below 40; got \[40\]"),
    "more than all pages": ({"inputs": [[5], [6] * 97]}, "input_ids must fit into 24 blocks of 4 tokens; got 97"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests_are_refused_before_anything_is_queued(model, name):
    given, message = REFUSED[name]
    given = {"inputs": [[5, 6], [7]], **given}
    manager = model.init_continuous_batching(settings(), pages())
    with pytest.raises(ValueError, match=message):
        manager.add_requests(**given)
    with pytest.raises(ValueError, match=message):
        model.generate_batch(given.pop("inputs"), settings(), pages(), **given)
    assert manager.input_queue.empty() and not manager._bound.all()


@pytest.mark.parametrize(("family", "fits"), [("mistral", True), ("gemma2", False)])
def test_a_text_that_windows_keep_the_end_of_needs_no_more_pages(family, fits):
    """Where every layer has a window; one that sees the whole text keeps it."""
    model, ids = adapted(family), texts(50)[0]
    few = pages(num_blocks=8)
    if not fits:
        with pytest.raises(ValueError, match="input_ids must fit into 8 blocks of 4 tokens; got 50"):
            model.generate_batch([ids], settings(), few)
        return
    found = model.generate_batch([ids], settings(), few, adapter_names=["prefix"])
    assert found["req_0"].generated_tokens == alone(model, ids, "prefix")


def test_an_id_that_a_request_has_is_refused(model):
    manager = model.init_continuous_batching(settings(), pages())
    manager.add_request([5], request_id="mine")
    with pytest.raises(ValueError, match="request_id must be of no request that waits or runs; got 'mine'"):
        manager.add_request([5], request_id="mine")


def test_positions_of_an_adapter_count_towards_the_length():
    """64 learned positions: what a shallow prompt takes of them is not there for the text."""
    model = adapted("gpt2")
    manager = model.init_continuous_batching(settings(max_new_tokens=None), pages())
    ids = texts(55)[0]
    assert manager.bind(ids, "shallow", 3).max_new_tokens == 3
    assert manager.bind(ids, "shallow", None).max_new_tokens == 3  # the last one is read by nobody
    with pytest.raises(ValueError, match="within 64 positions, 7 of which are the offset of adapter 'shallow'; got 55"):
        manager.add_request(ids, adapter_name="shallow", max_new_tokens=4)
    with pytest.raises(ValueError, match="got 58 ids and None new tokens"):
        manager.add_request([5] * 58, adapter_name="shallow")
    assert manager.input_queue.empty()
    found = model.generate_batch([ids], settings(max_new_tokens=3), pages(), adapter_names=["shallow"])
    assert found["req_0"].generated_tokens == alone(model, ids, "shallow", 3)


@pytest.mark.parametrize(
    "changes", [{"use_cuda_graph": (False, True)}, {"use_async_batching": True}, {"default_compile_level": 1}], ids=str
)
def test_steps_that_cannot_tell_rows_apart_are_refused(model, changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be off in continuous_batching_config"):
        model.init_continuous_batching(settings(), pages(**changes))


def test_a_model_in_training_mode_serves_without_dropout():
    model = tiny_model("llama", "deep", "CAUSAL_LM", prompt_dropout=0.5, base_changes={"attention_dropout": 0.5})
    expected = alone(model, [5, 6, 7], "default")
    found = model.train().generate_batch([[5, 6, 7]], settings(), pages())
    assert found["req_0"].generated_tokens == expected


def test_whichever_adapter_is_active_requests_name_theirs():
    model = adapted()
    model.add_adapter("ner", tiny_prompts("deep", "TOKEN_CLS", heads={"ner": 3}))
    inputs, names = texts(3, 5), {"adapter_names": [NAMES[0], "__base__"]}
    expected = model.generate_batch(inputs, settings(), pages(), **names)
    model.set_adapter("ner")
    found = model.generate_batch(inputs, settings(), pages(), **names)
    assert [r.generated_tokens for r in found.values()] == [r.generated_tokens for r in expected.values()]
