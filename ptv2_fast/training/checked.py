"""What can be refused of a run before torch is there: its folder, its data, its settings, the place of its base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptv2_fast.config import HEAD_TASKS, HeadConfig, PTuningV2Config
from ptv2_fast.task_types import SINGLE_LABEL
from ptv2_fast.training.labels import LabelSet
from ptv2_fast.training.locating import check_base, locate
from ptv2_fast.training.plain_configs import plain_facts
from ptv2_fast.training.run_folder import RunFolder, digest_of
from ptv2_fast.training.tasks import task_row
from ptv2_fast.training.train_request import TrainRequest

# What the outputs of heads are called that have no classes.
_OUTPUTS = {"answer": ("start", "end"), "number": ("value",), "choice": ("score",)}


@dataclass(frozen=True)
class CheckedRun:
    """A run whose folder, data and settings have passed every check that needs no base; nothing is written.

    Attributes:
        train, dev: the examples.
        labels: the classes or tags; None for tasks that have none.
    """

    request: TrainRequest
    folder: RunFolder
    train: Sequence[Mapping[str, Any]]
    dev: Sequence[Mapping[str, Any]] | None
    labels: LabelSet | None
    resume: bool

    def asked(self) -> dict[str, Any]:
        """What a resumed run must be asked for again, as plain JSON values."""
        return asked_of(self.request)

    def digests(self) -> dict[str, str | None]:
        """Of the examples, by the flags that name them."""
        return digests_of(self.train, self.dev)


def check_run(
    request: TrainRequest, output: str | Path, *, resume: bool = False, overwrite: bool = False
) -> CheckedRun:
    """Check settings, folder and data; arguments as those of `prepare`.

    Raises:
        FileNotFoundError: a file, folder or dataset does not exist.
        ValueError: data, settings and folder do not fit together; the message names what.
    """
    folder = RunFolder(Path(output))
    folder.check(asked_of(request), resume=resume, overwrite=overwrite)
    row = task_row(request.task_type, request.problem_type)
    if request.fit.early_stopping is not None and request.dev is None:
        raise ValueError("early stopping needs dev data to watch; got none")
    check_base(request.model)
    _check_sizes(request, config_of(request))
    train = request.data.read(request.task_type, problem_type=request.problem_type)
    labels = None
    if row.names_labels:
        if row.predicts == "labels" and not any(example["labels"] for example in train):
            raise ValueError(f"{request.data.path}: expected a label in at least one example; got none")
        labels = LabelSet.from_examples(train)
        if len(labels) < 2 and row.predicts != "labels":
            raise ValueError(f"{request.data.path}: expected at least two classes; got {list(labels.names)}")
    dev = None
    if request.dev is not None:
        dev = request.dev.read(request.task_type, labels, problem_type=request.problem_type)
    _check_alike(request, train, dev)
    if row.predicts == "embedding" and min(request.fit.batch_size, len(train)) == 1:
        if "negative" not in train[0]:
            what = "batch_size" if len(train) > 1 else f"{request.data.path}: examples"
            raise ValueError(f"{what} must be at least 2 where no text but a query's own is compared with it; got 1")
    if resume:
        folder.check_data(digests_of(train, dev))
    return CheckedRun(request, folder, train, dev, labels, resume)


def _check_sizes(request: TrainRequest, config: PTuningV2Config) -> None:
    """Refuse layers that a folder's model does not have, and text of a model that writes none, where its kind is known.

    Raises:
        ValueError: see above.
    """
    source, options = locate(request.model)
    sizes = None if options else plain_facts(Path(source))
    if sizes is None:
        return
    config.resolve_layers(sizes["num_layers"])
    if task_row(request.task_type).gives == "text" and not sizes["causal"]:
        kind = sizes["model_type"]
        raise ValueError(f"model must be a causal language model for {request.task_type}; {request.model} is a {kind}")


def config_of(request: TrainRequest, heads: Mapping[str, HeadConfig] | None = None) -> PTuningV2Config:
    """The adapter's configuration.

    Raises:
        ValueError: what is asked for contradicts itself, or is out of range.
    """
    pools = task_row(request.task_type, request.problem_type).pools_itself
    if request.pooling is not None and not pools and request.task_type not in HEAD_TASKS:
        raise ValueError(f"pooling must be None for {request.task_type}; got {request.pooling!r}")
    return PTuningV2Config(
        request.task_type,
        num_virtual_tokens=request.num_virtual_tokens,
        injection=request.injection,
        layers=request.layers,
        prompt_init=init_of(request),
        prompt_dropout=request.prompt_dropout,
        reparameterization=request.reparameterization,
        heads=heads,
        pooling=request.pooling if pools else None,
    )


def init_of(request: TrainRequest) -> str:
    """What the prompts start as."""
    return request.init or ("text" if request.reparameterization is None else "normal")


def heads_of(request: TrainRequest, labels: LabelSet | None, pooling: str) -> dict[str, HeadConfig] | None:
    """The head that is trained with the prompts; None where the base's own output is used."""
    if request.task_type not in HEAD_TASKS:
        return None
    predicts = str(task_row(request.task_type, request.problem_type).predicts)
    names = labels.names if labels is not None else _OUTPUTS[predicts]
    problem = request.problem_type or SINGLE_LABEL
    return {"task": HeadConfig(request.task_type, len(names), pooling=pooling, labels=names, problem_type=problem)}


def plain(request: TrainRequest) -> dict[str, Any]:
    """The request as plain JSON values."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(request)))
    return values


def asked_of(request: TrainRequest) -> dict[str, Any]:
    """What a resumed run must be asked for again; where its data lies does not matter, what it holds does."""
    asked = plain(request)
    for source in (asked["data"], asked["dev"]):
        if source is not None:
            del source["path"]
    return asked


def digests_of(train: Sequence[Mapping[str, Any]], dev: Sequence[Mapping[str, Any]] | None) -> dict[str, str | None]:
    """Of the examples, by the flags that name them."""
    return {"--data": digest_of(train), "--dev": digest_of(dev) if dev is not None else None}


def _check_alike(
    request: TrainRequest, train: Sequence[Mapping[str, Any]], dev: Sequence[Mapping[str, Any]] | None
) -> None:
    """Refuse dev examples that have other parts than those of training: pairs and single texts, say."""
    if request.dev is None or not dev:
        return
    there, here = (set(examples[0]) - {"id", "negative"} for examples in (train, dev))
    if there != here:
        raise ValueError(
            f"{request.dev.path}: expected {' and '.join(sorted(there))} as in {request.data.path};"
            f" got {' and '.join(sorted(here))}; name the columns (--text-column, --prompt-column, --completion-column)"
        )
