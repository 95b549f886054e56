"""Adapters for different tasks over one base: each is what it is alone, in any order, and in one batch."""

from __future__ import annotations

import copy
import itertools
import pickle
from types import MethodType

import pytest
import torch
import transformers

from batches import padded, text_rows
from ptv2_fast import PTuningV2Config, PTuningV2Model, PTuningV2ModelForTokenClassification, get_ptv2_model
from ptv2_fast.task_models.classes import MODEL_CLASSES
from ptv2_fast.task_models.mixed_rows import MixedOutput
from tiny_models import DECODERS, DISTINCT, literal_logits, tiny_base, tiny_prompts
from tolerances import assert_equal, assert_same_bits

SPAM = {"spam": {"task_type": "SEQ_CLS", "num_labels": 2, "pooling": "last"}}
CONFIGS = {
    "chat": tiny_prompts("deep", "CAUSAL_LM", length=4),
    "ner": tiny_prompts("prefix", "TOKEN_CLS", length=6, heads={"ner": 9}),
    "spam": tiny_prompts("deep", "SEQ_CLS", length=3, heads=SPAM, layers=[0]),
    "answer": tiny_prompts("shallow", "QUESTION_ANS", length=4, heads={"answer": 2}),
    "find": tiny_prompts("deep", "SENTENCE_RETRIEVAL", length=5),
    "states": tiny_prompts("deep", "FEATURE_EXTRACTION", length=4, prompt_init="gated"),
}
THREE = ("chat", "ner", "spam")
BATCH = padded(text_rows(5, 2, 7, 6, 3, 4), "left")


def _holding(names=CONFIGS, family="llama", exact=False) -> PTuningV2Model:
    """A language model with these adapters, the first one active."""
    base = tiny_base(family, "CAUSAL_LM", exact=exact)
    torch.manual_seed(3)
    first, *others = names
    model = get_ptv2_model(base, CONFIGS[first], first)
    for name in others:
        model.add_adapter(name, CONFIGS[name])
    with torch.no_grad():
        for name in sorted(model.adapters):
            generator = torch.Generator().manual_seed(sorted(CONFIGS).index(name))
            for parameter in model.adapters[name].parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return (model.double() if exact else model).eval()


def _alone(model, name) -> PTuningV2Model:
    """One of its adapters on a base of its own."""
    alone = get_ptv2_model(copy.deepcopy(model.base_model), CONFIGS[name], name)
    alone.adapters[name] = copy.deepcopy(model.adapters[name])
    return alone.eval()


def _result(name, output):
    """What the output of one task has for all rows, as a mixed one has it for each."""
    if name == "answer":
        return torch.stack([output.start_logits, output.end_logits], -1)
    if name == "find":
        return output.embeddings
    return output.last_hidden_state if name == "states" else output.logits


@pytest.mark.parametrize("order", list(itertools.permutations(THREE)), ids="-".join)
def test_adapters_come_in_any_order(order):
    model = _holding(order)
    for name in (*order, order[0]):
        model.set_adapter(name)
        alone = _alone(model, name)
        assert type(model) is type(alone) is MODEL_CLASSES[CONFIGS[name].task_type]
        assert [
            n for n, p in model.named_parameters() if p.requires_grad and not n.startswith(f"adapters.{name}")
        ] == []
        expected = alone(**BATCH.inputs)
        assert type(model(**BATCH.inputs)) is type(expected)
        assert_same_bits(model(**BATCH.inputs).logits, expected.logits, name)


@pytest.mark.parametrize("active", THREE)
def test_names_decide_whichever_adapter_is_active(active):
    model = _holding(THREE)
    model.set_adapter(active)
    for name in THREE:
        alone = _alone(model, name)
        found = model(**BATCH.inputs, adapter_names=[name] * 6)
        assert type(found) is type(alone(**BATCH.inputs))
        assert_same_bits(found.logits, alone(**BATCH.inputs).logits, name)


