"""How long keys and values live: for a call, for a `generate`, or inside a scope that somebody opened."""

from __future__ import annotations

import copy
import threading

import peft
import pytest
import torch

from batches import padded, text_rows
from ptv2_fast import get_ptv2_model
from tiny_models import VOCABULARY, tiny_base, tiny_model, tiny_prompts
from tolerances import assert_differs, assert_same_bits

BATCH = padded(text_rows(), "left")
INJECTIONS = ["deep", "prefix", "shallow"]


def _decoder(injection="deep", **options):
    return tiny_model("llama", injection, "CAUSAL_LM", **options)


def _count(model, name="default"):
    """A list that grows by one each time that an adapter's prompts are made."""
    calls: list[int] = []
    model.adapters[name].encoder.register_forward_hook(lambda *_: calls.append(1))
    return calls


@torch.no_grad()
def _logits(model, **options):
    return model(**BATCH.inputs, **options).logits


def _write(model):
    prompts = model.adapters[model.active_adapter].encoder.prompts
    prompts.data.copy_(prompts.data.roll(1, -1))


# A forward.


@pytest.mark.parametrize("injection", INJECTIONS)
def test_a_forward_makes_them_once(injection):
    model = _decoder(injection)
    calls = _count(model)
    first = _logits(model)
    for count in (2, 3):
        assert_same_bits(_logits(model), first)
        assert len(calls) == count


@pytest.mark.parametrize("injection", INJECTIONS)
def test_autocast_leaves_nothing_behind(injection):
    """A call under autocast and a plain one, each first and each second: the same bits."""
    for mode in ("forward", "frozen"):
        model = _decoder(injection)
        scope = model.frozen_prompts if mode == "frozen" else torch.no_grad
        plain = _logits(copy.deepcopy(model))
        with torch.autocast("cpu", torch.bfloat16):
            cast = _logits(copy.deepcopy(model))
        assert_differs(cast.float(), plain)
        with scope():
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    assert_same_bits(_logits(model), cast)
                assert_same_bits(_logits(model), plain)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("injection", ["deep", "shallow"])
def test_a_lora_on_the_base_is_read_as_it_is(family, injection):
    task = "CAUSAL_LM" if family == "llama" else "TOKEN_CLS"
    base = tiny_base(family, task)
    names = ["k_proj", "v_proj"] if family == "llama" else ["key", "value"]
    lora = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False))
    lora.add_adapter("second", peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False))
    model = get_ptv2_model(lora.get_base_model(), tiny_prompts(injection, task)).eval()

    def check(change):
        with torch.no_grad():
            before = _logits(model)
            change()
            after = _logits(model)
            # A copy has never made any keys or values.
            assert_same_bits(after, _logits(copy.deepcopy(model)))
            assert_differs(after, before)

    check(lambda: lora.set_adapter("second"))
    scaled = [m for m in base.modules() if hasattr(m, "scale_layer")]
    check(lambda: [m.scale_layer(3.0) for m in scaled])
    before = _logits(model)
    with lora.disable_adapter():
        assert_same_bits(_logits(model), _logits(copy.deepcopy(model)))
        assert_differs(_logits(model), before)
    assert_same_bits(_logits(model), before)


# One `generate`.

_SMALL = {"max_new_tokens": 4, "do_sample": False}
_WAYS = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "no-cache": {"use_cache": False},
    "lookup": {"prompt_lookup_num_tokens": 2, "eos_token_id": VOCABULARY - 1},  # 5.10 needs one
}


def _generate(model, **options):
    torch.manual_seed(0)
    rows = slice(0, 1) if "assistant_model" in options or "prompt_lookup_num_tokens" in options else slice(None)
    inputs = {name: value[rows] for name, value in BATCH.inputs.items() if name != "token_type_ids"}
    return model.generate(**inputs, **{**_SMALL, **options})


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("injection", INJECTIONS)
def test_generate_makes_them_once(injection, way):
    model = _decoder(injection)
    calls = _count(model)
    first = _generate(model, **_WAYS[way])
    assert len(calls) == 1
    assert torch.equal(_generate(model, **_WAYS[way]), first) and len(calls) == 2
    _write(model)
    fresh = _decoder(injection)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(_generate(model, **_WAYS[way]), _generate(fresh, **_WAYS[way]))


def test_generate_makes_the_bank_of_several_adapters_once():
    model = _decoder()
    model.add_adapter("other", tiny_prompts("prefix", "CAUSAL_LM", length=3))
    calls = _count(model), _count(model, "other")
    names = ["default", "other", "__base__"]
    _generate(model, adapter_names=names, num_beams=2)
    assert [len(made) for made in calls] == [1, 1]


@pytest.mark.parametrize("kind", ["wrapped", "bare"])
def test_assisted_decoding_makes_them_once(kind):
    model = _decoder()
    calls = _count(model)
    assistant = _decoder("prefix") if kind == "wrapped" else tiny_base("llama", "CAUSAL_LM")
    drafts = _count(assistant) if kind == "wrapped" else [1]
    plain = _generate(model)
    assisted = _generate(model, assistant_model=assistant)
    assert torch.equal(assisted[0], plain[0]) and len(calls) == 2 and len(drafts) == 1


