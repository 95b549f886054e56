"""From folders of runs to a page: what they say, what their models say, section by section."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ptv2_fast.report.asked import Asked, asked
from ptv2_fast.report.classes import class_body
from ptv2_fast.report.compare import compare_section, trials_section
from ptv2_fast.report.curves import curves_section
from ptv2_fast.report.head import head_section, tiles
from ptv2_fast.report.html import Html, Section, el, join, note
from ptv2_fast.report.judged import Judged, judge
from ptv2_fast.report.others import answer_body, choice_body, labels_body, number_body, texts_body
from ptv2_fast.report.page import Part, page
from ptv2_fast.report.prompts import prompts_section
from ptv2_fast.report.run import Run, read_runs
from ptv2_fast.report.tags import tag_body
from ptv2_fast.storage.files import write_whole
from ptv2_fast.training.loading import LoadedAdapter, load_plan
from ptv2_fast.training.plans import plan_of
from ptv2_fast.training.records import records_of

# What is shown of predictions, by what the task's row says it predicts.
BODIES: Mapping[str, Callable[[Judged, int], Html]] = {
    "class": class_body,
    "tags": tag_body,
    "number": number_body,
    "labels": labels_body,
    "answer": answer_body,
    "choice": choice_body,
}
# Texts that are generated: each costs a forward for every token.
_GENERATED, _NEW_TOKENS = 5, 40


def write_report(
    runs: Sequence[str | Path],
    output: str | Path = "report.html",
    *,
    data: str | Path | None = None,
    examples: int = 20,
) -> Path:
    r"""Write one HTML file about finished runs, which needs no other file and no network.

    Args:
        runs: folders of `ptv2-fast train`, or of `ptv2-fast search`, of which the best run is meant.
        output: the page; an earlier report is replaced, nothing else is.
        data: labelled data to judge all runs on; None means each run's own development data.
        examples: the most rows that a list of the page shows.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: a run or the data is not there.
        ValueError: a folder holds no finished run, the page cannot be where it shall be, or `data` cannot be read.

    Example:
        ```python
        from pathlib import Path

        from transformers import AutoModel, BertConfig, BertModel, BertTokenizer

        from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model
        from ptv2_fast.report.write import write_report

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fine", "poor", "film"]
        BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained("base")
        BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)).save_pretrained("base")
        head = HeadConfig("SEQ_CLS", 2, labels=["bad", "good"])
        config = PTuningV2Config("SEQ_CLS", heads={"opinion": head})
        get_ptv2_model(AutoModel.from_pretrained("base"), config).save_pretrained("adapter")

        Path("test.csv").write_text("text,label\nfine film,good\npoor film,bad\n")
        page = write_report(["adapter"], "report.html", data="test.csv")
        assert "Predictions" in page.read_text()
        ```
    """
    return write(asked(runs, output, data=data, examples=examples))


def write(asked: Asked) -> Path:
    """Write the page that is asked for; see `write_report`."""
    runs = read_runs(asked)
    judged, parts = [], []
    for run in runs:
        found, sections = _about(run, asked)
        judged.append(found)
        parts.append(Part(run.name, sections))
    shared = [curves_section(runs)]
    if len(runs) > 1:
        shared.insert(0, compare_section(runs, judged))
    text = page(shared, parts)
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    # Names of folders may hold bytes that are no text.
    write_whole(asked.output, lambda path: path.write_text(text, encoding="utf-8", errors="replace"))
    return asked.output


def _about(run: Run, asked: Asked) -> tuple[Judged | str, list[Section]]:
    """The sections of one run, and what its model said; the model is gone afterwards."""
    sections = [head_section(run)]
    if run.trials:
        sections.append(trials_section(run))
    try:
        loaded = load_plan(plan_of(run.folder), device=asked.device)
    except (OSError, ValueError) as error:
        why = f"The model cannot be loaded, so predictions and prompts are left out: {error}"
        return why, [*sections, Section("Predictions", note(why))]
    judged = judge(loaded, run, asked.data)
    sections.append(_predictions(loaded, run, judged, asked.examples))
    return judged, [*sections, prompts_section(loaded)]


def _predictions(loaded: LoadedAdapter, run: Run, judged: Judged | str, most: int) -> Section:
    if isinstance(judged, str):
        return Section("Predictions", note(judged))
    rows = f"over {len(judged.examples):,} rows of {judged.source}"
    body = BODIES[judged.kind](judged, most) if judged.kind in BODIES else _without(loaded, judged)
    return Section("Predictions", join([tiles(judged.scores, run.metric, rows), body]))


def _without(loaded: LoadedAdapter, judged: Judged) -> Html:
    """What is shown of tasks whose predictions are not compared row by row."""
    if judged.kind != "text":
        return note("Rankings are judged as a whole: no single rows are shown.")
    prompts = [example for example in judged.examples if "prompt" in example][:_GENERATED]
    records = list(records_of(loaded, prompts, max_new_tokens=_NEW_TOKENS))
    return el("div", texts_body(records, [example["completion"] for example in prompts]))
