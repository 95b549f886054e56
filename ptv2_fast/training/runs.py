"""Whole runs, as the command line starts them: check everything, train, and leave a folder behind.

A run's folder holds

    ptv2_model.safetensors, ptv2_config.json   the adapter at its best epoch
    settings.json                              what the run was asked for; `--resume` compares it
    metrics.json                               dev scores, history, speed
    curves.png                                 losses and metrics over the steps
    checkpoints/                               Trainer's checkpoints: the best and the last epoch
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from ptv2_fast import PTuningV2Config, PTuningV2Model, get_ptv2_model
from ptv2_fast.checkpoint import CONFIG_NAME, WEIGHTS_NAME, write_whole
from ptv2_fast.config import FEATURE_TASKS, HEAD_TASKS, HeadConfig
from ptv2_fast.models.backbone import backbone_of
from ptv2_fast.models.families import family_of
from ptv2_fast.training.bases import load_base
from ptv2_fast.training.batches import PadCollator
from ptv2_fast.training.curves import plot_curves
from ptv2_fast.training.data import LabelSet, read_examples
from ptv2_fast.training.fit import FitResult, FitSettings, fit
from ptv2_fast.training.task_data import DEFAULT_MAX_LENGTH, TaskCodec, starting_texts

SETTINGS_NAME, METRICS_NAME, CURVES_NAME, CHECKPOINTS = "settings.json", "metrics.json", "curves.png", "checkpoints"


@dataclass(frozen=True)
class DataSource:
    """Where examples come from: a file or a `datasets` name, with the columns and the split to read."""

    path: str
    split: str | None = None
    text_column: tuple[str, ...] = ()
    label_column: str | None = None

    def read(self, task_type: str, labels: LabelSet | None = None, *, labelled: bool = True) -> list[dict[str, Any]]:
        """The examples, checked; see `read_examples`."""
        return read_examples(
            self.path,
            task_type,
            text_column=self.text_column or None,
            label_column=self.label_column,
            split=self.split,
            labels=labels,
            labelled=labelled,
        )


@dataclass(frozen=True)
class TrainRequest:
    """What a training run is asked for; all of it goes into settings.json.

    Attributes:
        model: a hub name, a folder or a .gguf file.
        task_type: SEQ_CLS, TOKEN_CLS, QUESTION_ANS or CAUSAL_LM.
        data, dev: training and development examples; without dev the last epoch is kept.
        fit: how long and how fast.
        num_virtual_tokens, injection, layers, init, reparameterization, prompt_dropout: of
            PTuningV2Config; init None means "text", or "normal" with a reparameterization.
        pooling: what a SEQ_CLS head reads; None means "first" on encoders, "last" on decoders.
        max_length: tokens of a row; None means the task's usual length.
        doc_stride: tokens that windows of a context share.
        dropout: of the base's hidden states; None keeps the base's own.
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


@dataclass(frozen=True)
class PreparedRun:
    """A run that has passed every check and has written nothing yet."""

    request: TrainRequest
    model: PTuningV2Model
    codec: TaskCodec
    train: Sequence[Mapping[str, Any]]
    dev: Sequence[Mapping[str, Any]] | None
    output: Path
    resume: bool

    def execute(self, title: str | None = "training") -> FitResult:
        """Train and write the folder; the adapter is written last but for the picture."""
        self.output.mkdir(parents=True, exist_ok=True)
        found = {"no_answer": self.codec.no_answer, "row_length": self.codec.max_length}
        settings = {**_plain(self.request), **found}
        _write_json(self.output / SETTINGS_NAME, settings)
        result = fit(
            self.model,
            self.codec,
            self.train,
            self.dev,
            settings=self.request.fit,
            checkpoints=self.output / CHECKPOINTS,
            resume=self.resume,
            title=title,
        )
        self.model.save_pretrained(self.output)
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
            "history": list(result.history),
        }
        _write_json(self.output / METRICS_NAME, metrics)
        plot_curves(result.history, self.output / CURVES_NAME)
        return result


def prepare(
    request: TrainRequest, output: str | Path, *, resume: bool = False, overwrite: bool = False
) -> PreparedRun:
    """Read the data, load the base, build the model and run its longest row once; nothing is written.

    Args:
        output: the run's folder: absent or empty, unless `resume` or `overwrite`.
        resume: go on with the run in `output`, which must have been asked for the same.
        overwrite: train anew in a folder that holds a run.

    Raises:
        FileNotFoundError: a file, folder or dataset does not exist.
        ValueError: data, model and settings do not fit together; the message names what.
    """
    output = Path(output)
    _check_output(output, request, resume, overwrite)
    train = request.data.read(request.task_type)
    labels = None
    if request.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        labels = LabelSet.from_examples(train)
        if len(labels) < 2:
            raise ValueError(f"{request.data.path}: expected at least two classes; got {list(labels.names)}")
    dev = request.dev.read(request.task_type, labels) if request.dev is not None else None
    if request.fit.early_stopping is not None and dev is None:
        raise ValueError("early stopping needs dev data to watch; got none")
    base, tokenizer = load_base(request.model, request.task_type, dropout=request.dropout)
    codec = TaskCodec(
        request.task_type,
        tokenizer,
        labels,
        max_length=request.max_length or _usual_length(request, base),
        doc_stride=request.doc_stride,
        no_answer=any(not example["answers"]["text"] for example in train if "answers" in example),
    )
    torch.manual_seed(request.fit.seed)
    model = _build(request, base, codec, train)
    _try_longest(model, codec, [*train, *(dev or ())])
    return PreparedRun(request, model, codec, train, dev, output, resume)


