"""The command line and its data: named columns and what a run remembers of them, and errors in one line."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from processes import started
from ptv2_fast import PTuningV2Config, get_ptv2_model
from ptv2_fast.cli import app
from ptv2_fast.training import runs
from tiny_folders import bert_folder, llama_folder, toy_examples, toy_file


def run(*arguments: object, stdin: str | None = None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def train(model: Path, task: str, data: Path, output: Path, *more: object):
    settings = ("--epochs", 1, "--batch-size", 8, "--num-virtual-tokens", 2)
    return run("train", "--model", model, "--task", task, "--data", data, "--output", output, *settings, *more)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("llama"))


def one_line(result, *parts: str, code: int = 2) -> None:
    """One line on standard error with all the parts."""
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("ptv2-fast: "), result.stderr
    for part in parts:
        assert part in lines[0], lines[0]


def table(path: Path, header: str, rows: int = 16) -> Path:
    lines = [f"{e['label']}\t{e['text']}" for e in toy_examples("SEQ_CLS", rows)]
    path.write_text("\n".join(filter(None, [header, *lines])) + "\n")
    return path


class TestColumns:
    def test_text_and_label_are_remembered_by_eval_and_predict(self, encoder, tmp_path):
        data = table(tmp_path / "train.tsv", "mood\tbody")
        one_line(train(encoder, "SEQ_CLS", data, tmp_path / "out"), "line 1", "header", "--text-column")
        columns = ("--text-column", "body", "--label-column", "mood")
        assert train(encoder, "SEQ_CLS", data, tmp_path / "out", *columns).exit_code == 0
        scores = json.loads(run("eval", tmp_path / "out", "--data", data).stdout)
        assert scores["examples"] == 16
        said = run("predict", tmp_path / "out", "--file", data, "--json").stdout.splitlines()
        assert [json.loads(line)["text"] for line in said] == [e["text"] for e in toy_examples("SEQ_CLS", 16)]
        # Other data has other columns: flags win over what is remembered, and nothing is guessed.
        (tmp_path / "dev.csv").write_text("said,label\ngood film,positive\n")
        one_line(run("eval", tmp_path / "out", "--data", tmp_path / "dev.csv"), "['body', 'mood']")
        other = ("--text-column", "said", "--label-column", "label")
        assert run("eval", tmp_path / "out", "--data", tmp_path / "dev.csv", *other).exit_code == 0
        (tmp_path / "half.csv").write_text("body,label\ngood film,positive\n")
        assert run("eval", tmp_path / "out", "--data", tmp_path / "half.csv", "--label-column", "label").exit_code == 0
        result = run("predict", tmp_path / "out", "--file", tmp_path / "dev.csv", "--text-column", "said")
        assert result.exit_code == 0 and "good film" in result.stdout
        # Lines of text have no columns.
        (tmp_path / "lines.txt").write_text("good film\n")
        assert run("predict", tmp_path / "out", "--file", tmp_path / "lines.txt").exit_code == 0

    def test_columns_by_number_without_a_header(self, encoder, tmp_path):
        data = table(tmp_path / "train.tsv", "")
        one_line(train(encoder, "SEQ_CLS", data, tmp_path / "out"), "--text-column 2 --label-column 1")
        columns = ("--text-column", 2, "--label-column", 1, "--dev", data)
        result = train(encoder, "SEQ_CLS", data, tmp_path / "out", *columns)
        assert result.exit_code == 0, result.output
        assert json.loads((tmp_path / "out" / "ptv2_config.json").read_text())["config"]["heads"]["task"]["labels"] == [
            "negative",
            "positive",
        ]
        assert json.loads(run("eval", tmp_path / "out", "--data", data).stdout)["examples"] == 16

    def test_prompt_and_completion(self, writer, tmp_path):
        record = {"content": "anna likes the film", "summary": "very good"}
        (tmp_path / "train.jsonl").write_text((json.dumps(record) + "\n") * 8)
        result = train(writer, "CAUSAL_LM", tmp_path / "train.jsonl", tmp_path / "out")
        one_line(result, "'summary'", "--prompt-column", "--completion-column")
        columns = ("--prompt-column", "content", "--completion-column", "summary")
        assert train(writer, "CAUSAL_LM", tmp_path / "train.jsonl", tmp_path / "out", *columns).exit_code == 0
        assert json.loads(run("eval", tmp_path / "out", "--data", tmp_path / "train.jsonl").stdout)["examples"] == 8
        as_text = ("eval", tmp_path / "out", "--data", tmp_path / "train.jsonl", "--text-column", "summary")
        assert run(*as_text).exit_code == 0, "a named text stands against the remembered prompt"
        said = run("predict", tmp_path / "out", "--file", tmp_path / "train.jsonl", "--json", "--max-new-tokens", 2)
        assert json.loads(said.stdout.splitlines()[0])["prompt"] == record["content"]

    def test_pairs_are_asked_for_pairs(self, encoder, tmp_path):
        rows = "good film\tfilm\tyes\nbad film\triver\tno\n" * 4
        (tmp_path / "pairs.tsv").write_text("premise\thypothesis\tlabel\n" + rows)
        assert train(encoder, "SEQ_CLS", tmp_path / "pairs.tsv", tmp_path / "out").exit_code == 0
        assert run("predict", tmp_path / "out", "--file", tmp_path / "pairs.tsv").exit_code == 0
        one_line(run("predict", tmp_path / "out", "good film"), "expected pairs of texts")
        toy_file(tmp_path, "SEQ_CLS", 4)
        labels = "sentence\tlabel\ngood\tyes\n"
        (tmp_path / "single.tsv").write_text(labels)
        one_line(run("eval", tmp_path / "out", "--data", tmp_path / "single.tsv"), "single.tsv", "expected pairs")

    def test_labels_are_no_matter_in_prediction(self, encoder, tmp_path):
        assert train(encoder, "SEQ_CLS", toy_file(tmp_path, "SEQ_CLS", 8), tmp_path / "out").exit_code == 0
        (tmp_path / "new.tsv").write_text("sentence\tlabel\ngood film\tunheard-of\n")
        assert run("predict", tmp_path / "out", "--file", tmp_path / "new.tsv").exit_code == 0


class TestTags:
    def test_iob1_in_training_and_iob2_in_dev_are_one_scheme(self, encoder, tmp_path, caplog):
        rows = toy_examples("TOKEN_CLS", 48)

        def written(name: str, iob1: bool) -> Path:
            sentences = [
                "\n".join(
                    f"{t}\t{tag.replace('B-', 'I-') if iob1 else tag}"
                    for t, tag in zip(r["tokens"], r["tags"], strict=True)
                )
                for r in rows
            ]
            (tmp_path / name).write_text("\n\n".join(sentences) + "\n")
            return tmp_path / name

        files = [written("one.conll", True), written("two.conll", False)]
        more = ("--dev", files[1], "--epochs", 12, "--lr", "3e-2")
        result = train(encoder, "TOKEN_CLS", files[0], tmp_path / "out", *more)
        assert result.exit_code == 0 and caplog.text.count("IOB1 tags are read as IOB2") == 1
        scores = [json.loads(run("eval", tmp_path / "out", "--data", file).stdout) for file in files]
        assert scores[0] == scores[1] and scores[0]["f1"] > 0.5


class TestCounted:
    def test_numbers_of_columns_are_remembered(self, encoder, tmp_path):
        sentences = [zip(e["tokens"], e["tags"], strict=True) for e in toy_examples("TOKEN_CLS", 8)]
        rows = ["".join(f"{n}\t{t}\t{tag}\tO\n" for n, (t, tag) in enumerate(s, 1)) for s in sentences]
        data = tmp_path / "a.conll"
        data.write_text("\n".join(rows))
        one_line(train(encoder, "TOKEN_CLS", data, tmp_path / "out"), "line 1", "counts the tokens")
        more = ("--text-column", 2, "--label-column", 3)
        assert train(encoder, "TOKEN_CLS", data, tmp_path / "out", *more).exit_code == 0
        assert json.loads(run("eval", tmp_path / "out", "--data", data).stdout)["examples"] == 8
        said = run("predict", tmp_path / "out", "--file", data, "--json").stdout.splitlines()
        assert json.loads(said[0])["tokens"] == toy_examples("TOKEN_CLS", 1)[0]["tokens"]


class TestReadme:
    @pytest.mark.parametrize("names", [None, ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG"]])
    def test_the_first_example_and_the_command_line_fit(self, encoder, tmp_path, names):
        from transformers import AutoModelForTokenClassification

        more = {} if names is None else {"id2label": dict(enumerate(names))}
        base = AutoModelForTokenClassification.from_pretrained(encoder, num_labels=7, **more)
        model = get_ptv2_model(base, PTuningV2Config("TOKEN_CLS", num_virtual_tokens=3))
        model.save_pretrained(tmp_path)
        result = run("predict", tmp_path, "anna saw paris", "--json")
        assert result.exit_code == 0, result.output
        assert len(json.loads(result.stdout)["tags"]) == 3

    def test_a_size_that_the_base_has_too_keeps_its_names(self, tmp_path):
        from transformers import AutoModelForSequenceClassification

        folder = bert_folder(tmp_path / "bert")
        names = {0: "a", 1: "b", 2: "c"}
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, id2label=names)
        base.save_pretrained(folder)
        base = AutoModelForSequenceClassification.from_pretrained(folder)
        get_ptv2_model(base, PTuningV2Config("SEQ_CLS", num_virtual_tokens=3)).save_pretrained(tmp_path / "out")
        assert json.loads(run("predict", tmp_path / "out", "good", "--json").stdout)["label"] in "abc"


class TestErrors:
    def test_an_absurd_rate_stops_with_what_to_try(self, encoder, tmp_path):
        data = toy_file(tmp_path, "SEQ_CLS", 16)
        assert train(encoder, "SEQ_CLS", data, tmp_path / "out").exit_code == 0
        before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.is_file()}
        result = train(encoder, "SEQ_CLS", data, tmp_path / "out", "--lr", "1e30", "--overwrite")
        assert result.exit_code == 1
        assert result.stderr.strip().splitlines()[-1].startswith("ptv2-fast: ") and "Traceback" not in result.output
        assert "NaN or infinite" in result.stderr and "smaller learning rate than 1e+30 (--lr)" in result.stderr
        after = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.is_file()}
        assert after == before, "the last good adapter is kept"

    @pytest.mark.parametrize(
        ("error", "code", "part"),
        [
            (OSError(28, "No space left on device", "/out/x"), 2, "/out/x: No space left on device"),
            (PermissionError(13, "Permission denied", "/out"), 2, "/out: Permission denied"),
            (RuntimeError("[enforce fail at inline_container.cc:672]"), 1, "could not be written; is the disk full?"),
            (RuntimeError("two\nlines"), 1, "RuntimeError: two lines (PTV2_FAST_TRACEBACK=1"),
            (StopIteration(), 1, "StopIteration (PTV2_FAST_TRACEBACK=1"),
            (KeyboardInterrupt(), 130, "--num-virtual-tokens 2 --resume"),
        ],
        ids=["full", "read-only", "full-in-torch", "runtime", "bare", "ctrl-c"],
    )
    def test_what_fails_in_training_is_one_line(self, encoder, tmp_path, monkeypatch, error, code, part):
        def failing(*arguments, **options):
            raise error

        monkeypatch.setattr(runs, "fit", failing)
        result = train(encoder, "SEQ_CLS", toy_file(tmp_path, "SEQ_CLS", 8), tmp_path / "out")
        one_line(result, part, code=code)

    def test_the_traceback_is_there_for_who_asks(self, encoder, tmp_path, monkeypatch):
        def failing(*arguments, **options):
            raise RuntimeError("deep inside")

        monkeypatch.setattr(runs, "fit", failing)
        monkeypatch.setenv("PTV2_FAST_TRACEBACK", "1")
        result = train(encoder, "SEQ_CLS", toy_file(tmp_path, "SEQ_CLS", 8), tmp_path / "out")
        assert isinstance(result.exception, RuntimeError)

    def test_what_a_task_does_not_read_is_refused(self, encoder, tmp_path):
        data = toy_file(tmp_path, "SEQ_CLS", 8)
        one_line(train(encoder, "SEQ_CLS", data, tmp_path / "out", "--doc-stride", 8), "--doc-stride", "SEQ_CLS")
        assert not (tmp_path / "out").exists()
        assert train(encoder, "SEQ_CLS", data, tmp_path / "out").exit_code == 0
        one_line(run("predict", tmp_path / "out", "good", "--context", "x"), "--context")
        one_line(run("predict", tmp_path / "out", "good", "--max-new-tokens", 3), "--max-new-tokens", "SEQ_CLS")
        one_line(run("predict", tmp_path / "out", "good", "--text-column", "x"), "--text-column", "--file")
        one_line(run("predict", tmp_path / "out", "--split", "x", stdin="good"), "--split", "--file")

    @pytest.mark.parametrize(("stride", "parts"), [(-1, ("doc_stride", "-1")), (60, ("doc_stride 60",))])
    def test_a_stride_is_what_was_asked_for(self, encoder, tmp_path, stride, parts):
        data = toy_file(tmp_path, "QUESTION_ANS", 8)
        one_line(train(encoder, "QUESTION_ANS", data, tmp_path / "out", "--doc-stride", stride), *parts)
        result = train(encoder, "QUESTION_ANS", data, tmp_path / "out", "--doc-stride", 0, "--max-length", 10)
        assert result.exit_code == 0, result.output
        assert json.loads((tmp_path / "out" / "settings.json").read_text())["doc_stride"] == 0

    def test_an_occupied_folder_names_both_ways_on(self, encoder, tmp_path):
        data = toy_file(tmp_path, "SEQ_CLS", 8)
        one_line(train(encoder, "SEQ_CLS", data, tmp_path), "not empty", "--resume", "--overwrite")

    @pytest.mark.parametrize(
        "arguments",
        [["train"], ["train", "--bogus"], ["--bogus"], ["fly"], ["predict"], ["eval", "x"], ["train", "--epochs", "n"]],
        ids=" ".join,
    )
    def test_usage_errors_are_one_line(self, arguments):
        one_line(run(*arguments), "--help")

    def test_a_damaged_checkpoint_is_passed_over(self, encoder, tmp_path, caplog):
        data = toy_file(tmp_path, "SEQ_CLS", 16)
        more = ("--epochs", 2)
        assert train(encoder, "SEQ_CLS", data, tmp_path / "out", *more).exit_code == 0
        first, last = sorted((tmp_path / "out" / "checkpoints").glob("checkpoint-*"))
        for name, content in (
            ("trainer_state.json", b"[]"), ("optimizer.pt", b"PK\x03\x04no"), ("model.safetensors", b"\x00" * 9),
            ("trainer_state.json", b'{"global_step": 4}'), ("rng_state.pth", b""),
        ):  # fmt: skip
            whole = (last / name).read_bytes()
            (last / name).write_bytes(content)
            result = train(encoder, "SEQ_CLS", data, tmp_path / "out", *more, "--resume")
            assert result.exit_code == 0 and f"{last} is passed over" in caplog.text, result.output
            caplog.clear()
            if not (last / name).is_file() or (last / name).read_bytes() == content:
                (last / name).write_bytes(whole)

    def test_an_empty_context_is_refused(self, encoder, tmp_path):
        data = toy_file(tmp_path, "QUESTION_ANS", 8)
        assert train(encoder, "QUESTION_ANS", data, tmp_path / "out", "--doc-stride", 8).exit_code == 0
        one_line(run("predict", tmp_path / "out", "who is ?", "--context", ""), "--context")
        one_line(run("predict", tmp_path / "out", "who is ?", "--context", " \n"), "--context")
        line = json.dumps({"question": "who is ?", "context": ""})
        one_line(run("predict", tmp_path / "out", stdin=line), "line 1", "'context'")

    def test_a_lone_surrogate_is_refused(self, encoder, tmp_path):
        assert train(encoder, "SEQ_CLS", toy_file(tmp_path, "SEQ_CLS", 8), tmp_path / "out").exit_code == 0
        one_line(run("predict", tmp_path / "out", "good \udcff"), "surrogate")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_in_a_real_process_says_how_to_go_on(encoder, tmp_path):
    data = toy_file(tmp_path, "SEQ_CLS", 64)
    command = ["-m", "ptv2_fast.cli", "train", "--model", encoder, "--task", "SEQ_CLS", "--data", data]
    process = started([*command, "--output", tmp_path / "out", "--epochs", 100000, "--batch-size", 8], tmp_path)
    try:
        until = time.monotonic() + 120
        while not list((tmp_path / "out" / "checkpoints").glob("checkpoint-*")):
            assert process.is_alive() and time.monotonic() < until, (tmp_path / "stderr").read_text()
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
    finally:
        process.kill()
    said = (tmp_path / "stderr").read_text()
    assert process.exitcode == 130, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("ptv2-fast: stopped; to go on") and last.endswith(" --resume"), said
    assert "Traceback" not in said


def test_the_command_that_ctrl_c_names_goes_on(encoder, tmp_path, monkeypatch):
    asked = []

    def stopped(*arguments, resume, **options):
        asked.append(resume)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "fit", stopped)
    data = toy_file(tmp_path, "SEQ_CLS", 8)
    result = train(encoder, "SEQ_CLS", data, tmp_path / "out of it", "--overwrite")
    for _ in range(2):
        assert result.exit_code == 130, result.output
        program, *words = shlex.split(result.stderr.partition("saved: ")[2])
        assert program == "ptv2-fast"
        result = run(*words)
    assert asked == [False, True, True]
