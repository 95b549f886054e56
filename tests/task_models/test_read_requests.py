"""Requests that generate nothing, in the batches of those that do: what the head's adapter alone says of each text."""

from __future__ import annotations

import pytest
import torch

from batched_generation import NEW, adapted, alone, needs_pages, pages, results, settings, texts
from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model
from ptv2_fast.task_models.read_requests import HeadOutput, Reading
from tiny_models import HIDDEN, tiny_model
from tolerances import assert_differs, assert_equal

pytestmark = needs_pages
SHAPES = {"init_std": 0.8, "num_virtual_tokens": 4}
READERS = {
    "tags": PTuningV2Config("TOKEN_CLS", heads={"ner": 9}, **SHAPES),
    "spans": PTuningV2Config("QUESTION_ANS", injection="prefix", heads={"qa": 2}, **SHAPES),
    "first": PTuningV2Config("SEQ_CLS", heads={"a": HeadConfig("SEQ_CLS", 3, pooling="first")}, **SHAPES),
    "last": PTuningV2Config("SEQ_CLS", injection="shallow", heads={"a": HeadConfig("SEQ_CLS", 3)}, **SHAPES),
    "mean": PTuningV2Config("SEQ_CLS", heads={"a": HeadConfig("SEQ_CLS", 2, pooling="mean")}, **SHAPES),
    "two": PTuningV2Config("SEQ_CLS", heads={"a": 2, "b": HeadConfig("TOKEN_CLS", 5)}, **SHAPES),
    "states": PTuningV2Config("FEATURE_EXTRACTION", **SHAPES),
}


def reading(family="llama"):
    model = adapted(family)
    for name, config in READERS.items():
        model.add_adapter(name, config)
        for head in model.adapters[name].heads.values():
            torch.nn.init.normal_(head.linear.weight)
    return model.eval()


def read_alone(model, ids, name, task=None):
    """What a model of this adapter alone gives, on the backbone without its language model's head."""
    own = get_ptv2_model(model.backbone, READERS[name]).eval()
    own.adapters["default"].load_state_dict(model.adapters[name].state_dict())
    with torch.no_grad():
        output = own(input_ids=torch.tensor([ids]), **({} if task is None else {"task": task}))
    if name == "spans":
        return torch.stack([output.start_logits, output.end_logits], -1)[0]
    return (output.last_hidden_state if name == "states" else output.logits)[0]


def found(result):
    return result.last_hidden_state if result.logits is None else result.logits


@pytest.fixture(scope="module")
def model():
    return reading()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_requests_that_read_and_that_generate_share_batches(family):
    """In several parts or one, with few pages, while others generate."""
    model = reading(family)
    lengths = (17, 1, 5, 9, 12, 3, 8, 6, 2, 11)
    names = ("tags", "prefix", "spans", "first", "last", "__base__", "mean", "shallow", "states", "tags")
    inputs = texts(*lengths)
    result = model.generate_batch(inputs, settings(), pages(), adapter_names=names)
    for (request_id, output), ids, name in zip(result.items(), inputs, names, strict=True):
        assert output.request_id == request_id and output.prompt_ids == ids and output.error is None
        if name not in READERS:
            assert not isinstance(output, HeadOutput) and output.generated_tokens == alone(model, ids, name)
            continue
        assert isinstance(output, HeadOutput) and output.is_finished() and output.generated_tokens == []
        assert (output.logits is None) == (name == "states") == (output.last_hidden_state is not None)
        expected = read_alone(model, ids, name)
        assert_equal(found(output), expected, name)
        assert_differs(expected, read_alone(model, ids[::-1] if len(ids) > 1 else [ids[0] - 1], name), name)
    assert result["req_0"].logits.shape == (17, 9) and result["req_4"].logits.shape == (3,)
    assert result["req_8"].last_hidden_state.shape == (2, HIDDEN)


def test_a_text_that_is_read_takes_no_step_more_than_its_parts(model):
    """Nor a token: neither of what is said of tokens is looked at."""
    steps: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, given: steps.append(given[0].numel()))
    try:
        with model.continuous_batching_context_manager(settings(), continuous_batching_config=pages()) as manager:
            request = manager.add_request(texts(19)[0], adapter_name="tags", max_new_tokens=30, streaming=True)
            parts = list(manager.request_id_iter(request))
            assert [part.logits.shape for part in parts] == [(19, 9)] and steps == [8, 8, 3]
            assert not manager._bound.all()
    finally:
        hook.remove()