def _check_output(output: Path, request: TrainRequest, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ValueError("resume and overwrite contradict each other; give one of them")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output must be a folder; {output} is a file")
    if resume:
        kept, asked = read_settings(output), json.loads(json.dumps(_plain(request)))
        if kept is None:
            raise ValueError(f"{output} holds no run to resume: there is no {SETTINGS_NAME}")
        differing = [f"{key} was {kept.get(key)!r}, is {asked[key]!r}" for key in asked if kept.get(key) != asked[key]]
        if differing:
            raise ValueError(f"{output} holds a run that was asked for something else: {'; '.join(differing)}")
    elif output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"output {output} is not empty; resume the run in it, overwrite it, or name another folder")
    elif output.is_dir() and overwrite and any(output.iterdir()) and read_settings(output) is None:
        raise ValueError(f"output {output} holds something else than a run; it is not overwritten")


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
        names = codec.labels.names if codec.labels is not None else ("start", "end")
        heads = {"task": HeadConfig(request.task_type, len(names), pooling=pooling, labels=names)}
    elif request.pooling is not None:
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
    )
    texts = starting_texts(train, request.num_virtual_tokens) if init == "text" else None
    return get_ptv2_model(base, config, tokenizer=codec.tokenizer if texts else None, init_text=texts)


@torch.no_grad()
def _try_longest(model: PTuningV2Model, codec: TaskCodec, examples: Sequence[Mapping[str, Any]]) -> None:
    """One forward of the longest row: what cannot run is found before anything is written."""
    longest = max(codec.encode(examples), key=lambda feature: len(feature["input_ids"]))
    batch = PadCollator(codec.tokenizer, padding_side="right")([longest])
    model.eval()
    model(**batch)


def read_settings(folder: str | Path) -> dict[str, Any] | None:
    """What the run in a folder was asked for; None where the folder holds no run.

    Raises:
        ValueError: the file is not JSON.
    """
    path = Path(folder) / SETTINGS_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not whole JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(values).__name__}")
    return values


@dataclass(frozen=True)
class LoadedAdapter:
    """A trained adapter on its base, ready to predict."""

    model: PTuningV2Model
    codec: TaskCodec
    head: str | None


def load_trained(
    folder: str | Path, *, model: str | None = None, max_length: int | None = None, head: str | None = None
) -> LoadedAdapter:
    """Load an adapter folder on the base it was trained on.

    Args:
        folder: what `prepare(...).execute()` or `save_pretrained` wrote.
        model: the base, where it is not where it was.
        max_length: tokens of a row; None means as in training, where the folder says it.
        head: which head, where there are several.

    Raises:
        FileNotFoundError: there is no such folder, or no such base.
        ValueError: the folder holds no whole adapter, or the base is another one.
    """
    description = read_description(folder)
    config = PTuningV2Config.from_dict(description["config"])
    name = model or description["base"].get("name_or_path")
    if not name:
        raise ValueError(f"{folder} does not say which base it was trained on; name it")
    chosen = _chosen_head(config, head)
    task_type = chosen.task_type if chosen is not None else config.task_type
    if task_type in FEATURE_TASKS:
        raise ValueError(f"{folder} is an adapter for {task_type}; the command line and ptv2_fast.training serve texts")
    if task_type not in DEFAULT_MAX_LENGTH:
        raise ValueError(f"{folder} is an adapter for {task_type}, which predicts nothing by itself")
    own_head = config.heads is None and task_type in HEAD_TASKS
    base, tokenizer = load_base(name, task_type, own_head=own_head)
    adapter = PTuningV2Model.from_pretrained(base, folder)
    settings = read_settings(folder) or {}
    codec = TaskCodec(
        task_type,
        tokenizer,
        _labels(chosen, base, task_type),
        max_length=max_length or settings.get("row_length") or DEFAULT_MAX_LENGTH[task_type],
        doc_stride=settings.get("doc_stride", 128),
        no_answer=settings.get("no_answer", False),
    )
    return LoadedAdapter(adapter, codec, head)


def read_description(folder: str | Path) -> dict[str, Any]:
    """The description of the single adapter in a folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no adapter, or its description is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"adapter folder {folder} does not exist")
    if not (folder / WEIGHTS_NAME).is_file() or not (folder / CONFIG_NAME).is_file():
        below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f"; name one of its folders {', '.join(below)}" if below else ""
        raise ValueError(f"{folder} holds no adapter ({WEIGHTS_NAME} and {CONFIG_NAME}){hint}")
    path = folder / CONFIG_NAME
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not whole JSON: {error}") from error
    parts = {"config": dict, "base": dict}
    if not isinstance(description, dict) or not all(isinstance(description.get(k), t) for k, t in parts.items()):
        raise ValueError(f"{path} must hold a description with 'config' and 'base'")
    return description


def _chosen_head(config: PTuningV2Config, head: str | None) -> HeadConfig | None:
    heads = cast("dict[str, HeadConfig]", config.heads or {})  # the configuration has made them so
    if not heads:
        if head is not None:
            raise ValueError(f"head must be None for an adapter without named heads; got {head!r}")
        return None
    if head is None and len(heads) == 1:
        return next(iter(heads.values()))
    if head not in heads:
        raise ValueError(f"head must be one of {', '.join(heads)}; got {head!r}")
    return heads[head]


def _labels(head: HeadConfig | None, base: Any, task_type: str) -> LabelSet | None:
    if task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    if head is None:
        names = base.config.id2label
        return LabelSet(tuple(names[index] for index in range(len(names))))
    return LabelSet(tuple(head.labels or (str(index) for index in range(head.num_labels))))


def _plain(request: TrainRequest) -> dict[str, Any]:
    return asdict(request)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