def test_generate_in_training_mode_makes_them_once():
    model = _decoder(prompt_dropout=0.5).train()
    calls = _count(model)
    _generate(model)
    assert len(calls) == 1


@pytest.mark.parametrize("injection", ["deep", "prefix", "shallow"])
def test_an_encoder_decoder_makes_them_once(injection):
    import tiny_seq2seq

    model = tiny_seq2seq.tiny_model("bart", injection)
    calls = _count(model)
    source = tiny_seq2seq.pair().source.inputs
    for count in (1, 2):
        model.generate(**source, max_new_tokens=4, num_beams=2)
        assert len(calls) == count


def test_an_exception_in_generate_leaves_nothing():
    model = _decoder()
    expected = _generate(model)

    def stop(*_):
        raise KeyError("stop")

    with pytest.raises(KeyError):
        _generate(model, stopping_criteria=[stop])
    calls = _count(model)
    assert torch.equal(_generate(model), expected) and len(calls) == 1
    _write(model)
    fresh = _decoder()
    fresh.load_state_dict(model.state_dict())
    assert_same_bits(_logits(model), _logits(fresh))


def test_two_threads_generate_from_their_own():
    """The first is stopped in the middle, the prompts are written to, and the second one runs with the new ones."""
    model = _decoder()
    old = _generate(model)
    fresh = _decoder()
    _write(fresh)
    new = _generate(fresh)
    begun, go_on, found = threading.Event(), threading.Event(), {}

    def wait(*_):
        begun.set()
        assert go_on.wait(timeout=60)
        return torch.zeros(len(old), dtype=torch.bool)

    thread = threading.Thread(target=lambda: found.update(first=_generate(model, stopping_criteria=[wait])))
    thread.start()
    assert begun.wait(timeout=60)
    _write(model)
    found["second"] = _generate(model)
    go_on.set()
    thread.join(timeout=60)
    assert torch.equal(found["first"], old) and torch.equal(found["second"], new)


# A scope.


@pytest.mark.parametrize("injection", INJECTIONS)
def test_a_scope_keeps_them_for_calls_and_generates(injection):
    model = _decoder(injection)
    calls = _count(model)
    with model.frozen_prompts():
        first = _logits(model)
        with model.frozen_prompts():
            assert_same_bits(_logits(model), first)
        _generate(model)
        assert_same_bits(_logits(model), first)
        assert len(calls) == 1
    _write(model)
    assert_differs(_logits(model), first)
    with model.frozen_prompts():
        fresh = _decoder(injection)
        fresh.load_state_dict(model.state_dict())
        assert_same_bits(_logits(model), _logits(fresh))


def test_a_scope_is_for_every_thread():
    model = _decoder()
    expected, calls, found = _logits(model), _count(model), []
    with model.frozen_prompts():
        _logits(model)
        thread = threading.Thread(target=lambda: found.append(_logits(model)))
        thread.start()
        thread.join(timeout=60)
    assert len(calls) == 1
    assert_same_bits(found[0], expected)


def test_what_trains_is_not_frozen():
    """A thread with gradients on beside one that serves; the order is fixed, the outcome is the same in any other."""
    model = _decoder()
    calls = _count(model)
    with model.frozen_prompts():
        kept = _logits(model)
        model(**BATCH.inputs).logits.sum().backward()
        assert model.adapters["default"].encoder.prompts.grad is not None
        assert len(calls) == 2
        assert_same_bits(_logits(model), kept)
        assert len(calls) == 2
        model.train()
        _logits(model)
        assert len(calls) == 3


def test_a_scope_follows_what_it_can_see():
    """Another adapter of the same name, another dtype: these are not the ones that were kept."""
    model = _decoder()
    with model.frozen_prompts():
        first = _logits(model)
        model.add_adapter("other", tiny_prompts("deep", "CAUSAL_LM"))
        model.set_adapter("other")
        other = _logits(model)
        assert_differs(other, first)
        model.delete_adapter("other")
        model.add_adapter("other", tiny_prompts("deep", "CAUSAL_LM"))
        assert_differs(_logits(model, adapter_names=["other"]), other)
        assert_same_bits(_logits(model), first)
        model.base_model.to(torch.float64)
        assert _logits(model).dtype == torch.float64


def test_a_scope_ends_with_an_exception():
    model = _decoder()
    with pytest.raises(KeyError), model.frozen_prompts():
        _logits(model)
        raise KeyError
    calls = _count(model)
    _logits(model), _logits(model)
    assert len(calls) == 2


def test_scopes_may_overlap():
    model = _decoder()
    calls = _count(model)
    first, second = model.frozen_prompts(), model.frozen_prompts()
    first.__enter__()
    _logits(model)
    second.__enter__()
    first.__exit__(None, None, None)
    _logits(model)
    assert len(calls) == 1
    second.__exit__(None, None, None)
    _logits(model)
    assert len(calls) == 2


def test_inference_mode_keeps_its_own():
    model = _decoder()
    with model.frozen_prompts():
        with torch.inference_mode():
            expected = _logits(model)
        assert_same_bits(_logits(model), expected)
    model.train()
    model(**BATCH.inputs).logits.sum().backward()
