"""Whole runs, as the command line starts them: check everything, train, and leave a folder behind (`run_folder`)."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ptv2_fast import PTuningV2Config, PTuningV2Model, __version__, get_ptv2_model
from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.config import HEAD_TASKS, HeadConfig
from ptv2_fast.families.registry import family_of
from ptv2_fast.task_types import SINGLE_LABEL
from ptv2_fast.training.bases import digest_of_weights, load_base
from ptv2_fast.training.batches import PadCollator, length_of
from ptv2_fast.training.curves import plot_curves
from ptv2_fast.training.data import LabelSet, read_examples
from ptv2_fast.training.fit import Diverged, FitResult, FitSettings, fit
from ptv2_fast.training.loading import load_trained as load_trained
from ptv2_fast.training.run_folder import CURVES_NAME, RunFolder, digest_of
from ptv2_fast.training.task_data import DEFAULT_MAX_LENGTH, TaskCodec, starting_texts
from ptv2_fast.training.tasks import task_row

# What the outputs of heads are called that have no classes.
_OUTPUTS = {"answer": ("start", "end"), "number": ("value",), "choice": ("score",)}


@dataclass(frozen=True)
class DataSource:
    """Where examples come from: a file or a `datasets` name, with the columns and the split to read."""

    path: str
    split: str | None = None
    text_column: tuple[str, ...] = ()
    label_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None

    def read(
        self,
        task_type: str,
        labels: LabelSet | None = None,
        *,
        labelled: bool = True,
        problem_type: str | None = None,
    ) -> list[dict[str, Any]]:
        """The examples, checked; see `read_examples`."""
        return read_examples(
            self.path,
            task_type,
            text_column=self.text_column or None,
            label_column=self.label_column,
            prompt_column=self.prompt_column,
            completion_column=self.completion_column,
            split=self.split,
            labels=labels,
            labelled=labelled,
            problem_type=problem_type,
        )


@dataclass(frozen=True)
class TrainRequest:
    """What a training run is asked for; all of it goes into settings.json.

    Attributes:
        model: a hub name, a folder or a .gguf file.
        task_type: one of `TRAINED_TASKS`.
        data, dev: training and development examples; without dev the last epoch is kept.
        fit: how long and how fast.
        num_virtual_tokens, injection, layers, init, reparameterization, prompt_dropout: of
            PTuningV2Config; init None means "text", or "normal" with a reparameterization.
        pooling: what a head with one vector for each row reads, and what SENTENCE_RETRIEVAL's vectors are; None means
            "last" on decoders, on encoders "first" (SENTENCE_RETRIEVAL: "mean").
        max_length: tokens of a row; None means the task's usual length.
        doc_stride: tokens that windows of a context share.
        dropout: of the base's hidden states; None keeps the base's own.
        problem_type: what a SEQ_CLS head solves, as `HeadConfig` says it; None is one class for each row.

    Raises:
        ValueError: max_length or doc_stride is out of range.
    """

    model: str
    task_type: str
    data: DataSource
    dev: DataSource | None = None
    fit: FitSettings = field(default_factory=FitSettings)
    num_virtual_tokens: int = 20
    injection: str = "deep"
    layers: tuple[int, ...] | None = None
    init: str | None = None
    reparameterization: int | None = None
    prompt_dropout: float = 0.0
    pooling: str | None = None
    max_length: int | None = None
    doc_stride: int = 128
    dropout: float | None = None
    problem_type: str | None = None

    def __post_init__(self) -> None:
        for name, low in (("max_length", 1), ("doc_stride", 0)):
            value = getattr(self, name)
            if value is not None and not low <= value < 2**31:
                raise ValueError(f"{name} must be at least {low} and below 2**31; got {value!r}")


@dataclass(frozen=True)
class PreparedRun:
    """A run that has passed every check and has written nothing yet."""

    request: TrainRequest
    model: PTuningV2Model
    codec: TaskCodec
    train: Sequence[Mapping[str, Any]]
    dev: Sequence[Mapping[str, Any]] | None
    folder: RunFolder
    base: str  # the digest of the base's weights
    resume: bool

    def execute(self, title: str | None = "training") -> FitResult:
        """Train and write the folder; what was in it is replaced when the run has something better to give.

        Raises:
            Diverged: the loss or the weights are no numbers any more. The best epoch before that is in the folder,
                where there was one; else the folder's adapter is what it was.
        """
        if self.resume:
            self.folder.clean()
        else:
            self.folder.begin(_asked(self.request), _digests(self.train, self.dev), self.base)
        try:
            result = fit(
                self.model,
                self.codec,
                self.train,
                self.dev,
                settings=self.request.fit,
                checkpoints=self.folder.checkpoints,
                resume=self.resume,
                title=title,
            )
        except Diverged as error:
            if error.kept is None:
                raise Diverged(f"{error}; no epoch was good, nothing was saved") from error
            self._finish(error.kept)
            kept = f"{error}; epoch {error.kept.best_epoch}, the best before, is kept in {self.folder.path}"
            raise Diverged(kept, error.kept) from error
        self._finish(result)
        return result

    def identity(self) -> dict[str, Any]:
        """What the run was asked for and digests of its data and base, as plain JSON values; paths do not matter."""
        return {**_asked(self.request), "digests": {**_digests(self.train, self.dev), "base": self.base}}

    def _finish(self, result: FitResult) -> None:
        trained, total = self.model.trainable_parameters()
        metrics = {
            "metric": result.metric,
            "best_epoch": result.best_epoch,
            "dev": dict(result.scores),
            "epochs": result.epochs,
            "trained_parameters": trained,
            "total_parameters": total,
            "seconds": round(result.seconds, 2),
            "tokens_per_second": round(result.tokens_per_second, 1),
            "rows_per_second": round(result.rows_per_second, 2),
            "rows": result.rows,
            "dev_rows": result.dev_rows,
            "versions": _versions(),
            "history": list(result.history),
        }
        found = {
            "no_answer": self.codec.no_answer,
            "row_length": self.codec.max_length,
            "reads": sorted(self.train[0]),
        }
        self.folder.finish(self.model.save_pretrained, {**_plain(self.request), **found}, metrics)
        plot_curves(result.history, self.folder.path / CURVES_NAME)


def prepare(request: TrainRequest, output: str | Path, *, resume: bool = False, overwrite: bool = False) -> PreparedRun:
    """Read the data, load the base, build the model and run its longest row once; nothing is written.

    Args:
        output: the run's folder: absent or empty, unless `resume` or `overwrite`.
        resume: go on with the run in `output`, which must have been asked for the same.
        overwrite: train anew in a folder that holds a run.

    Raises:
        FileNotFoundError: a file, folder or dataset does not exist.
        ValueError: data, model and settings do not fit together; the message names what.
    """
    folder = RunFolder(Path(output))
    folder.check(_asked(request), resume=resume, overwrite=overwrite)
    row = task_row(request.task_type, request.problem_type)
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
    if request.fit.early_stopping is not None and dev is None:
        raise ValueError("early stopping needs dev data to watch; got none")
    if resume:
        folder.check_data(_digests(train, dev))
    base, tokenizer = load_base(request.model, request.task_type, dropout=request.dropout)
    digest = digest_of_weights(base)
    if resume:
        folder.check_base(digest)
    codec = TaskCodec(
        request.task_type,
        tokenizer,
        labels,
        max_length=request.max_length or _usual_length(request, base),
        doc_stride=request.doc_stride,
        no_answer=any(not example["answers"]["text"] for example in train if "answers" in example),
        problem_type=request.problem_type,
    )
    torch.manual_seed(request.fit.seed)
    model = _build(request, base, codec, train)
    _try_longest(model, codec, [*train, *(dev or ())])
    return PreparedRun(request, model, codec, train, dev, folder, digest, resume)


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


def _versions() -> dict[str, str]:
    """What the run was made with."""
    others = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {"ptv2_fast": __version__, **others, "python": platform.python_version()}


def _digests(train: Sequence[Mapping[str, Any]], dev: Sequence[Mapping[str, Any]] | None) -> dict[str, str | None]:
    return {"--data": digest_of(train), "--dev": digest_of(dev) if dev is not None else None}


def _plain(request: TrainRequest) -> dict[str, Any]:
    """The request as plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(request)))
    return plain


