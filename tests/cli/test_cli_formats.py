"""From files as people have them to a trained adapter and its answers: one run for each family of formats."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ptv2_fast.cli import app
from tiny_folders import bert_folder, llama_folder, tiny_tokenizer, toy_examples

TEMPLATE = "{% for m in messages %}{{ m['content'] }} [END]\n{% endfor %}"


def run(*arguments: object, stdin: str | None = None):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def train(model: Path, task: str, data: Path, output: Path, *more: object) -> None:
    settings = ("--epochs", 1, "--batch-size", 8, "--num-virtual-tokens", 2)
    run("train", "--model", model, "--task", task, "--data", data, "--output", output, *settings, *more)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("bert"))


def test_spans_and_another_scheme_are_one_task(encoder, tmp_path):
    rows = toy_examples("TOKEN_CLS", 16)
    records, sentences = [], []
    for row in rows:
        text, spans = "", []
        for token, tag in zip(row["tokens"], row["tags"], strict=True):
            spans += [[len(text), len(text) + len(token), tag[2:]]] if tag != "O" else []
            text += token + " "
        records.append(json.dumps({"text": text, "label": spans}))
        pairs = zip(row["tokens"], row["tags"], strict=True)
        sentences.append("".join(f"{token}\t{tag.replace('B-', 'S-')}\n" for token, tag in pairs))
    (tmp_path / "train.jsonl").write_text("\n".join(records))
    (tmp_path / "dev.txt").write_text("\n".join(sentences))
    train(encoder, "TOKEN_CLS", tmp_path / "train.jsonl", tmp_path / "out", "--dev", tmp_path / "dev.txt")
    scores = [
        json.loads(run("eval", tmp_path / "out", "--data", tmp_path / name)) for name in ("train.jsonl", "dev.txt")
    ]
    assert scores[0] == scores[1] and scores[0]["examples"] == 16
    said = run("predict", tmp_path / "out", "--file", tmp_path / "train.jsonl", "--json").splitlines()
    assert [json.loads(line)["tokens"] for line in said] == [row["tokens"] for row in rows]


def test_parts_of_speech_are_classes_of_words(encoder, tmp_path):
    words = (("anna", "PROPN"), ("saw", "VERB"), ("the", "DET"), ("river", "NOUN"))
    sentence = "".join(f"{n}\t{w}\t_\t{tag}\t_\t_\t0\t_\t_\t_\n" for n, (w, tag) in enumerate(words, 1))
    (tmp_path / "a.conllu").write_text("\n".join([sentence] * 8))
    data = tmp_path / "a.conllu"
    train(encoder, "TOKEN_CLS", data, tmp_path / "out", "--dev", data, "--epochs", 12, "--lr", "3e-2")
    assert json.loads(run("eval", tmp_path / "out", "--data", data))["f1"] == 1.0
    record = json.loads(run("predict", tmp_path / "out", "anna saw the river", "--json"))
    assert record["tags"] == [tag for _, tag in words] and record["entities"] == []


def test_columns_of_0_and_1_and_names_of_numbers_are_remembered(encoder, tmp_path):
    lines = [f"{row['text']},{n % 2},{int(n % 3 == 0)}" for n, row in enumerate(toy_examples("SEQ_CLS", 12))]
    table = tmp_path / "a.csv.gz"
    table.write_bytes(gzip.compress("\n".join(["body,odd,third", *lines]).encode()))
    problem = ("--problem-type", "multi_label_classification")
    columns = ("--text-column", "body", "--label-column", "odd", "--label-column", "third")
    train(encoder, "SEQ_CLS", table, tmp_path / "sets", *problem, *columns)
    assert json.loads(run("eval", tmp_path / "sets", "--data", table))["examples"] == 12
    assert set(json.loads(run("predict", tmp_path / "sets", "good", "--json"))["scores"]) == {"odd", "third"}
    (tmp_path / "b.csv").write_text("\n".join(["text,label", *(line.rsplit(",", 1)[0] for line in lines)]))
    train(encoder, "SEQ_CLS", tmp_path / "b.csv", tmp_path / "named", "--label-names", "even,odd")
    assert json.loads(run("eval", tmp_path / "named", "--data", tmp_path / "b.csv"))["examples"] == 12
    assert json.loads(run("predict", tmp_path / "named", "good", "--json"))["label"] in ("even", "odd")


def test_chats_are_trained_and_answered_by_the_template(tmp_path):
    folder = llama_folder(tmp_path / "llama")
    tokenizer = tiny_tokenizer(causal=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    chat = [{"from": "human", "value": "who is anna ?"}, {"from": "gpt", "value": "very good film"}]
    data = tmp_path / "chat.json"
    data.write_text(json.dumps([{"conversations": chat}] * 8))
    train(folder, "CAUSAL_LM", data, tmp_path / "out", "--epochs", 3, "--lr", "5e-2")
    assert json.loads(run("eval", tmp_path / "out", "--data", data))["examples"] == 8
    more = ("--max-new-tokens", 4)
    said = run("predict", tmp_path / "out", "--file", data, *more).splitlines()
    # What is typed is what a user says, as in training; of messages the answer alone is shown.
    typed = json.loads(run("predict", tmp_path / "out", "who is anna ?", "--json", *more))
    assert said == [typed["text"]] * 8 and len(typed["text"].split()) > 1
    (tmp_path / "plain.jsonl").write_text(json.dumps({"prompt": "who is anna ?"}))
    assert (
        run("predict", tmp_path / "out", "--file", tmp_path / "plain.jsonl", "--json", *more)
        == json.dumps(typed) + "\n"
    )
