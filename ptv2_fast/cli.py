"""The command line: ptv2-fast train | search | eval | predict | report | export | info.

Errors are one line on standard error; bad input has exit code 2, before anything is written. Everything
heavy is imported inside the commands, so that help is instant.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError as error:  # pragma: no cover
    raise SystemExit("ptv2-fast: the command line needs `pip install ptv2-fast[train]`") from error

from ptv2_fast import choices
from ptv2_fast.task_types import PROBLEM_TYPES, TRAINED_TASKS
from ptv2_fast.training.flags import COLUMNS, numbers
from ptv2_fast.training.flags import request_of as _request
from ptv2_fast.training.shell import OneLineGroup, quiet

app = typer.Typer(
    cls=OneLineGroup,
    help="P-Tuning v2: train, score and use prompts for frozen transformers models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Task(str, Enum):
    """What is trained for."""

    _ignore_ = "word"
    for word in TRAINED_TASKS:
        vars()[word] = word


class Injection(str, Enum):
    """How prompts enter the model."""

    _ignore_ = "word"
    for word in choices.INJECTIONS:
        vars()[word] = word


class Init(str, Enum):
    """What prompts start as."""

    _ignore_ = "word"
    for word in choices.INITS:
        vars()[word] = word


class Pooling(str, Enum):
    """What a classification head reads of a row."""

    _ignore_ = "word"
    for word in choices.POOLINGS:
        vars()[word] = word


class Problem(str, Enum):
    """What a classification head solves."""

    _ignore_ = "word"
    for word in PROBLEM_TYPES:
        vars()[word] = word


class Content(str, Enum):
    """What an export holds."""

    _ignore_ = "word"
    for word in choices.EXPORTS:
        vars()[word] = word


class Schedule(str, Enum):
    """How the learning rate falls."""

    _ignore_ = "word"
    for word in choices.SCHEDULES:
        vars()[word] = word


_DEEP, _KEYS_AND_VALUES = Injection("deep"), Content("kv")
ModelOption = Annotated[str | None, typer.Option(help="Hub name, folder, or .gguf file.", metavar="NAME_OR_PATH")]
DataOption = Annotated[str, typer.Option(help="CSV, TSV, JSON(L), CoNLL or text file; or a `datasets` name.")]
SplitOption = Annotated[str | None, typer.Option(help="Split of a `datasets` name.")]
TextColumns = Annotated[list[str] | None, typer.Option("--text-column", help="Twice for pairs; a number (no header).")]
LabelColumn = Annotated[str | None, typer.Option(help="Column with the label or the tags.")]
PromptColumn = Annotated[str | None, typer.Option(help="Column to go on from (CAUSAL_LM).")]
CompletionColumn = Annotated[str | None, typer.Option(help="Column to go on with (CAUSAL_LM).")]
ProblemOption = Annotated[Problem | None, typer.Option(help="What a SEQ_CLS head solves; one class if not given.")]
LengthOption = Annotated[int | None, typer.Option(min=2, help="Most tokens of a row.")]
AdapterArgument = Annotated[str, typer.Argument(help="Folder of a trained adapter, or of several.")]
OneOption = Annotated[str | None, typer.Option("--adapter", help="Which one, of a folder with several.")]
SomeOption = Annotated[
    list[str] | None, typer.Option("--adapter", help="Which ones, of a folder with several; all if not given.")
]
HeadOption = Annotated[str | None, typer.Option(help="Which head, where there are several.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Rows of a batch.")]


@app.command()
def train(
    data: DataOption,
    output: Annotated[Path, typer.Option(help="Folder for the adapter, metrics.json and curves.png.")],
    model: ModelOption = None,
    task: Annotated[Task | None, typer.Option(help="What to train for.")] = None,
    dev: Annotated[str | None, typer.Option(help="Development data; chooses the best epoch.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Settings of a published run; flags override it.")] = None,
    injection: Annotated[Injection, typer.Option(help="How prompts enter the model.")] = _DEEP,
    num_virtual_tokens: Annotated[int | None, typer.Option(help="P, the prompt's length [20].")] = None,
    layers: Annotated[str | None, typer.Option(help="Prompted layers, as in 0,1,-1 [all].")] = None,
    init: Annotated[Init | None, typer.Option(help="What prompts start as [text].")] = None,
    reparameterization: Annotated[int | None, typer.Option(help="Hidden size of the prompt's MLP.")] = None,
    prompt_dropout: Annotated[float, typer.Option(help="Dropout on the prompts.")] = 0.0,
    pooling: Annotated[Pooling | None, typer.Option(help="What of a row is read: by a head, or as its vector.")] = None,
    problem_type: ProblemOption = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate [0.01].")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data [10].")] = None,
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train anew in --output.")] = False,
) -> None:
    """Train a prompt (and a head) for a frozen model; leave the adapter folder, metrics and curves."""
    chosen = dict(locals())
    quiet()
    from ptv2_fast.training.runs import prepare

    request = _request(chosen)
    run = prepare(request, output, resume=resume, overwrite=overwrite)
    run.model.print_trainable_parameters()
    result = run.execute(title=request.task_type)
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
    epochs: Annotated[int | None, typer.Option(help="Passes over the data [10].")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a batch [32].")] = None,
    max_length: LengthOption = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Arithmetic in bfloat16.")] = False,
    text_column: TextColumns = None,
    label_column: LabelColumn = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
) -> None:
    """Search P, learning rate and injection by the dev metric; leave a table, a plot and the best run."""
    asked = {name: value for name, value in locals().items() if name in _SHARED_WITH_TRAIN}
    quiet()
    from ptv2_fast.training.search import SearchSpace
    from ptv2_fast.training.search import search as run_search

    lengths, rates = numbers("--num-virtual-tokens", num_virtual_tokens, int), numbers("--lr", lr, float)
    if len(rates) != 2:
        raise ValueError(f"--lr must be two numbers, as in 1e-3,5e-2; got {lr!r}")
    space = SearchSpace(lengths, rates, tuple(injection.split(",")))
    request = _request({**_TRAIN_DEFAULTS, **asked})
    found = run_search(request, output, space, trials=trials, say=typer.echo)
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
    max_length: LengthOption = None,
    batch_size: BatchOption = 32,
    head: HeadOption = None,
) -> None:
    """Score an adapter on labelled data; metrics as JSON on standard output."""
    quiet()
    from ptv2_fast.training.flags import source_of
    from ptv2_fast.training.loading import load_trained
    from ptv2_fast.training.predict import evaluate
    from ptv2_fast.training.run_folder import plain_json

    given = dict(locals())
    loaded = load_trained(adapter, adapter=one, model=model, max_length=max_length, head=head)
    examples = loaded.read(source_of(data, given, loaded.columns))
    loaded.check_parts(data, examples)
    features = loaded.codec.encode(examples)
    options: dict[str, Any] = {"features": features, "batch_size": batch_size, "head": head}
    scores = evaluate(loaded.model, loaded.codec, examples, **options)
    typer.echo(plain_json({**scores, "examples": len(examples)}))


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
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of generated text [64].")] = None,
    candidates: Annotated[str | None, typer.Option(help="File of texts to rank (SENTENCE_RETRIEVAL).")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Of the candidates for each text [10].")] = None,
    batch_size: BatchOption = 32,
    head: HeadOption = None,
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
    quiet()
    from ptv2_fast.training.asking import Question, records, records_together
    from ptv2_fast.training.described import several_in
    from ptv2_fast.training.records import line_of
    from ptv2_fast.training.run_folder import plain_json
    from ptv2_fast.training.together import lines_of

    asked = Question(file, texts or sys.stdin, "text" if texts else "standard input", context, given)
    names = several_in(adapter, some)
    if len(names) > 1:
        for record in records_together(adapter, names, asked):
            typer.echo(plain_json(record) if as_json else lines_of(record, names))
        return
    for record in records(adapter, next(iter(names), None), asked):
        typer.echo(plain_json(record) if as_json else line_of(record))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `train` or `search` left.")],
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    data: Annotated[str | None, typer.Option(help="Labelled data to judge on; else each run's own --dev.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Most rows of a list.")] = 20,
) -> None:
    """One HTML page about runs: settings, scores, curves, mistakes, prompts; several runs beside one another."""
    from ptv2_fast.report.asked import asked

    wanted = asked(runs, output, data=data, examples=examples)
    quiet()
    from ptv2_fast.report.write import write

    typer.echo(f"{write(wanted)}: {len(runs)} run{'s' if len(runs) > 1 else ''}")


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
    quiet()
    from ptv2_fast.saving.export import export_prompts
    from ptv2_fast.training.loading import load_trained

    export_prompts(load_trained(adapter, adapter=one, model=model).model, output, content.value)
    typer.echo(f"{output}: {content.value} of {adapter if one is None else Path(adapter, one)}")


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="Adapter folder, model folder, .gguf file or hub name.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """What an adapter is, or what prompts for a model would cost; no weights are loaded."""
    quiet()
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
    "text_column", "label_column", "prompt_column", "completion_column",
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
