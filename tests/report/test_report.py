"""A page about runs: whole HTML, the numbers of the run, nothing of the data as markup, every task, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ptv2_fast.cli import app
from ptv2_fast.report.asked import asked
from ptv2_fast.report.html import number
from ptv2_fast.report.write import write_report
from ptv2_fast.training.flags import source_of
from ptv2_fast.training.loading import load_trained
from ptv2_fast.training.predict import evaluate
from tiny_folders import bert_folder, llama_folder, toy_examples, toy_file
from tiny_sets import saved_set

ROOT = Path(__file__).parents[2]
_WHOLE = ("meta",)
_TAGS = {
    "html", "head", "meta", "title", "style", "body", "main", "nav", "section", "article", "div", "span", "p", "a",
    "h1", "h2", "h3", "b", "small", "code", "mark", "ul", "li", "dl", "dt", "dd", "table", "caption", "thead",
    "tbody", "tr", "th", "td", "figure", "figcaption", "svg", "line", "text", "polyline", "circle", "rect",
}  # fmt: skip
# Markup that data may hold: the page shows it as it is written.
EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """A page's text; a tag that is not closed, or that no page has, is an error."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.text, self.bold = [], "", ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert tag in _TAGS, tag
        assert not [name for name, _ in attributes if name in ("src", "srcset") or name.startswith("on")]
        assert not [value for name, value in attributes if name == "href" and not value.startswith("#")]
        if tag not in _WHOLE:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
            self.bold += f" {data} " if "b" in self.open and "td" in self.open else ""


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return bert_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def trained(encoder, tmp_path_factory):
    """A classifier, the same again with a shorter prompt, a tagger, and what a search of the first would leave."""
    place = tmp_path_factory.mktemp("runs")
    for name, count in (("train", 24), ("dev", 16)):
        rows = [{**row, "text": f"{row['text']} {EVIL}"} for row in toy_examples("SEQ_CLS", count, len(name))]
        rows = [{**row, "label": "<b>&" if row["label"] == "positive" else row["label"]} for row in rows]
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        toy_file(place, "TOKEN_CLS", count, name)
    runs = (("long", "SEQ_CLS", 5, ".jsonl"), ("short", "SEQ_CLS", 2, ".jsonl"), ("tagger", "TOKEN_CLS", 3, ".conll"))
    for name, task, length, suffix in runs:
        data = ["--data", place / f"train{suffix}", "--dev", place / f"dev{suffix}", "--num-virtual-tokens", length]
        fast = ["--epochs", 2, "--batch-size", 8, "--lr", "1e-2"]
        result = run("train", "--model", encoder, "--task", task, "--output", place / name, *data, *fast)
        assert result.exit_code == 0, result.output
    shutil.copytree(place / "long", place / "found" / "best")
    (place / "found" / "trials.md").write_text(f"| trial | P |\n|---|---|\n| 7 | {EVIL} |\n")
    return place


def _metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_a_page_of_several_runs_has_their_numbers_and_escapes_their_data(trained, tmp_path):
    output = tmp_path / "pages" / "report.html"
    folders = [trained / name for name in ("short", "tagger", "found")]
    result = run("report", *folders, "--output", output, "--examples", 50)
    assert result.exit_code == 0, result.output
    page = Page(output)
    for folder in (trained / "short", trained / "tagger", trained / "long"):
        metrics = _metrics(folder)
        for name, value in metrics["dev"].items():
            # In the table, with the run's facts and, but for the loss, as its predictions have it again.
            assert page.text.count(number(value)) >= (2 if name == "loss" else 3), (folder, name)
        assert f"{metrics['trained_parameters']:,}" in page.text
        assert f"best epoch {metrics['best_epoch']} of 2" in page.text
    # Of both classifiers the better one.
    best = max(_metrics(trained / name)["dev"]["accuracy"] for name in ("short", "long"))
    assert f" {number(best)} " in page.bold
    assert "<b>&" in page.text and EVIL in page.text
    assert "trial" in page.text and "7" in page.text
    assert "://" not in output.read_text(encoding="utf-8")
    assert run("report", trained / "short", "--output", output).exit_code == 0, "an earlier page is replaced"
    assert "tagger" not in Page(output).text


def test_what_is_missing_is_left_out_with_a_sentence(trained, tmp_path):
    bare = shutil.copytree(trained / "short", tmp_path / "bare")
    (bare / "metrics.json").unlink()
    settings = json.loads((bare / "settings.json").read_text())
    (bare / "settings.json").write_text(json.dumps({**settings, "dev": {**settings["dev"], "path": "gone.jsonl"}}))
    text = Page(write_report([bare], tmp_path / "bare.html")).text
    assert "no metrics.json" in text and "gone.jsonl" in text and "Nearest words" in text
    (bare / "settings.json").write_text(json.dumps({**settings, "dev": None}))
    assert "--data names some" in Page(write_report([bare], tmp_path / "bare.html")).text
    judged = Page(write_report([bare], tmp_path / "bare.html", data=trained / "dev.jsonl", examples=1)).text
    assert number(_metrics(trained / "short")["dev"]["accuracy"]) in judged
    (bare / "metrics.json").write_text('{"metric": "accuracy", "dev": {"accuracy": null}, "history": [{"loss": null}]}')
    assert "accuracy" in Page(write_report([bare, trained / "long"], tmp_path / "bare.html")).text
    (bare / "metrics.json").write_text('{"history": [{"epoch": 1, "loss": NaN}, {"epoch": 2, "loss": Infinity}]}')
    assert "No curves were written down for bare" in Page(write_report([bare], tmp_path / "bare.html")).text
    (bare / "metrics.json").write_text('{"history": [7]}')
    with pytest.raises(ValueError, match="metrics.json is damaged: history"):
        write_report([bare], tmp_path / "bare.html")
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        write_report([bare], tmp_path / "other.html", data="gone.jsonl")


