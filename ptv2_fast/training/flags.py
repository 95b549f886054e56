"""From the flags of the command line to what a run is asked for; nothing heavy is imported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from ptv2_fast.training.data.formats import is_conll
from ptv2_fast.training.data.rows import read_text, suffix_of
from ptv2_fast.training.data.source import DataSource
from ptv2_fast.training.defaults import defaults_for
from ptv2_fast.training.recipes import get_recipe
from ptv2_fast.training.settings import FitSettings
from ptv2_fast.training.train_request import TrainRequest

T = TypeVar("T")
logger = logging.getLogger(__name__)

COLUMNS = ("text_column", "label_column", "prompt_column", "completion_column", "format", "tag_scheme", "label_names")


def source_of(path: str, flags: Mapping[str, Any], remembered: Mapping[str, Any] | None = None) -> DataSource:
    """The `DataSource` of a path with the columns that flags name; of the others, those that training was told to read.

    Plain text has no columns and those of CoNLL files have numbers alone, so that no names are remembered for them.
    """
    given = {name: flags[name] for name in COLUMNS if flags.get(name)}
    if "text_column" in given:
        given["text_column"] = tuple(given["text_column"])
    if isinstance(given.get("label_column"), list):
        several = given["label_column"]
        given["label_column"] = tuple(several) if len(several) > 1 else several[0]
    if "label_names" in given:
        given["label_names"] = names_in(given["label_names"])
    # A text stands against a prompt with its completion.
    against = {"text_column": COLUMNS[2:], "prompt_column": COLUMNS[:1], "completion_column": COLUMNS[:1]}
    dropped = {other for name in given for other in against.get(name, ())}
    kept = {name: value for name, value in (remembered or {}).items() if name not in dropped}
    columns = {name: value for name, value in kept.items() if name in COLUMNS[:4]}
    numbered = all("".join(value).isdecimal() for value in columns.values())
    if suffix_of(Path(path)) == ".txt" or (is_conll(path, given.get("format")) and not numbered):
        kept = {name: value for name, value in kept.items() if name not in columns}
    return DataSource(path, flags.get("split"), **{**kept, **given})


def request_of(flags: dict[str, Any]) -> TrainRequest:
    """The run that flags and recipe describe; a flag that was given wins over the recipe.

    What the recipe's published run did and settings cannot say, such as how its texts were written, is named in a
    warning.
    """
    recipe = get_recipe(flags["recipe"]) if flags["recipe"] is not None else None
    if recipe is not None and recipe.note:
        logger.warning("recipe %s: %s", recipe.name, recipe.note)

    def value(flag: str, attribute: str, default: T) -> T:
        if flags[flag] is not None:
            return flags[flag].value if isinstance(flags[flag], Enum) else flags[flag]
        return default if recipe is None else getattr(recipe, attribute)

    def needed(flag: str, attribute: str) -> str:
        found: str | None = value(flag, attribute, None)
        if found is None:
            raise ValueError(f"--{flag} is needed where no --recipe gives it")
        return found

    model, task_type = needed("model", "base"), needed("task", "task_type")
    if flags["doc_stride"] is not None and task_type != "QUESTION_ANS":
        raise ValueError(f"--doc-stride is read for QUESTION_ANS alone; got it with {task_type}")
    dev = None
    if flags["dev"] is not None or flags["dev_split"] is not None:
        dev = replace(source_of(flags["dev"] or flags["data"], flags), split=flags["dev_split"])
    usual = defaults_for(task_type, flags["injection"].value)
    fit = FitSettings(
        learning_rate=value("lr", "learning_rate", usual.learning_rate),
        epochs=value("epochs", "epochs", usual.epochs),
        batch_size=value("batch_size", "batch_size", 32),
        gradient_accumulation=flags["gradient_accumulation"],
        schedule=value("schedule", "lr_schedule", "linear"),
        decay=recipe.lr_decay if recipe is not None else 0.95,
        weight_decay=recipe.weight_decay if recipe is not None else 0.0,
        max_grad_norm=recipe.max_grad_norm if recipe is not None else 1.0,
        early_stopping=flags["early_stopping"],
        seed=flags["seed"],
        bf16=flags["bf16"],
    )
    return TrainRequest(
        model=model,
        task_type=task_type,
        data=source_of(flags["data"], flags),
        dev=dev,
        fit=fit,
        num_virtual_tokens=value("num_virtual_tokens", "num_virtual_tokens", usual.num_virtual_tokens),
        injection=flags["injection"].value,
        layers=layers(flags["layers"]),
        init=flags["init"].value if flags["init"] is not None else None,
        reparameterization=value("reparameterization", "reparameterization_hidden_size", None),
        prompt_dropout=flags["prompt_dropout"],
        pooling=flags["pooling"].value if flags["pooling"] is not None else None,
        max_length=value("max_length", "max_length", None),
        doc_stride=128 if (stride := value("doc_stride", "doc_stride", None)) is None else stride,
        dropout=recipe.dropout if recipe is not None else None,
        problem_type=flags["problem_type"].value if flags.get("problem_type") is not None else None,
    )


def names_in(given: str) -> tuple[str, ...]:
    """Names between commas, or of the lines of a file.

    Raises:
        ValueError: one is empty, or twice there.
    """
    path = Path(given)
    parts = read_text(path).splitlines() if path.is_file() else given.split(",")
    names = tuple(part.strip() for part in parts)
    names = names[:-1] if path.is_file() and names and not names[-1] else names
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"--label-names must be different names, between commas or a line each; got {list(names)}")
    return names


def numbers(flag: str, text: str, kind: Callable[[str], T]) -> tuple[T, ...]:
    """Numbers between commas."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{flag} must be numbers between commas; got {text!r}") from None


def layers(text: str | None) -> tuple[int, ...] | None:
    """Layers between commas; None for all of them."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--layers must be integers between commas, as in 0,1,-1; got {text!r}") from None
