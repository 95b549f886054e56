"""A folder with several adapters on the command line: what each answers there is what its own folder gives."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model
from ptv2_fast.cli import app
from ptv2_fast.training.loading import load_all, load_trained
from ptv2_fast.training.predict import evaluate
from ptv2_fast.training.requests import typed_requests
from ptv2_fast.training.together import answers_of
from tiny_folders import bert_folder, llama_folder, toy_file
from tiny_sets import CONFIGS, saved_set

TEXTS = ["anna saw the film", "the river bank was very good in rome", "bob", "the bad film of lee in oslo was poor"]
CONTEXT = " ".join(["the", "film", "of", "anna", "met", "bob", "in", "rome"] * 4)
READERS = tuple(name for name in CONFIGS if name not in ("chat", "poet"))


def run(*arguments: object, stdin: str | None = None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def records(*arguments: object, stdin: str | None = None) -> list[dict]:
    result = run(*arguments, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def refused(result, *parts: str) -> None:
    """One line on standard error that holds all the parts, nothing on standard output, exit code 2."""
    assert result.exit_code == 2 and result.stdout == "", result.output
    (line,) = result.stderr.strip().splitlines()
    assert [part for part in parts if part not in line] == [], line


def same(found, alone) -> bool:
    """Equal up to the rounding of another batch."""
    if isinstance(alone, dict):
        return found.keys() == alone.keys() and all(same(found[key], alone[key]) for key in alone)
    if isinstance(alone, list):
        return len(found) == len(alone) and all(map(same, found, alone))
    return math.isclose(found, alone, abs_tol=2e-5) if isinstance(alone, float) else found == alone


def with_windows(folder: Path) -> Path:
    """The set with a setting of its training in one folder, by which a long context becomes several rows."""
    (folder / "qa" / "settings.json").write_text(json.dumps({"row_length": 16, "doc_stride": 4}))
    return folder


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def everything(writer, tmp_path_factory) -> Path:
    return with_windows(saved_set(tmp_path_factory.mktemp("all"), writer, tuple(CONFIGS)))


@pytest.fixture(scope="module")
def readers(encoder, tmp_path_factory) -> Path:
    return with_windows(saved_set(tmp_path_factory.mktemp("readers"), encoder, READERS))


def picked(*names: str) -> list[str]:
    return [part for name in names for part in ("--adapter", name)]


OF_TEXTS = ("chat", "poet", "ner", "spam", "topics", "mood", "find")


def test_every_text_is_answered_by_every_adapter_as_by_its_own_folder(everything):
    alone = {name: records("predict", everything / name, *TEXTS) for name in OF_TEXTS}
    for name in OF_TEXTS:
        assert alone[name] == records("predict", everything, *TEXTS, "--adapter", name)
    for batch_size in (1, 32):
        found = records("predict", everything, *TEXTS, *picked(*OF_TEXTS), "--batch-size", batch_size)
        assert [list(record) for record in found] == [["text", *OF_TEXTS]] * len(TEXTS)
        assert [record["text"] for record in found] == TEXTS
        for name in OF_TEXTS:
            assert same([record[name] for record in found], alone[name]), (name, batch_size)
        assert len({record["chat"]["text"] for record in found} | {record["poet"]["text"] for record in found}) > 2
        assert len({json.dumps(record["ner"]["tags"]) for record in found}) > 1


def test_an_encoder_s_adapters_share_their_batches_too(readers):
    names = [name for name in OF_TEXTS if name in READERS]
    found = records("predict", readers, *TEXTS, *picked(*names))
    for name in names:
        assert same([record[name] for record in found], records("predict", readers / name, *TEXTS)), name


@pytest.mark.parametrize("folder", ["everything", "readers"])
def test_rows_of_a_file_say_who_answers_them(folder, tmp_path, request):
    """Groups, windows and tagged words among them; without a name all that are asked for answer."""
    folder = request.getfixturevalue(folder)
    own = {
        "qa": [
            {"id": "a", "question": "who is ?", "context": CONTEXT},
            {"id": "b", "question": "where is ?", "context": "bob met anna"},
        ],
        "choice": [
            {"text": "the film", "choices": ["was good", "was very bad in rome"]},
            {"text": "bob", "choices": ["saw", "met"]},
        ],
        "ner": [{"tokens": ["anna", "saw", "rome"]}, {"tokens": ["bob"]}],
        "find": [{"text": text} for text in TEXTS[:2]],
    }
    rows = [{"adapter": name, "note": i, **made[i]} for i in range(2) for name, made in own.items()]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = records("predict", folder, "--file", file, *picked(*own))
    assert [{key: value for key, value in record.items() if key not in own} for record in found] == rows
    for name, made in own.items():
        (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, made)) + "\n")
        alone = records("predict", folder / name, "--file", tmp_path / "own.jsonl")
        assert same([record[name] for record in found if name in record], alone), name
    assert sum(len(set(own) & set(record)) for record in found) == len(rows)
    assert same(records("predict", folder, *picked(*own), stdin=file.read_text()), found)


def test_lines_are_texts_or_rows(everything):
    lines = [TEXTS[0], json.dumps({"text": TEXTS[1], "adapter": "spam"}), "", json.dumps({"text": TEXTS[2]})]
    found = records("predict", everything, *picked("spam", "ner"), stdin="\n".join(lines))
    assert [list(record) for record in found] == [
        ["text", "spam", "ner"],
        ["text", "adapter", "spam"],
        ["text", "spam", "ner"],
    ]
    assert found[1]["spam"] == records("predict", everything / "spam", TEXTS[1])[0]


def test_questions_may_be_texts_about_a_context(readers):
    found = records("predict", readers, "who is ?", *picked("qa", "spam"), "--context", CONTEXT)
    alone = records("predict", readers / "qa", "who is ?", "--context", CONTEXT)
    assert same([found[0]["qa"]], alone) and found[0]["spam"]["text"] == "who is ?"


def test_candidates_are_ranked(everything, tmp_path):
    (tmp_path / "all.txt").write_text("\n".join(TEXTS))
    options = ["--candidates", tmp_path / "all.txt", "--top", 2]
    found = records("predict", everything, *TEXTS[:2], *picked("find", "chat"), *options)
    assert same([record["find"] for record in found], records("predict", everything / "find", *TEXTS[:2], *options))


def test_the_lines_for_people_name_the_adapter(everything):
    shown = run("predict", everything, *TEXTS[:2], *picked("ner", "spam")).stdout
    alone = [run("predict", everything / name, text).stdout for text in TEXTS[:2] for name in ("ner", "spam")]
    expected = [
        f"{name}\t{line}"
        for name, text in zip(("ner", "spam") * 2, alone, strict=True)
        for line in text.strip().split("\n")
    ]
    assert [line for line in shown.split("\n") if line] == expected


def test_a_batch_of_all_is_one_pass(everything):
    """The first pass of generate has all rows, later ones those that write; where none does, one forward has all."""
    members = load_all(everything, adapters=["chat", "ner", "spam"])
    passes = []
    layer = members["chat"].model.backbone.layers[0].self_attn.q_proj
    hook = layer.register_forward_hook(lambda module, inputs, output: passes.append(output.shape[0]))
    assert len(
        list(
            answers_of(
                members, typed_requests({name: one.reader for name, one in members.items()}, TEXTS), max_new_tokens=3
            )
        )
    ) == len(TEXTS)
    assert passes == [3 * len(TEXTS), len(TEXTS), len(TEXTS)]
    passes.clear()
    only = {name: members[name] for name in ("ner", "spam")}
    list(answers_of(only, typed_requests({name: one.reader for name, one in only.items()}, TEXTS)))
    hook.remove()
    assert passes == [2 * len(TEXTS)]


def test_eval_and_export_take_one_of_them(readers, tmp_path):
    data = toy_file(tmp_path, "QUESTION_ANS", 8)
    scores = [run("eval", *where, "--data", data) for where in ((readers, "--adapter", "qa"), (readers / "qa",))]
    assert scores[0].exit_code == 0 and scores[0].stdout == scores[1].stdout
    for place, where in (("a", (readers, "--adapter", "spam")), ("b", (readers / "spam",))):
        result = run("export", *where, "--output", tmp_path / f"{place}.safetensors")
        assert result.exit_code == 0 and str(readers / "spam") in result.stdout, result.output
    first, second = (load_file(tmp_path / f"{place}.safetensors") for place in "ab")
    assert first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)
    refused(run("eval", readers, "--data", data), "name one of its folders")
    refused(run("eval", readers, "--data", data, "--adapter", "none"), "adapter must be one of", "'none'")


def test_info_lists_all(readers):
    facts = [json.loads(line) for line in run("info", readers, "--json").stdout.splitlines()]
    assert {one["name"]: one["task_type"] for one in facts} == {name: CONFIGS[name].task_type for name in READERS}
    parts = run("info", readers).stdout.strip().split("\n\n")
    assert [part.split("\n")[0].split()[1] for part in parts] == [str(readers / name) for name in sorted(READERS)]


def test_trained_runs_in_one_folder_keep_their_settings(encoder, tmp_path):
    """Lengths, labels and columns are of each run, and all runs call their adapter the same."""
    data = tmp_path / "rows.csv"
    data.write_text("body,kind\n" + "".join(f"{text},{kind}\n" for text, kind in zip(TEXTS, "aabb", strict=True)))
    fast = ["--epochs", 1, "--num-virtual-tokens", 2]
    columns = ["--text-column", "body", "--label-column", "kind"]
    for task, name, file, more in (
        ("SEQ_CLS", "kind", data, [*columns, "--max-length", 4]),
        ("TOKEN_CLS", "tags", toy_file(tmp_path, "TOKEN_CLS", 8), ["--max-length", 12]),
    ):
        output = tmp_path / "runs" / name
        result = run("train", "--model", encoder, "--task", task, "--data", file, "--output", output, *fast, *more)
        assert result.exit_code == 0, result.output
    members = load_all(tmp_path / "runs")
    assert {name: member.codec.max_length for name, member in members.items()} == {"kind": 4, "tags": 12}
    assert members["kind"].columns == {"text_column": ("body",), "label_column": "kind"}
    rows = [{"body": text, "text": text} for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = records("predict", tmp_path / "runs", "--file", tmp_path / "rows.jsonl")
    alone = records("predict", tmp_path / "runs" / "kind", "--file", tmp_path / "rows.jsonl")
    assert same([record["kind"] for record in found], alone)
    assert same([record["tags"] for record in found], records("predict", tmp_path / "runs" / "tags", *TEXTS))


def test_a_folder_with_a_single_one_below_is_that_one(encoder, tmp_path):
    folder = saved_set(tmp_path / "set" / "spam", encoder, ("spam",))
    assert records("predict", tmp_path / "set", TEXTS[0]) == records("predict", folder, TEXTS[0])


def test_folders_may_have_names_that_no_adapter_can(readers, tmp_path):
    """Dots, names of torch's own, and names that differ by case alone."""
    folders = {"spam.v2": "spam", "train": "ner", "Mood": "mood", "mood": "topics", "adapter_0": "find"}
    for name, own in folders.items():
        shutil.copytree(readers / own, tmp_path / name)
    found = records("predict", tmp_path, *TEXTS)
    assert list(found[0]) == ["text", *sorted(folders)]
    for name, own in folders.items():
        assert same([record[name] for record in found], records("predict", readers / own, *TEXTS)), name


