"""What is said of data before anything is trained: its task, labels, what looks wrong; and what is written of it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ptv2_fast.cli import app
from ptv2_fast.training.data import DataSource, read_examples
from ptv2_fast.training.data.guess import guess_task
from ptv2_fast.training.data.shown import facts_of_data, lines_of_facts
from ptv2_fast.training.data.write import write_examples
from tiny_folders import tiny_tokenizer

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
MULTI, NUMBERS = "multi_label_classification", "regression"


def write(folder, name, content):
    path = folder / name
    text = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "content", "task", "problem"),
    [
        ("a.csv", "text,label\nfine day,1\nbad day,0\n", "SEQ_CLS", None),
        ("a.csv", "text,score\nfine day,4.5\nbad day,1\n", "SEQ_CLS", NUMBERS),
        ("a.csv", "text,label\nfine day,4.5\nbad day,1\n", "SEQ_CLS", NUMBERS),
        ("a.csv", "text,label\nfine day,1\nbad day,0\nno day,nan\nold day,\n", "SEQ_CLS", None),
        ("a.csv", "text,label\nfine day,4.5\nbad day,1\nno day,nan\n", "SEQ_CLS", NUMBERS),
        ("a.csv", "text,labels\nfine day,a|b\nbad day,a\n", "SEQ_CLS", MULTI),
        ("a.csv", "text,toxic,rude\nfine day,0,0\nbad day,1,\n", "SEQ_CLS", MULTI),
        ("a.csv", "text,toxic,rude\nfine day,0,0\nbad day,1,0\n", "SEQ_CLS", MULTI),
        ("a.csv", "query,positive\nwho is it,anna is\nwhere,there\n", "SENTENCE_RETRIEVAL", None),
        ("a.txt", "once upon a time\nthere was\n", "CAUSAL_LM", None),
        ("a.txt", "Anna B-PER\nsings O\n\nBob S-PER\n", "TOKEN_CLS", None),
        ("a.conllu", "1\ta\ta\tDET\t_\t_\t0\troot\t_\t_\n", "TOKEN_CLS", None),
        ("a.jsonl", [{"tokens": ["a"], "ner_tags": ["O"]}], "TOKEN_CLS", None),
        ("a.jsonl", [{"text": "Anna", "label": [[0, 4, "PER"]]}], "TOKEN_CLS", None),
        ("a.jsonl", [{"text": "Anna", "label": ["a", "b"]}], "SEQ_CLS", MULTI),
        ("a.jsonl", [{"text": "Anna", "label": ["a"]}, {"text": "Bob", "label": ["b"]}], "SEQ_CLS", None),
        ("a.jsonl", [{"question": "who", "context": "Anna", "answers": []}], "QUESTION_ANS", None),
        ("a.jsonl", [{"premise": "a", "choice1": "b", "choice2": "c", "question": "cause", "label": 0}],
         "MULTIPLE_CHOICE", None),
        ("a.jsonl", [{"messages": CHAT}], "CAUSAL_LM", None),
        ("a.jsonl", [{"instruction": "Add", "input": "1", "output": "2"}], "CAUSAL_LM", None),
        ("a.jsonl", [{"prompt": "2+2=", "completion": "4"}], "CAUSAL_LM", None),
    ],
)  # fmt: skip
def test_a_task_is_guessed_with_its_reason(tmp_path, name, content, task, problem):
    facts = facts_of_data(DataSource(str(write(tmp_path, name, content))))
    assert (facts["task"], facts["problem_type"]) == (task, problem) and facts["guess"]["because"]


def test_a_folder_of_tagged_words_is_looked_into(tmp_path):
    for name in ("train.txt", "dev.txt"):
        write(tmp_path, name, "Anna B-PER\nsings O\n")
    facts = facts_of_data(DataSource(str(tmp_path)))
    assert facts["task"] == "TOKEN_CLS" and list(facts["splits"]) == ["train", "validation"]
    assert facts["in_both"]["train and validation"]["rows"] == 1


@pytest.mark.parametrize(
    ("name", "labels"),
    [("entities", [["0", "4", "PER"]]), ("spans", [{"begin": 0, "end": 4}]), ("cats", {"good": 1.0, "bad": 0.0})],
)
def test_labels_that_cannot_be_read_leave_no_bare_text(tmp_path, name, labels):
    path = write(tmp_path, "a.jsonl", [{"text": "Bob", name: []}, {"text": "Anna", name: labels}])
    with pytest.raises(ValueError, match=f"TOKEN_CLS: .*expected spans of 'text'.*CAUSAL_LM: '{name}' holds lists"):
        guess_task(path, {})


def test_what_fits_no_task_says_what_each_lacks(tmp_path):
    path = write(tmp_path, "a.jsonl", [{"a": 1, "b": 2}])
    with pytest.raises(ValueError, match=r"--task says.*TOKEN_CLS: .*SEQ_CLS: .*CAUSAL_LM: "):
        guess_task(path, {})


ROWS = ["text,label", "fine day,good", "bad day,bad", "fine day,bad", " ,good", "grey day,", "new day,good"]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("said")
    tiny_tokenizer().save_pretrained(folder)
    train = write(folder, "train.csv", "\n".join(ROWS))
    dev = write(folder, "dev.csv", "text,label\nfine day,good\nother day,odd\n")
    facts = facts_of_data(DataSource(str(train)), DataSource(str(dev)), tokenizer=str(folder))
    return facts, "\n".join(lines_of_facts(facts))


def test_every_trouble_is_counted_and_has_its_row(said):
    facts, text = said
    train = facts["splits"]["train"]
    assert (train["rows"], train["refused"], train["empty"]) == (4, 2, 1)
    assert train["labels"] == {"good": 2, "bad": 2}
    assert train["duplicates"]["rows"] == train["duplicates"]["differing"] == 1
    assert facts["in_both"]["train and dev"]["rows"] == 1 and facts["unseen_labels"] == ["odd"]
    assert train["words"]["max"] == 2 and train["tokens"]["max"] == 4
    for part in ("train.csv, line 5: expected text", "line 6: expected a label", "line 4 repeats", "line 2 is"):
        assert part in text, text
    for part in ("guessed by the columns 'text', 'label'", "(--task, --problem-type)", "label   good: 2", "odd"):
        assert part in text, text


def test_labels_that_do_not_go_together_leave_no_row_to_use(tmp_path):
    numbers = write(tmp_path, "a.jsonl", [{"tokens": ["Anna"], "ner_tags": [1]}, {"tokens": ["a"], "ner_tags": [0]}])
    facts = facts_of_data(DataSource(str(numbers)))
    split = facts["splits"]["data"]
    assert split["labels"] == {"1": 1, "0": 1} and split["refused"] == 0
    assert "got 1; label_names (--label-names)" in split["unusable"]
    assert "warning   no row can be used, as labels stand:" in list(lines_of_facts(facts))
    with pytest.raises(ValueError, match=r"--to writes data that can be used: .*--label-names"):
        facts_of_data(DataSource(str(numbers)), to=tmp_path / "b.jsonl")
    alike = facts_of_data(DataSource(str(write(tmp_path, "c.csv", "text,label\na,1\nb,1\n"))))
    assert any("all 2 examples are of one class, '1'" in note for note in alike["notes"])


EXAMPLES = {
    "SEQ_CLS": [{"text": 'a "b", c', "label": "1"}, {"text": "d\ne", "label": "x"}],
    "TOKEN_CLS": [{"tokens": ["#", "a b"], "tags": ["B-x", "I-x"]}, {"tokens": ["c"], "tags": ["O"]}],
    "QUESTION_ANS": [
        {"id": "7", "question": "Who?", "context": "Anna", "answers": {"text": ["Anna"], "answer_start": [0]}}
    ],
    "CAUSAL_LM": [{"messages": CHAT}],
    "SENTENCE_RETRIEVAL": [{"query": "a", "positive": "b"}],
}
HELD = [
    (task, suffix)
    for task in EXAMPLES
    for suffix in (".jsonl", ".parquet", *((".csv",) if task in ("SEQ_CLS", "SENTENCE_RETRIEVAL") else ()))
]


@pytest.mark.parametrize(("task", "suffix"), [*HELD, ("TOKEN_CLS", ".conll")])
def test_what_is_written_is_read_again(tmp_path, task, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"out{suffix}"
    write_examples(path, EXAMPLES[task], task)
    assert read_examples(path, task) == EXAMPLES[task]
    with pytest.raises(FileExistsError, match="not overwritten"):
        write_examples(path, EXAMPLES[task], task)


@pytest.mark.parametrize(
    ("problem", "labels"), [(MULTI, {"labels": ["a", "b"]}), (NUMBERS, {"label": 0.5})], ids=["sets", "numbers"]
)
def test_other_problems_are_written_too(tmp_path, problem, labels):
    for suffix in (".jsonl", ".csv"):
        write_examples(tmp_path / f"out{suffix}", [{"text": "a b", **labels}], "SEQ_CLS", problem)


@pytest.mark.parametrize(
    ("name", "task", "examples", "part"),
    [
        ("a.xml", "SEQ_CLS", EXAMPLES["SEQ_CLS"], "suffix of .jsonl"),
        ("a.csv", "TOKEN_CLS", EXAMPLES["TOKEN_CLS"], "write a .jsonl"),
        ("a.conll", "SEQ_CLS", EXAMPLES["SEQ_CLS"], "write a .jsonl"),
        ("a.conll", "TOKEN_CLS", [{"tokens": ["a\nb"], "tags": ["O"]}], "a.conll"),
        ("a.csv", "SEQ_CLS", [{"text": "a\rb", "label": "x"}], "a.csv"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_and_leaves_nothing(tmp_path, name, task, examples, part):
    with pytest.raises(ValueError, match=part):
        write_examples(tmp_path / name, examples, task)
    assert not list(tmp_path.iterdir())


def test_the_command_says_it_without_loading_a_model(tmp_path):
    path = write(tmp_path, "a.jsonl", [{"text": "Anna sings", "label": [[0, 4, "PER"]]}])
    arguments = ["data", str(path), "--to", str(tmp_path / "a.conll"), "--json"]
    code = f"""
import sys
from typer.testing import CliRunner
from ptv2_fast.cli import app
result = CliRunner().invoke(app, {arguments!r})
assert result.exit_code == 0, result.output
print(sorted({{"torch", "transformers", "datasets", "numpy", "pyarrow"}} & set(sys.modules)))
print(result.stdout)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded, facts = done.stdout.split("\n", 1)
    assert loaded == "[]" and json.loads(facts)["task"] == "TOKEN_CLS"
    assert (tmp_path / "a.conll").read_text() == "Anna\tB-PER\nsings\tO\n"


def test_errors_of_the_command_are_one_line(tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    for name in ("train.csv", "dev.csv"):
        write(both, name, "text,label\na b,1\nc d,0\n")
    result = CliRunner().invoke(app, ["data", str(both), "--to", str(tmp_path / "out.csv")])
    assert result.exit_code == 2 and "--split" in result.stderr and result.stderr.count("\n") == 1
    result = CliRunner().invoke(app, ["data", str(both)])
    assert result.exit_code == 0 and "2 rows are in" in result.stdout