@pytest.mark.parametrize("family", DECODERS)
def test_one_forward_serves_rows_of_every_task(family):
    model = _holding(family=family, exact=True)
    names = list(CONFIGS)
    mixed = model(**BATCH.inputs, adapter_names=names, output_hidden_states=True)
    assert type(mixed) is MixedOutput and mixed.loss is None
    for row, name in enumerate(names):
        alone = _alone(model, name)(**BATCH.inputs, output_hidden_states=True)
        expected = _result(name, alone)[row]
        assert mixed.logits[row].shape == expected.shape
        if expected.dim() == 2 and name != "find":
            real = BATCH.attention_mask[row].bool()
            assert_equal(mixed.logits[row][real], expected[real], name)
        else:
            assert_equal(mixed.logits[row], expected, name)
        last = BATCH.real(mixed.hidden_states[-1], row)
        assert_equal(last, BATCH.real(alone.hidden_states[-1], row), name)


@pytest.mark.parametrize("family", DISTINCT)
def test_heads_and_states_need_no_language_model(family):
    """Any base that reads text, a backbone too."""
    base = tiny_base(family, exact=True)
    names = [name for name in CONFIGS if name not in ("chat", "answer")]
    model = get_ptv2_model(base, CONFIGS["ner"], "ner")
    for name in names[1:]:
        model.add_adapter(name, CONFIGS[name])
    model.double().eval()
    inputs = {key: value[: len(names)] for key, value in BATCH.inputs.items()}
    mixed = model(**inputs, adapter_names=names)
    for row, name in enumerate(names):
        model.set_adapter(name)
        found, expected = mixed.logits[row], _result(name, model(**inputs))[row]
        rows = inputs["attention_mask"][row].bool() if expected.dim() == 2 else slice(None)
        assert_equal(found[rows], expected[rows], name)


def test_rows_of_the_bare_base_write_text_beside_heads():
    model = _holding(exact=True)
    model.set_adapter("ner")
    mixed = model(**BATCH.inputs, adapter_names=["__base__", "ner", "chat", "ner", "spam", "__base__"])
    model.set_adapter("chat")
    bare = model(**BATCH.inputs, adapter_names=["__base__"] * 6)
    for row in (0, 5):
        assert_equal(mixed.logits[row][BATCH.attention_mask[row].bool()], BATCH.real(bare.logits, row))
    encoder = get_ptv2_model(tiny_base("bert"), CONFIGS["ner"], "ner")
    encoder.add_adapter("spam", CONFIGS["spam"])
    for names in (["__base__", "ner"], ["__base__", "spam", "ner"]):
        inputs = {key: value[: len(names)] for key, value in BATCH.inputs.items()}
        with pytest.raises(ValueError, match="must not hold '__base__' with heads: such a row has no head"):
            encoder(**inputs, adapter_names=names)


def test_the_bases_own_head_reads_rows_that_write_text_alone():
    """All that it does, of as many tokens as the call asks for."""
    model = _holding(THREE, family="gemma2")
    seen = []
    model.base_model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:2]))
    inputs = {key: value[:3] for key, value in BATCH.inputs.items()}
    mixed = model(**inputs, adapter_names=["ner", "chat", "spam"], logits_to_keep=2)
    assert seen == [(1, 2)] and mixed.logits[1].shape[0] == 2
    states = model.run(model.backbone, inputs, ["ner", "chat", "spam"]).last_hidden_state
    assert_equal(mixed.logits[1], literal_logits(model.base_model, states[1, -2:]))


@pytest.mark.parametrize("family", ("llama", "opt"))
def test_hooks_of_the_backbone_see_each_row_once(family):
    """What one changes is changed once, in rows that write text too."""
    model = _holding(THREE, family=family)
    seen = []

    def add(module, args, output):
        seen.append(output.last_hidden_state.shape[0])
        output.last_hidden_state = output.last_hidden_state + 1
        return output

    # OPT's language model calls the decoder inside its backbone.
    getattr(model.backbone, "decoder", model.backbone).register_forward_hook(add)
    mixed = model(**BATCH.inputs, adapter_names=[*THREE, *THREE]).logits
    assert seen == [6]
    for row, name in enumerate([*THREE, *THREE]):
        expected = model(**BATCH.inputs, adapter_names=[name] * 6).logits[row]
        assert_equal(mixed[row], expected, name)
    seen.clear()
    model.generate(**BATCH.inputs, adapter_names=[*THREE, *THREE], max_new_tokens=1, pad_token_id=1)
    assert seen == [6]


