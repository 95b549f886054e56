"""The command line: ptv2-fast data | train | search | eval | predict | report | export | info.

Errors are one line on standard error; bad input has exit code 2, before anything is written. Everything
heavy is imported inside the commands, so that help is instant.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError as error:  # pragma: no cover
    raise SystemExit("ptv2-fast: the command line needs `pip install ptv2-fast[train]`") from error

from ptv2_fast import __version__
from ptv2_fast.training import devices
from ptv2_fast.training.flags import COLUMNS, numbers
from ptv2_fast.training.flags import request_of as _request
from ptv2_fast.training.options import (
    AdapterArgument,
    BatchOption,
    CompletionColumn,
    Content,
    DataOption,
    DeviceOption,
    FormatOption,
    HeadOption,
    Init,
    Injection,
    LabelColumn,
    LengthOption,
    ModelOption,
    NamesOption,
    OneOption,
    Pooling,
    ProblemOption,
    PromptColumn,
    Schedule,
    SchemeOption,
    SomeOption,
    SplitOption,
    Task,
    TextColumns,
)
from ptv2_fast.training.shell import OneLineGroup, Resumable, quiet

app = typer.Typer(
    cls=OneLineGroup,
    help="P-Tuning v2: train, score and use prompts for frozen transformers models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_DEEP, _KEYS_AND_VALUES = Injection("deep"), Content("kv")


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ptv2-fast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """P-Tuning v2: train, score and use prompts for frozen transformers models."""


@app.command()
def train(
    data: DataOption,
    output: Annotated[Path, typer.Option(help="Folder for the adapter, metrics.json and curves.png.")],
    model: ModelOption = None,
    task: Annotated[Task | None, typer.Option(help="What to train for.")] = None,
    dev: Annotated[str | None, typer.Option(help="Development data; chooses the best epoch.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Settings of a published run; flags override it.")] = None,
    injection: Annotated[Injection, typer.Option(help="How prompts enter the model.")] = _DEEP,
    num_virtual_tokens: Annotated[
        int | None, typer.Option(help="P, the prompt's length [64; tags 32, shallow 20, text 16].")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Prompted layers, as in 0,1,-1 [all].")] = None,
    init: Annotated[Init | None, typer.Option(help="What prompts start as [text].")] = None,
    reparameterization: Annotated[int | None, typer.Option(help="Hidden size of the prompt's MLP.")] = None,
    prompt_dropout: Annotated[float, typer.Option(help="Dropout on the prompts.")] = 0.0,
    pooling: Annotated[Pooling | None, typer.Option(help="What of a row is read: by a head, or as its vector.")] = None,
    problem_type: ProblemOption = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate [0.01; tags 0.02, text 0.005].")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data [10; text 3].")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a batch [32].")] = None,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches of a step.")] = 1,
    schedule: Annotated[Schedule | None, typer.Option(help="How the rate falls [linear].")] = None,
    max_length: LengthOption = None,
    doc_stride: Annotated[int | None, typer.Option(help="Tokens that windows of a context share [128].")] = None,
    early_stopping: Annotated[int | None, typer.Option(help="Epochs without a better dev metric.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Arithmetic in bfloat16.")] = False,
    split: SplitOption = None,
    dev_split: Annotated[str | None, typer.Option(help="Split for --dev; without --dev, of --data.")] = None,
    text_column: TextColumns = None,
    label_column: LabelColumn = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    format: FormatOption = None,
    tag_scheme: SchemeOption = None,
    label_names: NamesOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train anew in --output.")] = False,
    device: DeviceOption = None,
) -> None:
    """Train a prompt (and a head) for a frozen model; leave the adapter folder, metrics and curves."""
    chosen = dict(locals())
    devices.choose(device)
    from ptv2_fast.training.checked import check_run

    request = _request(chosen)
    checked = check_run(request, output, resume=resume, overwrite=overwrite)
    quiet()
    from ptv2_fast.training.runs import build

    place = devices.device_of(device)
    run = build(checked, device and place.type)
    run.model.print_trainable_parameters()
    try:
        result = run.execute(title=request.task_type)
    except KeyboardInterrupt:
        raise Resumable from None
    scores = ", ".join(f"{name} {value:.4f}" for name, value in result.scores.items())
    typer.echo(
        f"{output}: best epoch {result.best_epoch} of {result.epochs:g}{': ' + scores if scores else ''} "
        f"({result.seconds:.0f} s, {result.tokens_per_second:.0f} tokens/s)"
    )


@app.command()
def search(
    data: DataOption,
    dev: Annotated[str, typer.Option(help="Development data; compares the trials.")],
    output: Annotated[Path, typer.Option(help="Folder for the table, the plot and the best run.")],
    model: ModelOption = None,
    task: Annotated[Task | None, typer.Option(help="What to train for.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Runs in all, earlier ones in --output included.")] = 20,
    injection: Annotated[str, typer.Option(help="Injections to choose from, between commas.")] = "deep",
    num_virtual_tokens: Annotated[str, typer.Option(help="Values of P, between commas.")] = "8,20,64",
    lr: Annotated[str, typer.Option(help="Lowest and highest learning rate.")] = "1e-3,5e-2",
    recipe: Annotated[str | None, typer.Option(help="Settings of a published run; flags override it.")] = None,
    problem_type: ProblemOption = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data [10; text 3].")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a batch [32].")] = None,
    max_length: LengthOption = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Arithmetic in bfloat16.")] = False,
    text_column: TextColumns = None,
    label_column: LabelColumn = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    format: FormatOption = None,
    tag_scheme: SchemeOption = None,
    label_names: NamesOption = None,
    device: DeviceOption = None,
) -> None:
    """Search P, learning rate and injection by the dev metric; leave a table, a plot and the best run."""
    asked = {name: value for name, value in locals().items() if name in _SHARED_WITH_TRAIN}
    devices.choose(device)
    from ptv2_fast.training.search import SearchSpace, check_search, run_search

    lengths, rates = numbers("--num-virtual-tokens", num_virtual_tokens, int), numbers("--lr", lr, float)
    if len(rates) != 2:
        raise ValueError(f"--lr must be two numbers, as in 1e-3,5e-2; got {lr!r}")
    space = SearchSpace(lengths, rates, tuple(name.strip() for name in injection.split(",")))
    request = _request({**_TRAIN_DEFAULTS, **asked})
    checked = check_search(request, output, space, trials=trials)
    quiet()
    place = devices.device_of(device)
    found = run_search(checked, say=typer.echo, device=device and place.type)
    best = found[0]
    chosen = f"{best.injection}, P {best.num_virtual_tokens}, lr {best.learning_rate:.2e}"
    typer.echo(f"{output / 'best'}: {chosen}: {best.score:.4f}")


@app.command("eval")
def evaluate_adapter(
    adapter: AdapterArgument,
    data: DataOption,
    one: OneOption = None,
    model: ModelOption = None,
    split: SplitOption = None,
    text_column: TextColumns = None,
    label_column: LabelColumn = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    format: FormatOption = None,
    tag_scheme: SchemeOption = None,
    label_names: NamesOption = None,
    max_length: LengthOption = None,
    batch_size: BatchOption = 32,
    head: HeadOption = None,
    device: DeviceOption = None,
) -> None:
    """Score an adapter on labelled data; metrics as JSON on standard output."""
    given = dict(locals())
    devices.choose(device)
    from ptv2_fast.training.asking import scores_of
    from ptv2_fast.training.run_folder import plain_json

    typer.echo(plain_json(scores_of(adapter, one, data, given)))


@app.command()
def predict(
    adapter: AdapterArgument,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; none reads standard input.")] = None,
    file: Annotated[str | None, typer.Option(help="Data file, labels not needed.")] = None,
    context: Annotated[str | None, typer.Option(help="What the questions are about (QUESTION_ANS).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    some: SomeOption = None,
    model: ModelOption = None,
    max_length: LengthOption = None,
    split: SplitOption = None,
    text_column: TextColumns = None,
    label_column: LabelColumn = None,
    prompt_column: PromptColumn = None,
    format: FormatOption = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of generated text [64].")] = None,
    candidates: Annotated[str | None, typer.Option(help="File of texts to rank (SENTENCE_RETRIEVAL).")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Of the candidates for each text [10].")] = None,
    batch_size: BatchOption = 32,
    head: HeadOption = None,
    device: DeviceOption = None,
) -> None:
    """Classes, numbers, tags, answers, choices, rankings or continued text for texts, a file or standard input.

    Of a folder with several adapters all answer each text, in shared batches: one record a text, with a field for each
    adapter. A row of --file, or a line of texts that is a JSON object, may name the "adapter" that alone answers it.
    """
    given = dict(locals())
    if texts and file:
        raise ValueError("give texts or --file, not both")
    if file is None and (unread := [flag for flag in ("split", *COLUMNS) if given.get(flag)]):
        raise ValueError(f"--{unread[0].replace('_', '-')} is read with --file alone")
    devices.choose(device)
    from ptv2_fast.training.asking import Question, records, records_together
    from ptv2_fast.training.described import several_in
    from ptv2_fast.training.lines import line_of, lines_of
    from ptv2_fast.training.run_folder import plain_json

    asked = Question(file, texts or sys.stdin, "text" if texts else "standard input", context, given)
    names = several_in(adapter, some)
    if len(names) > 1:
        for record in records_together(adapter, names, asked):
            typer.echo(plain_json(record) if as_json else lines_of(record, names))
        return
    for record in records(adapter, next(iter(names), None), asked):
        typer.echo(plain_json(record) if as_json else line_of(record))


@app.command("data")
def show_data(
    path: Annotated[str, typer.Argument(help="File, folder of files, or a `datasets` name.")],
    dev: Annotated[str | None, typer.Option(help="Development data, compared with it.")] = None,
    task: Annotated[Task | None, typer.Option(help="What it is for; guessed if not given.")] = None,
    problem_type: ProblemOption = None,
    split: SplitOption = None,
    dev_split: Annotated[str | None, typer.Option(help="Split for --dev.")] = None,
    text_column: TextColumns = None,
    label_column: LabelColumn = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    format: FormatOption = None,
    tag_scheme: SchemeOption = None,
    label_names: NamesOption = None,
    model: Annotated[str | None, typer.Option(help="Folder with a tokenizer.json, to count tokens.")] = None,
    to: Annotated[Path | None, typer.Option(help="File to write: .jsonl, .csv, .conll or .parquet.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """What was understood of data, and what looks wrong in it, before anything is trained; no model is loaded."""
    flags = dict(locals())
    from ptv2_fast.training.data.shown import facts_of_data, lines_of_facts
    from ptv2_fast.training.flags import source_of

    held_out = None if dev is None else source_of(dev, {**flags, "split": dev_split})
    options = {"task": task and task.value, "problem_type": problem_type and problem_type.value}
    facts = facts_of_data(source_of(path, flags), held_out, **options, tokenizer=model, to=to)
    typer.echo(json.dumps(facts, ensure_ascii=False) if as_json else "\n".join(lines_of_facts(facts)))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `train` or `search` left.")],
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    data: Annotated[str | None, typer.Option(help="Labelled data to judge on; else each run's own --dev.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Most rows of a list.")] = 20,
    device: DeviceOption = None,
) -> None:
    """One HTML page about runs: settings, scores, curves, mistakes, prompts; several runs beside one another."""
    from ptv2_fast.report.asked import asked

    devices.choose(device)
    wanted = asked(runs, output, data=data, examples=examples)
    quiet()
    from ptv2_fast.report.write import write

    page = write(replace(wanted, device=devices.device_of(device)))
    typer.echo(f"{page}: {len(runs)} run{'s' if len(runs) > 1 else ''}")


@app.command()
def export(
    adapter: AdapterArgument,
    output: Annotated[Path, typer.Option(help="Safetensors file to write.")],
    content: Annotated[
        Content, typer.Option(help="Keys and values per layer, or input embeddings.")
    ] = _KEYS_AND_VALUES,
    one: OneOption = None,
    model: ModelOption = None,
) -> None:
    """Trained prompts as plain tensors, for servers that know nothing of this package."""
    from ptv2_fast.training.plans import plan_of

    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"--output must be a file to write, in a folder that is there; got {output}")
    plan = plan_of(adapter, adapter=one, model=model)
    quiet()
    from ptv2_fast.saving.export import export_prompts
    from ptv2_fast.training.loading import load_plan

    export_prompts(load_plan(plan).model, output, content.value)
    typer.echo(f"{output}: {content.value} of {adapter if one is None else Path(adapter, one)}")


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="Adapter folder, model folder, .gguf file or hub name.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """What an adapter is, or what prompts for a model would cost; no weights are loaded."""
    from ptv2_fast.training.info import facts_of

    facts = facts_of(name)
    for index, one in enumerate(facts):
        if as_json:
            typer.echo(json.dumps(one, ensure_ascii=False))
            continue
        if index:
            typer.echo()
        width = max(map(len, one))
        for key, value in one.items():
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            typer.echo(f"{key:<{width}}  {shown}")


# Flags of `search` that mean what they mean in `train`, and what `train` has where `search` has no flag.
_SHARED_WITH_TRAIN = (
    "data", "dev", "model", "task", "recipe", "problem_type", "epochs", "batch_size", "max_length", "seed", "bf16",
    "text_column", "label_column", "prompt_column", "completion_column", "format", "tag_scheme", "label_names",
)  # fmt: skip
_TRAIN_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(inspect.signature(train).parameters),
    "injection": _DEEP,
    "prompt_dropout": 0.0,
    "gradient_accumulation": 1,
}


main: Callable[[], None] = app


if __name__ == "__main__":
    main()
