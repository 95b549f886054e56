"""The scripts of examples/, run as they stand, on tiny models and a few rows whose answers single words decide."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from processes import started
from ptv2_fast import PTuningV2Model
from ptv2_fast.training.loading import load_trained
from ptv2_fast.training.predict import predict
from tiny_folders import bert_folder, llama_folder, tiny_bert, tiny_tokenizer, toy_examples, toy_file

EXAMPLES = Path(__file__).parents[2] / "examples"
KEPT = {"ptv2_model.safetensors", "ptv2_config.json"}
MAX_LINES = 100
LONGER = {"one_model_many_tasks": 160, "serve": 210, "engine": 200}
FAST = ("--epochs", 10, "--lr", 0.05, "--batch-size", 8, "--num-virtual-tokens", 8)
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ ' [END]' if m['role'] == 'assistant' else ' ? ' }}{% endfor %}"


def _in_another_process(command: list[object], *, stdout: int, text: bool, check: bool):
    """`subprocess.run` of a Python script, without the seconds that its imports take."""
    assert (command[0], stdout, text, check) == (sys.executable, subprocess.PIPE, True, True)
    with tempfile.TemporaryDirectory() as said:
        process = started(command[1:], Path(said))
        process.join()
        assert process.exitcode == 0, (Path(said) / "stderr").read_text()
        return subprocess.CompletedProcess(command, 0, (Path(said) / "stdout").read_text())


def _run(folder: Path, name: str, *arguments: object) -> str:
    """Runs `python examples/<name>.py <arguments>` in a folder; what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(subprocess, "run", _in_another_process)
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return printed.getvalue()


def _data(folder: Path, task_type: str, names: dict[str, int]) -> Path:
    folder.mkdir(exist_ok=True)
    for seed, (name, count) in enumerate(names.items()):
        toy_file(folder, task_type, count, name=name, seed=seed)
    return folder


def _number(pattern: str, output: str) -> float:
    found = re.search(pattern + r" (\d+\.\d+)", output)
    assert found, f"{pattern!r} is not in:\n{output}"
    return float(found[1])


def _losses(checkpoints: Path) -> list[float]:
    """The training losses of the last checkpoint's log."""
    last = max(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [record["loss"] for record in history if "loss" in record]


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def ner(tmp_path_factory):
    """The folder in which the NER script ran, and what it printed."""
    folder = tmp_path_factory.mktemp("ner")
    data = _data(folder / "conll", "TOKEN_CLS", {"train": 96, "dev": 16, "test": 16})
    return folder, _run(folder, "ner_wnut17", "--model", bert_folder(folder / "bert"), "--data", data, *FAST)


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory):
    """The same for the sentiment script."""
    folder = tmp_path_factory.mktemp("sentiment")
    data = _data(folder / "tsv", "SEQ_CLS", {"train": 96, "dev": 32})
    return folder, _run(folder, "sentiment_sst2", "--model", bert_folder(folder / "bert"), "--data", data, *FAST)


def test_ner_tags_the_held_out_sentences(ner):
    folder, output = ner
    assert "trainable: " in output
    assert _number("dev entity F1", output) > 0.8
    assert _number("test entity F1", output) > 0.8
    prompt = folder / "ner-prompt"
    assert _files(prompt) == KEPT
    assert json.loads((prompt / "ptv2_config.json").read_text())["config"]["num_virtual_tokens"] == 8
    losses = _losses(prompt / "checkpoints")
    assert losses[-1] < 0.5 * losses[0]


def test_sentiment_classifies_the_dev_sentences(sentiment):
    folder, output = sentiment
    found = _number("dev accuracy", output)
    assert found > 0.8
    assert _files(folder / "sentiment-prompt") == KEPT
    # What was saved is what was scored: the best epoch, read again over the untouched base.
    loaded = PTuningV2Model.from_pretrained(tiny_bert(), folder / "sentiment-prompt")
    examples = toy_examples("SEQ_CLS", 32, seed=1)
    batch = tiny_tokenizer()([example["text"] for example in examples], padding=True, return_tensors="pt")
    with torch.no_grad():
        guesses = loaded(**batch).logits.argmax(-1)
    names = loaded.ptv2_config["default"].heads["task"].labels
    right = [names[guess] == example["label"] for guess, example in zip(guesses, examples, strict=True)]
    assert sum(right) / len(right) == pytest.approx(found, abs=1e-4)


def test_several_tasks_share_one_batch(ner, sentiment):
    texts = ("good great fine film met anna", "in rome the bad poor awful film")
    folders = ("--sentiment", sentiment[0] / "sentiment-prompt", "--ner", ner[0] / "ner-prompt")
    output = _run(ner[0], "several_tasks_one_batch", *texts, "--model", ner[0] / "bert", *folders)
    first, second = output.split(texts[1])
    assert "sentiment: positive" in first and "sentiment: negative" in second
    assert re.findall(r"(B-\w+): (\w+)", first) == [("B-PER", "anna")]
    assert re.findall(r"(B-\w+): (\w+)", second) == [("B-LOC", "rome")]