def test_tuples_are_given_where_they_are_asked_for():
    model = _holding(THREE)
    inputs = {key: value[:3] for key, value in BATCH.inputs.items()}
    (logits,) = model(**inputs, adapter_names=THREE, return_dict=False)
    for found, expected in zip(logits, model(**inputs, adapter_names=THREE).logits, strict=True):
        assert_same_bits(found, expected)


def test_positional_arguments_find_their_names():
    model = _holding(THREE)
    model.set_adapter("spam")
    ids, mask = BATCH.input_ids[:2], BATCH.attention_mask[:2]
    by_name = model(input_ids=ids, attention_mask=mask, adapter_names=["ner", "ner"]).logits
    assert_same_bits(model(ids, mask, None, None, None, None, None, ["ner", "ner"]).logits, by_name)
    assert_same_bits(model(ids, mask, adapter_names=["ner", "ner"]).logits, by_name)


def test_wrong_calls_are_refused():
    model = _holding()
    call = {key: value[:2] for key, value in BATCH.inputs.items()}
    both = {"adapter_names": ["chat", "ner"]}
    for wrong, message in (
        ({"labels": torch.zeros(2, 9, dtype=torch.long)}, "labels must be None with several adapters in one batch"),
        ({"past_key_values": transformers.DynamicCache()}, "must be None with rows of several tasks"),
        ({"cache": transformers.DynamicCache()}, "must be None with rows of several tasks"),
        ({"use_cache": True}, "must be None with rows of several tasks"),
        ({"adapter_names": ["chat", "ner", "spam"]}, "adapter_names must name 2 rows; got 3 names"),
        ({"adapter_names": ["chat", "nobody", "ner"]}, "adapter must be one of .*; got 'nobody'"),
        ({"output_attentions": True}, "output_attentions must be False"),
        ({"flavour": 1}, "flavour must not be given"),
        ({"task": "other"}, "task must be one of ner; got 'other'"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**call, **both, **wrong})
    for active in ("chat", "ner"):
        model.set_adapter(active)
        with pytest.raises(ValueError, match="labels must be .*|task must name the head"):
            model(**call, labels=torch.tensor([5, 5]), adapter_names=["states", "states"])


def test_copies_of_the_bases_head_are_alone_in_a_batch():
    base = tiny_base("bert", "SEQ_CLS")
    model = get_ptv2_model(base, tiny_prompts("deep", "SEQ_CLS"), "own")
    model.add_adapter("ner", CONFIGS["ner"])
    inputs = {key: value[:2] for key, value in BATCH.inputs.items()}
    alone = model(**inputs).logits
    model.set_adapter("ner")
    assert_same_bits(model(**inputs, adapter_names=["own", "own"]).logits, alone)
    assert model(**inputs).logits.shape == (2, 9, 9)
    with pytest.raises(ValueError, match="each has its own copy of the base's head; .*got 'own' beside others"):
        model(**inputs, adapter_names=["own", "ner"])


def test_groups_of_rows_are_not_mixed():
    model = _holding(THREE)
    model.add_adapter("choose", tiny_prompts("deep", "MULTIPLE_CHOICE", heads={"choose": 1}))
    with pytest.raises(ValueError, match="must not mix MULTIPLE_CHOICE, whose examples are several rows"):
        model(**{key: value[:2] for key, value in BATCH.inputs.items()}, adapter_names=["choose", "chat"])