def test_python_loads_all_over_one_base(readers):
    members = load_all(readers)
    assert list(members) == sorted(READERS) and len({id(member.model) for member in members.values()}) == 1
    examples = [{"text": text, "label": "positive"} for text in TEXTS]
    spam, alone = members["spam"].chosen(), load_trained(readers, adapter="spam")
    assert evaluate(spam.model, spam.codec, examples) == evaluate(alone.model, alone.codec, examples)
    with pytest.raises(ValueError, match="holds a single adapter; expected several"):
        load_all(readers / "spam")


def test_a_copied_head_shares_no_base(encoder, tmp_path):
    base = transformers.AutoModelForSequenceClassification.from_pretrained(encoder)
    get_ptv2_model(base, PTuningV2Config("SEQ_CLS", num_virtual_tokens=2)).save_pretrained(tmp_path / "own")
    saved_set(tmp_path / "spam", encoder, ("spam",))
    refused(
        run("predict", tmp_path, "text"), f"{tmp_path / 'own'} holds a copy of its base's own head", "--adapter own"
    )
    assert records("predict", tmp_path, TEXTS[0], "--adapter", "own") == records("predict", tmp_path / "own", TEXTS[0])


@pytest.mark.parametrize(
    ("arguments", "stdin", "parts"),
    [
        (["--adapter", "gone"], "x", ["adapter must be one of", "'gone'"]),
        ([], json.dumps({"text": "x", "adapter": "gone"}), ["line 1", "'gone'", "'adapter'"]),
        ([], json.dumps({"text": "x", "adapter": 3}), ["line 1", "got 3"]),
        ([], json.dumps({"text": "x", "adapter": ["spam"]}), ["line 1", "got ['spam']"]),
        ([], json.dumps({"text": "x", "spam": "y"}), ["line 1", "'spam'", "named like adapters"]),
        ([], "who is ?", ["adapter 'choice'", "line 1", "'adapter'"]),
        (picked("qa", "spam"), "who is ?", ["adapter 'qa'", "context"]),
        (picked("spam", "ner"), json.dumps({"text": " "}), ["adapter 'spam'", "line 1"]),
        (picked("spam", "ner"), json.dumps({"other": "x"}), ["adapter 'spam'", "line 1"]),
        (picked("spam", "ner"), "\n \n", ["at least one line with text"]),
        (picked("spam", "ner"), json.dumps({"text": "\ud800"}), ["line 1", "surrogate"]),
        ([*picked("spam", "ner"), "--max-new-tokens", 3], "x", ["--max-new-tokens"]),
        ([*picked("spam", "ner"), "--top", 3], "x", ["--candidates and --top"]),
        ([*picked("spam", "ner"), "--context", "x"], "x", ["--context"]),
        ([*picked("spam", "ner"), "--head", "none"], "x", None),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(readers, arguments, stdin, parts):
    result = run("predict", readers, *arguments, stdin=stdin)
    if parts is None:
        assert result.exit_code == 0, result.output
    else:
        refused(result, *parts)


def test_adapters_of_two_bases_are_refused(encoder, tmp_path):
    saved_set(tmp_path / "set" / "spam", encoder, ("spam",))
    other = tmp_path / "other"
    bert_folder(other)
    saved_set(tmp_path / "set" / "ner", other, ("ner",))
    refused(run("predict", tmp_path / "set", "x"), "must be of one base", str(encoder), str(other))
    assert len(records("predict", tmp_path / "set", "x", "--model", encoder)) == 1


def test_adapters_with_several_heads_are_asked_by_head(encoder, tmp_path):
    heads = {"a": HeadConfig("SEQ_CLS", 2, labels=("x", "y")), "b": HeadConfig("SEQ_CLS", 2, labels=("u", "v"))}
    both = PTuningV2Config("SEQ_CLS", num_virtual_tokens=2, heads=heads)
    folder = saved_set(tmp_path / "set", encoder, ("spam",), both=both)
    found = records("predict", folder, *TEXTS, "--head", "b")
    assert same([record["both"] for record in found], records("predict", folder / "both", *TEXTS, "--head", "b"))
    assert {record["both"]["label"] for record in found} <= {"u", "v"}
    refused(run("predict", folder, "x"), str(folder / "both"), "head must be one of a, b")
