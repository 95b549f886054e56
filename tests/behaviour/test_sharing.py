"""One base under several wrappers, in several threads: what one of them does changes no other's answer."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable
from types import MethodType

import peft
import pytest
import torch

import tiny_features
import tiny_seq2seq
from batches import padded, text_rows
from ptv2_fast import PTuningV2Model, get_ptv2_model
from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.backbone.view import TRACES_VIEWS
from ptv2_fast.families.registry import family_of
from ptv2_fast.interop.peft_import import from_peft
from tiny_models import DECODERS, FAMILIES, tiny_base, tiny_model, tiny_prompts
from tolerances import assert_differs, assert_equal, assert_same_bits

BATCH = padded(text_rows(), "left")
PAIR = tiny_seq2seq.pair()
IMAGES = tiny_features.FEATURES
SEQ2SEQ = ("t5", "bart", "mbart")
EVERY = (*FAMILIES, *IMAGES, *SEQ2SEQ)


def _base(family: str):
    if family in IMAGES:
        return tiny_features.tiny_base(family, "backbone")
    if family in SEQ2SEQ:
        return tiny_seq2seq.tiny_base(family)
    return tiny_base(family, "CAUSAL_LM" if family in DECODERS else "TOKEN_CLS")


def _wrapped(base, family: str, injection: str = "deep", length: int = 5) -> PTuningV2Model:
    task = "SEQ_2_SEQ_LM" if family in SEQ2SEQ else "CAUSAL_LM" if family in DECODERS else "TOKEN_CLS"
    task = "FEATURE_EXTRACTION" if family in IMAGES else task
    with torch.random.fork_rng():
        torch.manual_seed(length)
        return get_ptv2_model(base, tiny_prompts(injection, task, length=length)).eval()


def _over_backbone(base, family: str) -> PTuningV2Model:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return get_ptv2_model(backbone_of(base), tiny_prompts("prefix", length=3)).eval()


def _inputs(family: str):
    if family in IMAGES:
        return tiny_features.features(family)
    return PAIR.inputs if family in SEQ2SEQ else BATCH.inputs


@torch.no_grad()
def _answer(model, family: str):
    output = model(**_inputs(family))
    return output.logits if "logits" in output else output.last_hidden_state


def _implementations(base) -> list[str]:
    return [module.config._attn_implementation for module in base.modules() if hasattr(module, "config")]


@pytest.mark.parametrize("family", EVERY)
def test_no_wrapper_changes_another_or_the_base(family):
    base = _base(family)
    bare, implementations = _answer(base, family), _implementations(base)
    first, second = _wrapped(base, family), _wrapped(base, family, "prefix", length=2)
    models = [first, second]
    if backbone_of(base) is not base and family not in SEQ2SEQ:
        models.append(_over_backbone(base, family))
    expected = [_answer(model, family) for model in models]
    assert_differs(expected[0], bare)
    assert_differs(expected[0], expected[1])

    def check():
        for model, answer in zip(models, expected, strict=True):
            assert_same_bits(_answer(model, family), answer)

    assert _implementations(base) == implementations
    assert_same_bits(_answer(base, family), bare)
    with second.disable_adapter():
        assert_same_bits(_answer(second, family), bare)
        assert_same_bits(_answer(first, family), expected[0])
    check()
    if base._can_set_attn_implementation():
        for name in ("eager", "sdpa"):
            if name == "eager" or base._supports_sdpa:
                first.set_attn_implementation(name)
                check()
        base.set_attn_implementation(implementations[0])
    assert second.unload() is base
    check()
    assert_same_bits(_answer(base, family), bare)


@pytest.mark.parametrize("family", EVERY)
def test_a_thread_that_disables_or_trains_changes_no_serving_one(family):
    """The serving thread's answers are its own, whatever order the two run in."""
    base = _base(family)
    serving, other = _wrapped(base, family), _wrapped(base, family, length=3)
    expected, bare = _answer(serving, family), _answer(base, family)
    trained = _answer(other, family)

    def disable():
        with serving.disable_adapter():
            assert_same_bits(_answer(serving, family), bare)
        with other.disable_adapter():
            assert_same_bits(_answer(other, family), bare)
            assert_same_bits(_answer(serving, family), expected)

    def train():
        output = other(**_inputs(family))
        states = output.logits if "logits" in output else output.last_hidden_state
        assert_equal(states.detach(), trained)
        gradients = torch.autograd.grad(states.float().sum(), list(other.adapters["default"].encoder.parameters()))
        assert any(gradient.abs().max() > 0 for gradient in gradients)

    def serve():
        assert_same_bits(_answer(serving, family), expected)

    _beside([serve, disable, train], rounds=3)


def test_disabled_is_disabled_for_its_thread_alone():
    """In a fixed order: the other thread runs while this one has the adapters disabled."""
    model = tiny_model("bert", "deep", "TOKEN_CLS")
    expected, found = _answer(model, "bert"), []
    with model.disable_adapter():
        thread = threading.Thread(target=lambda: found.append(_answer(model, "bert")))
        thread.start()
        thread.join(timeout=60)
        assert_differs(_answer(model, "bert"), expected)
    assert_same_bits(found[0], expected)