def test_question_answering_reads_squad_and_answers(tmp_path):
    model = bert_folder(tmp_path / "bert")
    data = tmp_path / "squad"
    data.mkdir()
    for seed, (name, count) in enumerate({"train-v1.1": 64, "dev-v1.1": 16}.items()):
        paragraphs = []
        for example in toy_examples("QUESTION_ANS", count, seed):
            answers = [{"text": t, "answer_start": s} for t, s in zip(*example["answers"].values(), strict=True)]
            question = {"id": example["id"], "question": example["question"], "answers": answers}
            paragraphs.append({"context": example["context"], "qas": [question]})
        (data / f"{name}.json").write_text(json.dumps({"data": [{"title": "toy", "paragraphs": paragraphs}]}))
    output = _run(tmp_path, "question_answering", "--model", model, "--data", data, *FAST)
    assert _number("dev answer F1", output) > 60
    assert re.search(r"where is \? -> \w+", output)
    assert _files(tmp_path / "qa-prompt") == KEPT
    losses = _losses(tmp_path / "qa-prompt" / "checkpoints")
    assert losses[-1] < 0.7 * losses[0]


@pytest.fixture
def chat(tmp_path):
    """A chat model's folder, and conversations in which each question has one answer."""
    model = llama_folder(tmp_path / "llama")
    tokenizer = tiny_tokenizer(causal=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    turns = {"who is in paris": "anna likes paris", "where is bob": "bob met lee in rome"}
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in turns.items()
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in rows * 8) + "\n")
    return model


def test_sft_learns_the_replies_and_says_them(chat, tmp_path):
    fast = ("--epochs", 24, "--lr", 0.1, "--batch-size", 4, "--num-virtual-tokens", 8)
    output = _run(tmp_path, "sft_causal_lm", "--model", chat, "--ask", "where is bob", *fast)
    assert _number("at the first step,", output) < 0.2 * _number("loss", output)
    assert output.rstrip().endswith("reply: bob met lee in rome")
    assert _files(tmp_path / "sft-prompt") == KEPT
    # Prompts alone are trained and saved: keys and values of 8 virtual tokens in 2 layers with 2 heads of 8.
    saved = load_file(tmp_path / "sft-prompt" / "ptv2_model.safetensors")
    assert [tuple(tensor.shape) for tensor in saved.values()] == [(2, 2, 2, 8, 8)]


def test_sft_learns_replies_alone(chat):
    encode = runpy.run_path(str(EXAMPLES / "sft_causal_lm.py"))["encode"]
    tokenizer = tiny_tokenizer(causal=True)
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "who is bob"}, {"role": "assistant", "content": "bob likes rome"}]
    row = encode(messages, tokenizer)
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(learned) == "bob likes rome [END]"
    assert tokenizer.decode(row["input_ids"][: -len(learned)]) == "who is bob ?"
    assert encode(messages, tokenizer, max_length=5)["input_ids"] == row["input_ids"][-5:]
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(ValueError, match="chat template"):
        encode(messages, tokenizer)


def test_one_model_chats_tags_and_classifies(chat, tmp_path):
    fast = ("--epochs", 2, "--lr", 0.05, "--num-virtual-tokens", 4, "--sentences", 24, "--repeats", 1)
    output = _run(tmp_path, "one_model_many_tasks", "--model", chat, *fast)
    # The last three lines but one are another process's, which has read what this one saved.
    *_, reply, tagged, spam, cost = output.splitlines()
    model = PTuningV2Model.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(chat), tmp_path / "three-prompts"
    )
    for name, task in (("chat", "CAUSAL_LM"), ("ner", "TOKEN_CLS"), ("spam", "SEQ_CLS")):
        assert model.ptv2_config[name].task_type == task
        assert _number(f"{name}: loss", output) > _number(rf"{name}: loss \S+ in the first epoch,", output)
        assert f"MiB in {Path('three-prompts', name)}" in output
        assert _files(tmp_path / "three-prompts" / name) == KEPT
    assert reply.startswith("When do you open? -> ")
    words = [part.rpartition("/") for part in tagged.split()]
    assert [word for word, _, _ in words] == "Ada Lovelace met Charles in Paris .".split()
    assert {tag for _, _, tag in words} <= set(model.ptv2_config["ner"].heads["ner"].labels)
    # The command line reads the tagger where the example has trained it.
    loaded = load_trained(tmp_path / "three-prompts", adapter="ner", model=str(chat))
    (tags,) = predict(loaded.model, loaded.codec, [{"tokens": [word for word, _, _ in words]}])
    assert [tag for _, _, tag in words] == list(tags.value)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat)
    text = "Claim your free prize today"
    model.set_adapter("spam")
    with torch.no_grad():
        guess = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits.argmax(-1)
    assert spam == f"{text} -> {['ham', 'spam'][int(guess)]}"
    assert re.fullmatch(r"one pass: \d+ ms, the bare model \d+ ms, x\d+\.\d\d", cost)


