"""Rows of several adapters in shared batches: on models and tokenizers of other kinds, and what is asked in Python."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from ptv2_fast import HeadConfig, PTuningV2Config
from ptv2_fast.training.loading import LoadedAdapter, load_all, load_trained
from ptv2_fast.training.records import examples_of, records_of
from ptv2_fast.training.requests import typed_requests
from ptv2_fast.training.together import answers_of, lines_of
from tiny_folders import WORDS, bert_folder, llama_folder, tiny_tokenizer
from tiny_sets import saved_set

NAMES = ("chat", "poet", "ner", "spam", "mood", "find")
TEXTS = ["anna saw the film", "the river bank was very good in rome", "bob"]


def gpt2(folder, token_types: bool):
    """Learned positions; a tokenizer that may give a kind for each token, which only rows that do not write read."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ends = {"bos_token_id": None, "eos_token_id": 4}
    config = transformers.GPT2Config(vocab_size=len(WORDS), initializer_range=0.2, **sizes, **ends)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer = tiny_tokenizer(causal=True)
    if token_types:
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder


def without_ends(folder):
    """A tokenizer that knows neither padding nor an end, under a model whose texts end with one of many words."""
    llama_folder(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    base.generation_config.eos_token_id = list(range(5, len(WORDS), 3))
    base.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask"]
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", model_input_names=names)
    plain.save_pretrained(folder)
    return folder


BASES = {
    "learned positions": lambda folder: gpt2(folder, token_types=False),
    "kinds of tokens": lambda folder: gpt2(folder, token_types=True),
    "no padding token": without_ends,
}


def alone(folder, name: str) -> list[dict]:
    loaded = load_trained(folder, adapter=name)
    return list(records_of(loaded, examples_of(TEXTS, loaded.codec.task_type), max_new_tokens=12))


def assert_alike(found, expected, what: str) -> None:
    """Equal up to the rounding of another batch."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), what
        for key in expected:
            assert_alike(found[key], expected[key], f"{what}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), what
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_alike(*pair, f"{what}[{index}]")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, abs_tol=2e-5), (what, found, expected)
    else:
        assert found == expected, what


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("batch_size", [4, 32])
def test_each_answer_is_that_of_the_adapter_alone(base, batch_size, tmp_path):
    folder = saved_set(tmp_path / "set", BASES[base](tmp_path / "base"), NAMES)
    members = load_all(folder)
    found = list(
        answers_of(
            members,
            typed_requests({name: one.reader for name, one in members.items()}, TEXTS),
            batch_size=batch_size,
            max_new_tokens=12,
        )
    )
    for name in NAMES:
        assert_alike([record[name] for record in found], alone(folder, name), name)
    lengths = {len(record[name]["text"].split()) for record in found for name in ("chat", "poet")}
    assert len(lengths) > 1 or base != "no padding token", "texts must end at different places"


def test_a_shallow_prompt_of_an_encoder_answers_beside_others(tmp_path):
    """Its virtual tokens are rows of the batch, so it has a pass of its own."""
    head = {"own": HeadConfig("SEQ_CLS", 2, labels=["no", "yes"])}
    shallow = PTuningV2Config("SEQ_CLS", num_virtual_tokens=3, injection="shallow", heads=head)
    folder = saved_set(tmp_path / "set", bert_folder(tmp_path / "base"), ("ner", "spam"), yes=shallow)
    members = load_all(folder)
    requests = typed_requests({name: one.reader for name, one in members.items()}, TEXTS)
    found = list(answers_of(members, requests))
    for name in ("ner", "spam", "yes"):
        assert_alike([record[name] for record in found], alone(folder, name), name)


def test_the_model_is_left_as_it_was(tmp_path):
    """The active adapter, what trains, and the mode; passes of their own change none."""
    folder = saved_set(tmp_path / "set", llama_folder(tmp_path / "base"), ("chat", "ner", "spam", "choice"))
    members = load_all(folder, adapters=["spam", "choice", "chat"])
    model = members["chat"].model
    assert list(model.adapters) == ["spam", "choice", "chat"] and isinstance(members["chat"], LoadedAdapter)
    rows = ['{"text": "the film", "choices": ["was good", "was bad"], "adapter": "choice"}', "bob"]
    only = {name: members[name] for name in ("spam", "choice")}
    requests = typed_requests({"choice": only["choice"].reader}, rows[:1])
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert len(list(answers_of(only, type(requests)(requests.rows, {**requests.examples, "spam": {}})))) == 1
    assert model.active_adapter == "spam" and model.task_type == "SEQ_CLS" and not model.training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_a_text_of_several_lines_stays_behind_its_name():
    record = {
        "text": "x",
        "chat": {"prompt": "x", "text": " y\nz"},
        "ner": {"tokens": ["x"], "tags": ["O"], "entities": []},
    }
    assert lines_of(record, ["chat", "ner", "gone"]) == "chat\tx y\nchat\tz\nner\tx\tO\n"
