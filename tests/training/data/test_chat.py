"""Chats: every layout becomes messages, the template writes them, and the assistant's turns are what is learned."""

from __future__ import annotations

import json

import pytest

from ptv2_fast.training.chat import prompt_inputs
from ptv2_fast.training.data import read_examples
from ptv2_fast.training.task_data import TaskCodec
from tiny_folders import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "who is anna ?"}, {"role": "assistant", "content": "good film"}]
PARTS = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in MESSAGES]
SHAREGPT = [{"from": "human", "value": "who is anna ?"}, {"from": "gpt", "value": "good film"}]
TEMPLATE = (
    "{% for m in messages %}[CLS]{{ m['role'] }} {{ m['content'] }}[END]\n{% endfor %}"
    "{% if add_generation_prompt %}[CLS]assistant {% endif %}"
)
# As some templates do: what was thought in earlier turns is left out.
_THOUGHT = "{% if loop.last and m.role == 'assistant' %}likes {% endif %}{{ m['content'] }}"
LAST_TURN = TEMPLATE.replace("{{ m['content'] }}", _THOUGHT)


def write(folder, *records, name="a.jsonl"):
    path = folder / name
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "record",
    [
        pytest.param({"messages": MESSAGES}, id="messages"),
        pytest.param({"id": "x_0", "conversations": SHAREGPT}, id="sharegpt"),
        pytest.param({"conversation": MESSAGES, "source": "web"}, id="conversation"),
        pytest.param({"instruction": "who is anna ?", "input": "", "output": "good film"}, id="alpaca"),
        pytest.param({"instruction": "who is anna ?", "input": " ", "system": "", "output": "good film"}, id="blanks"),
        pytest.param({"messages": PARTS}, id="parts"),
    ],
)
def test_every_layout_is_messages(tmp_path, record):
    assert read_examples(write(tmp_path, record), "CAUSAL_LM") == [{"messages": MESSAGES}]
    asked = read_examples(write(tmp_path, record), "CAUSAL_LM", labelled=False)
    assert asked == [{"prompt": MESSAGES[:1]}]


def test_alpaca_has_more_than_one_turn(tmp_path, caplog):
    record = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief", "history": [["Hi", "Hello"]]}
    said = [("system", "Be brief"), ("user", "Hi"), ("assistant", "Hello"), ("user", "Add\n\n1 2"), ("assistant", "3")]
    expected = [{"role": role, "content": content} for role, content in said]
    assert read_examples(write(tmp_path, record), "CAUSAL_LM") == [{"messages": expected}]
    # The column of the first publication that says it all again is no second text.
    again = {"instruction": "Add", "input": "", "output": "3", "text": "### Instruction: Add\n### Response: 3"}
    assert len(read_examples(write(tmp_path, again), "CAUSAL_LM")[0]["messages"]) == 2
    assert "columns left out: 1 ('text')" in caplog.text


def test_prompts_are_texts_or_messages(tmp_path):
    record = {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}
    assert read_examples(write(tmp_path, record), "CAUSAL_LM") == [record]
    assert read_examples(write(tmp_path, record), "CAUSAL_LM", labelled=False) == [{"prompt": MESSAGES[:1]}]


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        ({"messages": MESSAGES[:1]}, ["message of the assistant", "['user']"]),
        ({"messages": [{"role": "boss", "content": "x"}]}, ["message 1", "role", "'boss'"]),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, ["message 1", "'tool_calls'"]),
        ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0}]}, ["message 2", "'weight' must be 1", "got 0"]),
        ({"messages": [*MESSAGES, {"role": "system", "content": "x"}]}, ["message 3", "'system'"]),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": " "}]}, ["message 2", "expected text", "' '"]),
        ({"prompt": MESSAGES[:1], "completion": "good"}, ["lists of messages", "'completion': 'str'"]),
        ({"messages": MESSAGES, "text": "a b c"}, ["'messages', 'text'", "--text-column"]),
    ],
)
def test_refusals(tmp_path, record, parts):
    path = write(tmp_path, record)
    with pytest.raises(ValueError) as caught:
        read_examples(path, "CAUSAL_LM")
    assert not [part for part in (f"{path}, line 1", *parts) if part not in str(caught.value)], caught.value


def learned(example, template, **options):
    """(all tokens, those that are learned) of each feature, as text."""
    tokenizer = tiny_tokenizer(causal=True)
    tokenizer.chat_template = template
    features = TaskCodec("CAUSAL_LM", tokenizer, **options).encode([example])
    known = [[label for label in feature["labels"] if label != -100] for feature in features]
    return [tuple(map(tokenizer.decode, (f["input_ids"], k))) for f, k in zip(features, known, strict=True)]


CHAT = [*MESSAGES, {"role": "user", "content": "where ?"}, {"role": "assistant", "content": "paris"}]


def test_what_the_assistant_says_is_learned_and_how_it_ends():
    ((text, answers),) = learned({"messages": CHAT}, TEMPLATE)
    assert answers == "good film [END] paris [END]" and text.count("[END]") == 4
    ((_, last),) = learned({"prompt": CHAT[:3], "completion": CHAT[3:]}, TEMPLATE)
    assert last == "paris [END]"


def test_a_template_that_writes_earlier_turns_otherwise_has_a_text_for_each():
    texts = learned({"messages": CHAT}, LAST_TURN)
    assert [answers for _, answers in texts] == ["likes good film [END]", "likes paris [END]"]
    assert "likes good" not in texts[1][0]


def test_windows_without_an_answer_are_left_out():
    features = learned({"messages": CHAT}, TEMPLATE, max_length=8)
    assert all(answers for _, answers in features)
    assert " ".join(answers for _, answers in features) == "good film [END] paris [END]"


def test_without_a_template_it_is_plain_and_said(caplog):
    ((_, answers),) = learned({"messages": CHAT}, None)
    assert answers == "good film [END] paris [END]" and "no chat template" in caplog.text


def test_what_a_template_refuses_is_named():
    with pytest.raises(ValueError, match=r"examples\[0\]: the chat template does not take messages of user: no users"):
        learned({"messages": CHAT}, "{{ raise_exception('no users') }}")


def test_a_prompt_ends_where_the_answer_begins():
    tokenizer = tiny_tokenizer(causal=True)
    tokenizer.chat_template = TEMPLATE
    inputs = [prompt_inputs(prompt, tokenizer, chats=True)["input_ids"] for prompt in ("who is anna ?", MESSAGES[:1])]
    (text, _), *_ = learned({"messages": MESSAGES}, TEMPLATE)
    assert inputs[0] == inputs[1] and text.startswith(tokenizer.decode(inputs[0]))
    assert prompt_inputs("who is", tokenizer, chats=False)["input_ids"] == tokenizer("who is")["input_ids"]