def test_packed_training_falls_back_to_eager_steps(tmp_path):
    model = bert_folder(tmp_path / "bert")
    data = _data(tmp_path / "tsv", "SEQ_CLS", {"train": 96, "dev": 32})
    output = _run(tmp_path, "packed_training", "--model", model, "--data", data, *FAST)
    losses = [float(loss) for loss in re.findall(r"epoch \d+: loss (\d+\.\d+)", output)]
    assert len(losses) == 10 and losses[-1] < 0.5 * losses[0]
    assert _number("dev accuracy", output) > 0.8
    captured = int(re.search(r"captured in CUDA graphs: (\d+)", output)[1])
    assert (captured > 0) == torch.cuda.is_available()
    assert _files(tmp_path / "packed-prompt") == KEPT


def test_vit_prompts_learn_the_digits_that_the_model_has_not_seen(tmp_path):
    fast = ("--epochs", 10, "--lr", 0.05, "--num-virtual-tokens", 4)
    output = _run(tmp_path, "vit_prompts", "--first-epochs", 1, "--batch-size", 128, *fast)
    assert _number("prompts: dev accuracy", output) > 0.4  # of five digits
    assert _number("head: dev accuracy", output) > 0.4
    saved = load_file(tmp_path / "digits-prompt" / "ptv2_model.safetensors")
    assert saved["encoder.prompts"].shape == (4, 4, 64) and saved["base_heads.classifier.weight"].shape == (5, 64)
    assert _files(tmp_path / "digits-prompt") == KEPT


def test_vit_prompts_take_a_model_of_ones_own(tmp_path):
    config = transformers.ViTConfig(
        image_size=12, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    output = _run(tmp_path, "vit_prompts", "--model", tmp_path / "vit", "--epochs", 1, "--lr", 0.05, "--batch-size", 64)
    assert _number("prompts: dev accuracy", output) >= 0
    saved = load_file(tmp_path / "digits-prompt" / "ptv2_model.safetensors")
    assert saved["encoder.prompts"].shape == (2, 8, 32)


def test_the_deep_tutorial_learns_both_tasks_and_loads_what_it_saved(tmp_path):
    fast = ("--epochs", 60, "--lr", 0.03, "--prompt-length", 4)
    output = _run(tmp_path, "tutorial_deep", "--model", bert_folder(tmp_path / "bert"), *fast)
    losses = [float(loss) for loss in re.findall(r"Epoch \d+, Loss: (\d+\.\d+)", output)]
    assert len(losses) == 60 and losses[-1] < 0.5 * losses[0]
    # Of what the second model says, which has read the file.
    assert "the film was very good: positive" in output and "a poor film: negative" in output
    assert "anna/PER met/O bob/PER in/O paris/LOC" in output
    saved = torch.load(tmp_path / "tutorial-deep.pt")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items() if "prompt" in name} == {
        f"prompt_encoder.prompts.{layer}.weight": (4, 32) for layer in (0, 1)
    }
    assert len(saved) == 6


def test_the_evolving_tutorial_trains_its_prompts_alone(tmp_path):
    names = ("vocab-size", "d-model", "num-layers", "num-heads", "d-ff", "prefix-len", "seq-len", "epochs")
    sizes = [
        word for name, size in zip(names, (12, 32, 2, 4, 48, 5, 9, 12), strict=True) for word in (f"--{name}", size)
    ]
    output = _run(tmp_path, "tutorial_evolving", *sizes, "--lr", 0.1)
    losses = [float(loss) for loss in re.findall(r"Epoch \d+, Loss: (\d+\.\d+)", output)]
    assert len(losses) == 12 and sum(losses[-4:]) < sum(losses[:4])
    assert re.findall(r"gradient: (.+)", output) == ["prompt_embeddings (5, 32)"]
    assert torch.load(tmp_path / "tutorial-evolving.pt")["prompt_embeddings"].shape == (5, 32)


def test_the_readme_lists_every_script_with_a_command_that_it_takes(monkeypatch):
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    commands = re.findall(r"python examples/(\w+\.py)((?: [^\n`]+)?)", readme)
    assert {name for name, _ in commands} == scripts
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name, arguments in commands:
        options_of = runpy.run_path(str(EXAMPLES / name))["options_of"]
        monkeypatch.setattr(sys, "argv", [name, *re.findall(r'"[^"]*"|\S+', arguments)])
        options_of()


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.stem)
def test_examples_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGER.get(path.stem, MAX_LINES)
