"""What the commands of the command line take: words to choose from, and the options that several of them share."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from ptv2_fast import choices
from ptv2_fast.task_types import PROBLEM_TYPES, TRAINED_TASKS


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


ModelOption = Annotated[str | None, typer.Option(help="Hub name, folder, or .gguf file.", metavar="NAME_OR_PATH")]
DataOption = Annotated[str, typer.Option(help="File, folder of files, or a `datasets` name; see docs/data.md.")]
SplitOption = Annotated[str | None, typer.Option(help="Split of a folder or a `datasets` name.")]
TextColumns = Annotated[list[str] | None, typer.Option("--text-column", help="Twice for pairs; a number (no header).")]
LabelColumn = Annotated[list[str] | None, typer.Option(help="Label or tags; twice or more: columns of 0 and 1.")]
PromptColumn = Annotated[str | None, typer.Option(help="Column to go on from (CAUSAL_LM).")]
CompletionColumn = Annotated[str | None, typer.Option(help="Column to go on with (CAUSAL_LM).")]
FormatOption = Annotated[str | None, typer.Option("--format", help="Of a file, where its suffix does not say it.")]
SchemeOption = Annotated[str | None, typer.Option(help="Of tags: BIO, IOB1, BIOES, BILUO, BMES, BMEWO, IO or plain.")]
NamesOption = Annotated[
    str | None, typer.Option(help="Of labels that are numbers: a,b,c, or a file with a name a line.")
]
ProblemOption = Annotated[Problem | None, typer.Option(help="What a SEQ_CLS head solves; one class if not given.")]
LengthOption = Annotated[int | None, typer.Option(min=2, help="Most tokens of a row.")]
AdapterArgument = Annotated[str, typer.Argument(help="Folder of a trained adapter, or of several.")]
OneOption = Annotated[str | None, typer.Option("--adapter", help="Which one, of a folder with several.")]
SomeOption = Annotated[
    list[str] | None, typer.Option("--adapter", help="Which ones, of a folder with several; all if not given.")
]
HeadOption = Annotated[str | None, typer.Option(help="Which head, where there are several.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Rows of a batch.")]
DeviceOption = Annotated[
    str | None, typer.Option(metavar="cpu|cuda|cuda:N|mps", help="Where to compute; a GPU if there is one.")
]