def _asked(request: TrainRequest) -> dict[str, Any]:
    """What a resumed run must be asked for again; where its data lies does not matter, what it holds does."""
    asked = _plain(request)
    for source in (asked["data"], asked["dev"]):
        if source is not None:
            del source["path"]
    return asked


def _usual_length(request: TrainRequest, base: Any) -> int:
    """The task's usual length, or what the base's table of positions has room for."""
    usual = DEFAULT_MAX_LENGTH[request.task_type]
    limit = getattr(backbone_of(base).config, "max_position_embeddings", None) or usual
    family = family_of(backbone_of(base))
    taken = family.first_position(backbone_of(base))
    if request.injection == "shallow":
        taken += request.num_virtual_tokens
    if not family.rotary and limit - taken < 2:
        raise ValueError(
            f"num_virtual_tokens must leave the text some of the model's {limit} learned positions; "
            f"got {request.num_virtual_tokens}"
        )
    return usual if family.rotary else min(usual, limit - taken)


def _build(request: TrainRequest, base: Any, codec: TaskCodec, train: Sequence[Mapping[str, Any]]) -> PTuningV2Model:
    heads = None
    if request.task_type in HEAD_TASKS:
        pooling = request.pooling or ("last" if family_of(backbone_of(base)).causal else "first")
        names = codec.labels.names if codec.labels is not None else _OUTPUTS[str(codec.row.predicts)]
        problem = request.problem_type or SINGLE_LABEL
        heads = {"task": HeadConfig(request.task_type, len(names), pooling=pooling, labels=names, problem_type=problem)}
    elif request.pooling is not None and not codec.row.pools_itself:
        raise ValueError(f"pooling must be None for {request.task_type}; got {request.pooling!r}")
    init = request.init or ("text" if request.reparameterization is None else "normal")
    config = PTuningV2Config(
        request.task_type,
        num_virtual_tokens=request.num_virtual_tokens,
        injection=request.injection,
        layers=request.layers,
        prompt_init=init,
        prompt_dropout=request.prompt_dropout,
        reparameterization=request.reparameterization,
        heads=heads,
        pooling=request.pooling if codec.row.pools_itself else None,
    )
    texts = starting_texts(train, request.num_virtual_tokens) if init == "text" else None
    return get_ptv2_model(base, config, tokenizer=codec.tokenizer if texts else None, init_text=texts)


@torch.no_grad()
def _try_longest(model: PTuningV2Model, codec: TaskCodec, examples: Sequence[Mapping[str, Any]]) -> None:
    """One forward of the longest row: what cannot run is found before anything is written."""
    longest = max(codec.encode(examples, quiet=True), key=length_of)
    batch = PadCollator(codec.tokenizer, padding_side="right")([longest])
    model.eval()
    model(**batch)