def test_disabled_is_disabled_for_its_task_alone():
    """Of asyncio's tasks, which share a thread and end in any order."""
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    prompted, bare = _answer(model, "llama"), _answer(model.base_model, "llama")

    async def disabled(turns: int):
        with model.disable_adapter():
            for _ in range(turns):
                await asyncio.sleep(0)
                assert_same_bits(_answer(model, "llama"), bare)

    async def serving():
        for _ in range(6):
            await asyncio.sleep(0)
            assert_same_bits(_answer(model, "llama"), prompted)

    async def all_of_them():
        await asyncio.gather(disabled(1), serving(), disabled(4), disabled(2))

    asyncio.run(all_of_them())
    assert_same_bits(_answer(model, "llama"), prompted)


def test_contexts_that_disable_may_overlap():
    model = tiny_model("llama", "deep", "CAUSAL_LM", base_changes={"num_hidden_layers": 1})
    prompted, bare = _answer(model, "llama"), _answer(model.base_model, "llama")
    compiled = torch.compile(model, backend="eager", fullgraph=TRACES_VIEWS)
    for one in (model, compiled):
        first, second = model.disable_adapter(), model.disable_adapter()
        first.__enter__(), second.__enter__()
        first.__exit__(None, None, None)
        assert_equal(_answer(one, "llama"), bare, "disabled")
        second.__exit__(None, None, None)
        assert_equal(_answer(one, "llama"), prompted, "enabled again")


def test_adapter_names_in_several_threads():
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    model.add_adapter("other", tiny_prompts("prefix", "CAUSAL_LM", length=3))
    calls = [["default", "other", "__base__"], ["other"] * 3, ["__base__", "__base__", "default"], None]

    def answer(names):
        with torch.no_grad():
            return model(**BATCH.inputs, adapter_names=names).logits

    expected = [answer(names) for names in calls]

    def serve(index: int) -> Callable[[], None]:
        return lambda: assert_same_bits(answer(calls[index]), expected[index])

    _beside([serve(index) for index in range(len(calls))], rounds=5)


def _beside(works: list[Callable[[], None]], rounds: int) -> None:
    """Run each of these a few times in a thread of its own, all at once."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        try:
            torch.set_num_threads(1)
            for _ in range(rounds):
                barrier.wait(timeout=60)
                work()
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])


# What is written to the parameters is read by the next call.


@pytest.mark.parametrize("family", EVERY)
def test_in_place_writes_are_read_by_the_next_call(family):
    """Ways that neither raise a version nor move a tensor: averages that are swapped in, hand-written loaders."""
    base = _base(family)
    model = _wrapped(base, family)
    before = _answer(model, family)
    prompts = model.adapters["default"].encoder.prompts
    prompts.data.copy_(prompts.data.roll(1, -1))
    after = _answer(model, family)
    assert_differs(after, before)
    prompts.data.mul_(-1)
    middle = _answer(model, family)
    assert_differs(middle, after)
    key = _some_projection(model)
    key.data.mul_(-2)
    changed = _answer(model, family)
    assert_differs(changed, middle)
    fresh_base = _base(family)
    fresh_base.load_state_dict(base.state_dict())
    fresh = _wrapped(fresh_base, family)
    fresh.load_state_dict(model.state_dict())
    assert_same_bits(changed, _answer(fresh, family))


def _some_projection(model: PTuningV2Model) -> torch.Tensor:
    """The weight that makes the first layer's keys."""
    family = family_of(model.backbone)
    return family.projections(model.backbone, 0)[0].module.weight


# What wraps a base can be copied, pickled and told what is wrong.


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "bart"])
def test_a_model_is_pickled_after_a_forward(family):
    model = _wrapped(_base(family), family)
    expected = _answer(model, family)
    with model.frozen_prompts():
        _answer(model, family)
        copied = pickle.loads(pickle.dumps(model))
    assert_same_bits(_answer(copied, family), expected)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_base_that_is_a_view_is_pickled():
    base = tiny_base("llama", "SEQ_CLS")
    theirs = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))
    model = from_peft(theirs)
    expected = _answer(model, "llama")
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert_same_bits(_answer(copied, "llama"), expected)


def test_data_parallel_is_refused_in_a_sentence():
    model = torch.nn.Sequential(tiny_model("bert", "deep"))
    with pytest.raises(ValueError, match="nn.DataParallel must not be used: .*one process for each device"):
        for module in model.modules():
            module._replicate_for_data_parallel()


def test_a_layer_that_is_no_longer_ours_is_noticed_at_every_forward():
    model = tiny_model("llama", "deep", "CAUSAL_LM")
    _answer(model, "llama")
    layer = model.backbone.layers[1]
    attend = layer.forward
    layer.forward = lambda *args, **kwargs: attend(*args, **kwargs)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the forward of a LlamaDecoderLayer was set to a function"):
            _answer(model, "llama")
    attend = type(layer).forward
    layer.forward = MethodType(lambda self, *args, ptv2_prompts=None, **inputs: attend(self, *args, **inputs), layer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"LlamaModel did not reach layers \[1\]"):
            _answer(model, "llama")
    del layer.forward
    # A compiled module runs itself: its view does not.
    layer.compile(backend="eager")
    plain = tiny_model("llama", "deep", "CAUSAL_LM")
    plain.load_state_dict(model.state_dict())
    assert_same_bits(_answer(model, "llama"), _answer(plain, "llama"))