def test_the_same_text_is_read_whole_each_time(model):
    """Blocks that somebody has read are no states: nothing is shared where all of them are asked for."""
    ids = texts(14)[0]
    expected = read_alone(model, ids, "tags")
    with model.continuous_batching_context_manager(settings(), continuous_batching_config=pages()) as manager:
        for _ in range(3):
            request = manager.add_request(ids, adapter_name="tags")
            assert_equal(results(manager, 1)[request].logits, expected)


def test_one_of_several_heads(model):
    ids = texts(6)[0]
    with model.continuous_batching_context_manager(settings(), continuous_batching_config=pages()) as manager:
        for task in ("a", "b"):
            request = manager.add_request(ids, adapter_name="two", task=task)
            assert_equal(results(manager, 1)[request].logits, read_alone(model, ids, "two", task), task)
        with pytest.raises(ValueError, match="task must be one of a, b; got None"):
            manager.add_request(ids, adapter_name="two")
        with pytest.raises(ValueError, match="task must be None where the request's adapter has no heads; got 'a' for"):
            manager.add_request(ids, adapter_name="prefix", task="a")
        assert manager.input_queue.empty()


def test_heads_read_without_dropout_and_as_they_are_written(model):
    model, ids = reading(), texts(6)[0]
    expected = read_alone(model, ids, "tags")
    model.adapters["tags"].heads["ner"].dropout.p = 0.9
    with model.train().continuous_batching_context_manager(settings(), continuous_batching_config=pages()) as manager:
        request = manager.add_request(ids, adapter_name="tags")
        assert_equal(results(manager, 1)[request].logits, expected)
        with torch.no_grad():
            model.adapters["tags"].heads["ner"].linear.weight.mul_(2)
            model.adapters["tags"].heads["ner"].linear.bias.mul_(2)
        request = manager.add_request(ids, adapter_name="tags")
        assert_equal(results(manager, 1)[request].logits, 2 * expected)


def test_an_adapter_that_is_deleted_fails_what_it_reads():
    model = reading()
    with model.continuous_batching_context_manager(settings(), continuous_batching_config=pages()) as manager:
        with manager.pause():
            manager.add_requests([[5, 6], [7, 8]], adapter_names=["tags", "prefix"])
            model.delete_adapter("tags")
        result = results(manager, 2)
    assert isinstance(result["req_0"], HeadOutput) and result["req_0"].logits is None
    assert "adapter 'tags' was deleted" in result["req_0"].error
    assert result["req_1"].generated_tokens == alone(model, [7, 8], "prefix", NEW)


def test_several_sequences_of_a_text_that_is_read_are_refused(model):
    config = settings(num_return_sequences=2, do_sample=True)
    with pytest.raises(ValueError, match="num_return_sequences must be 1 .* got 2 for 'tags'"):
        model.init_continuous_batching(config, pages()).add_request([5], adapter_name="tags")
    with pytest.raises(ValueError, match="num_return_sequences must be 1 .* got 2 for 'tags'"):
        model.generate_batch([[5]], config, pages(), adapter_names=["tags"])


def test_heads_over_several_texts_are_refused():
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    model.add_adapter("choice", PTuningV2Config("MULTIPLE_CHOICE", heads={"c": HeadConfig("MULTIPLE_CHOICE", 1)}))
    with pytest.raises(
        ValueError, match="or has a head over the text of one request; got 'choice', of task_type 'MULT"
    ):
        model.init_continuous_batching(settings(), pages()).add_request([5], adapter_name="choice")


def test_a_request_that_comes_again_is_read_once():
    """Pages that were taken away: the text comes from the beginning, or from where it was."""
    states = torch.randn(7, 4)
    for again in (0, 3):
        read = Reading(None)
        read.take(0, states[:3], False)
        read.take(3, states[3:5], False)
        read.take(again, states[again:6], False)
        read.take(6, states[6:], True)
        assert_equal(read._found, states)
    with pytest.raises(RuntimeError, match="must come in one piece; 0 of 2 are there"):
        Reading(None).take(2, states, False)