def test_what_no_base_serves_is_refused_before_anything_is_added():
    model = get_ptv2_model(tiny_base("bert"), CONFIGS["ner"], "ner")
    with pytest.raises(ValueError, match="base must be a causal language model for task_type='CAUSAL_LM'"):
        model.add_adapter("chat", CONFIGS["chat"])
    with pytest.raises(ValueError, match="heads must be given for task_type='SEQ_CLS' on the backbone"):
        model.add_adapter("own", tiny_prompts("deep", "SEQ_CLS"))
    assert list(model.adapters) == ["ner"]


def test_training_one_leaves_the_others_as_they_are():
    model = _holding(THREE)
    before = {name: copy.deepcopy(model.adapters[name].state_dict()) for name in THREE}
    labels = {"chat": BATCH.input_ids, "ner": BATCH.input_ids % 9, "spam": torch.arange(6) % 2}
    for name in THREE:
        model.set_adapter(name)
        alone = _alone(model, name)
        optimizers = [torch.optim.SGD((p for p in m.parameters() if p.requires_grad), 0.5) for m in (model, alone)]
        for each, optimizer in zip((model.train(), alone.train()), optimizers, strict=True):
            torch.manual_seed(0)
            each(**BATCH.inputs, labels=labels[name]).loss.backward()
            optimizer.step()
        for key, trained in model.adapters[name].state_dict().items():
            assert_same_bits(trained, alone.adapters[name].state_dict()[key], f"{name} {key}")
        for other in THREE[THREE.index(name) + 1 :]:
            for key, tensor in model.adapters[other].state_dict().items():
                assert_same_bits(tensor, before[other][key], f"{other} {key}")
        assert any(not torch.equal(t, before[name][k]) for k, t in model.adapters[name].state_dict().items())


def test_saved_and_loaded_in_any_class(tmp_path):
    model = _holding()
    model.save_pretrained(tmp_path)
    for first in ("chat", "ner", "find"):
        loaded = PTuningV2Model.from_pretrained(tiny_base("llama", "CAUSAL_LM"), tmp_path, adapter_name=first)
        assert type(loaded) is MODEL_CLASSES[CONFIGS[first].task_type] and set(loaded.adapters) == set(CONFIGS)
        found = loaded(**BATCH.inputs, adapter_names=list(CONFIGS)).logits
        expected = model(**BATCH.inputs, adapter_names=list(CONFIGS)).logits
        for row in range(6):
            assert_same_bits(found[row], expected[row])


def test_disabled_and_unloaded_it_is_the_base():
    model = _holding(THREE)
    bare = copy.deepcopy(model.base_model)
    expected = bare(**BATCH.inputs).logits
    for name in THREE:
        model.set_adapter(name)
        with model.disable_adapter():
            assert_same_bits(model(**BATCH.inputs).logits, expected)
            assert_same_bits(model(**BATCH.inputs, adapter_names=[*THREE, *THREE]).logits, expected)
    assert_same_bits(model.unload()(**BATCH.inputs).logits, expected)


def test_what_knows_the_model_by_its_attributes_follows_the_adapter():
    model = _holding(THREE)
    assert model.accepts_loss_kwargs
    model.set_adapter("ner")
    assert not model.accepts_loss_kwargs and model.config.num_labels == model.num_labels == 9
    assert model.loss_type == model.base_model.loss_type
    model.config.id2label = {i: f"T{i}" for i in range(9)}
    model.set_adapter("spam")
    assert model.config.num_labels == 2
    model.set_adapter("chat")
    assert model.config is model.base_model.config
    model.set_adapter("ner")
    assert model.config.id2label[3] == "T3"
    model.delete_adapter("ner")
    assert type(model) is MODEL_CLASSES["CAUSAL_LM"] and model.active_adapter == "chat"


def test_copies_and_pickles_are_of_the_class_that_they_were_made_of():
    model = _holding(THREE)
    model.set_adapter("ner")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is PTuningV2ModelForTokenClassification
        assert_same_bits(other(**BATCH.inputs).logits, model(**BATCH.inputs).logits)
        other.set_adapter("spam")
        assert type(model) is PTuningV2ModelForTokenClassification
    with model.disable_adapter():
        for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other(**BATCH.inputs).logits.shape != model(**BATCH.inputs).logits.shape