def test_runs_say_in_what_they_differ(trained, tmp_path):
    """A base or data of the same last name in another folder is another one; a name of a folder may be no text."""
    other = shutil.copytree(trained / "short", tmp_path / "short-\udcff")
    settings = json.loads((other / "settings.json").read_text())
    settings |= {"data": {**settings["data"], "path": "elsewhere/train.jsonl"}, "max_length": 77}
    settings["fit"] |= {"gradient_accumulation": 4, "schedule": "exponential"}
    (other / "settings.json").write_text(json.dumps(settings))
    text = Page(write_report([trained / "short", other], tmp_path / "two.html")).text
    assert "short-?" in text and "elsewhere/train.jsonl" in text and "8 × 4 accumulated" in text
    alike = text[text.index("The same in all") :].split(".\n")[0].split("What was trained")[0]
    for name in ("data", "tokens of a row", "schedule", "batch"):
        assert f"{name} " not in alike, name
    assert "base bert" in alike and "pooling mean" in alike


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Adapters of the other tasks over a decoder, without a file about their training, and data for each."""
    place = tmp_path_factory.mktemp("others")
    names = ("chat", "qa", "topics", "mood", "choice", "find", "poet")
    saved_set(place / "set", llama_folder(place / "llama"), names)
    rows = {
        "chat": [{"prompt": f"{EVIL} the film", "completion": " was good"}] * 3,
        "qa": toy_examples("QUESTION_ANS", 6),
        "topics": [{"text": "the film", "labels": ["film"]}, {"text": "the bank of rome", "labels": ["bank", "river"]}],
        "mood": [
            {"text": "good film", "label": 2.5},
            {"text": "bad film", "label": -1},
            {"text": "a tower", "label": 0},
        ],
        "choice": [{"text": "the film was", "choices": ["good", f"bad {EVIL}"], "label": i % 2} for i in range(5)],
        "find": [{"query": f"{word} ?", "positive": f"the {word}"} for word in ("film", "tower", "river")],
    }
    rows["poet"] = rows["chat"]
    for name, examples in rows.items():
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, examples)))
    return place


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("chat", "Continued greedily"),
        ("qa", "Worst answers"),
        ("topics", "Each label"),
        ("mood", "Furthest off"),
        ("choice", "Most confident mistakes"),
        ("find", "Rankings are judged as a whole"),
        ("poet", "no vocabulary is near them"),
    ],
)
def test_every_task_has_scores_and_what_is_worst(others, tmp_path, name, says):
    data = others / f"{name}.jsonl"
    page = Page(write_report([others / "set" / name], tmp_path / "page.html", data=data))
    assert says in page.text
    loaded = load_trained(others / "set" / name)
    scores = evaluate(loaded.model, loaded.codec, loaded.read(source_of(str(data), {})))
    for score, value in scores.items():
        if score != "loss":
            assert number(value) in page.text, score


def test_what_cannot_be_is_refused_before_torch_is_imported(tmp_path):
    folder = tmp_path / "run"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "notes.html").write_text("<p>mine</p>")
    code = "import sys\nfrom ptv2_fast.cli import app\ntry:\n    app()\nfinally:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "report", folder], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (2, "False"), done.stderr
    assert done.stderr.startswith("ptv2-fast: ") and "holds no finished run" in done.stderr
    shutil.copy(__file__, folder / "sub" / "ptv2_model.safetensors")
    with pytest.raises(ValueError, match="holds several runs; name their folders: sub"):
        asked([folder], tmp_path / "page.html")
    good = folder / "sub"
    assert asked([good], tmp_path / "page.html").names == ("sub",)
    for wrong, words in (
        ({"runs": []}, "at least one folder"),
        ({"runs": [tmp_path / "gone"]}, "does not exist"),
        ({"runs": [tmp_path / "notes.html"]}, "is a file"),
        ({"runs": [good, folder / "." / "sub"]}, "named twice"),
        ({"output": folder}, "is a folder"),
        ({"output": tmp_path / "notes.html"}, "not overwritten"),
        ({"output": tmp_path / "notes.html" / "page.html"}, "is a file"),
        ({"data": "gone.tsv"}, "gone.tsv"),
        ({"examples": 0}, "positive integer"),
    ):
        given = {"runs": [good], "output": tmp_path / "page.html", **wrong}
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            asked(given.pop("runs"), given.pop("output"), **given)