def test_a_forward_that_was_wrapped_before_serves_the_adapter_that_is_active_now():
    """accelerate sets a forward of the object: that of the class which it had then."""
    model = _holding(THREE)
    expected = {}
    for name in THREE:
        model.set_adapter(name)
        expected[name] = model(**BATCH.inputs).logits
    model.set_adapter("chat")
    with model.disable_adapter():
        bare = model(**BATCH.inputs).logits
    for first in ("chat", "ner"):
        model.set_adapter(first)
        own = type(model).forward
        model.forward = MethodType(lambda self, *args, own=own, **kwargs: own(self, *args, **kwargs), model)
        for name in ("ner", "chat", "spam"):
            model.set_adapter(name)
            assert_same_bits(model(**BATCH.inputs).logits, expected[name])
            with model.disable_adapter():
                assert_same_bits(model(**BATCH.inputs).logits, bare)


def test_a_call_goes_on_while_another_thread_chooses_an_adapter(monkeypatch):
    """Its class is another one then."""
    model = _holding(THREE)
    names = ["ner", "__base__", "chat", "spam", "__base__", "ner"]
    greedy = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 1}
    calls = {
        "ner": lambda: model(**BATCH.inputs, adapter_names=["ner"] * 6).logits,
        "chat": lambda: model(**BATCH.inputs, adapter_names=["chat"] * 6).logits,
        "mixed": lambda: model(**BATCH.inputs, adapter_names=names).logits,
        "generate": lambda: model.generate(**BATCH.inputs, adapter_names=names, **greedy).sequences,
        "bare": lambda: _disabled(model),
    }
    expected = {call: calls[call]() for call in calls}
    read = PTuningV2Model._row_names

    def row_names(self, *args):
        model.set_adapter(other)
        return read(self, *args)

    def check_read(self, given):
        model.set_adapter(other)

    with monkeypatch.context() as patch:
        patch.setattr(PTuningV2Model, "_row_names", row_names)
        patch.setattr(PTuningV2Model, "_check_read", check_read)
        for first, other in itertools.permutations(THREE, 2):
            for call, run in calls.items():
                model.set_adapter(first)
                for found, logits in zip(run(), expected[call], strict=True):
                    assert_same_bits(found, logits, f"{call}: {first} to {other}")
    assert type(model) is MODEL_CLASSES[CONFIGS[other].task_type]


def _disabled(model):
    with model.disable_adapter():
        return model(**BATCH.inputs).logits


class _Mine(PTuningV2ModelForTokenClassification):
    """Somebody's own class."""


def test_somebodys_own_class_serves_its_own_task():
    model = _Mine(tiny_base("llama", "CAUSAL_LM"), CONFIGS["ner"], "ner")
    model.add_adapter("tags", PTuningV2Config("TOKEN_CLS", 3, heads={"tags": 4}))
    model.add_adapter("chat", CONFIGS["chat"])
    model.set_adapter("tags")
    assert type(model) is _Mine
    with pytest.raises(
        ValueError, match="for TOKEN_CLS, which the model's class _Mine is made for; got one for CAUSAL_LM"
    ):
        model.set_adapter("chat")
    assert model.active_adapter == "tags" and all(p.requires_grad for p in model.adapters["tags"].parameters())
    inputs = {key: value[:2] for key, value in BATCH.inputs.items()}
    assert model(**inputs, adapter_names=["chat", "ner"]).logits[0].shape == (9, 40)


def test_half_precision_has_a_result_for_every_row():
    model = _holding(THREE).to(torch.bfloat16)
    inputs = {key: value[:3] for key, value in BATCH.inputs.items()}
    chat, ner, spam = model(**inputs, adapter_names=THREE).logits
    assert chat.dtype == ner.dtype == spam.dtype == torch.bfloat16
    assert all(torch.isfinite(logits).all() for logits in (BATCH.real([chat], 0), BATCH.real([chat, ner], 1), spam))
