"""Whole runs, as the command line starts them: check everything, train, and leave a folder behind (`run_folder`)."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ptv2_fast import PTuningV2Model, __version__, get_ptv2_model
from ptv2_fast.backbone.locate import backbone_of
from ptv2_fast.families.registry import family_of
from ptv2_fast.training.bases import digest_of_weights, load_base
from ptv2_fast.training.batches import PadCollator, length_of
from ptv2_fast.training.chat import is_chat
from ptv2_fast.training.checked import CheckedRun, check_run, config_of, heads_of, plain
from ptv2_fast.training.curves import plot_curves
from ptv2_fast.training.data.source import DataSource as DataSource
from ptv2_fast.training.defaults import pooling_for
from ptv2_fast.training.fit import Diverged, FitResult, fit
from ptv2_fast.training.loading import load_trained as load_trained
from ptv2_fast.training.run_folder import CURVES_NAME
from ptv2_fast.training.task_data import DEFAULT_MAX_LENGTH, TaskCodec, starting_texts
from ptv2_fast.training.train_request import TrainRequest as TrainRequest


@dataclass(frozen=True)
class PreparedRun:
    """A run that has passed every check and has written nothing yet."""

    checked: CheckedRun
    model: PTuningV2Model
    codec: TaskCodec
    base: str  # the digest of the base's weights
    device: str | None = None  # as `fit` takes it

    def execute(self, title: str | None = "training") -> FitResult:
        """Train and write the folder; what was in it is replaced when the run has something better to give.

        Raises:
            Diverged: the loss or the weights are no numbers any more. The best epoch before that is in the folder,
                where there was one; else the folder's adapter is what it was.
        """
        checked, folder = self.checked, self.checked.folder
        if checked.resume:
            folder.clean()
        else:
            folder.begin(checked.asked(), checked.digests(), self.base)
        try:
            result = fit(
                self.model,
                self.codec,
                checked.train,
                checked.dev,
                settings=checked.request.fit,
                checkpoints=folder.checkpoints,
                resume=checked.resume,
                title=title,
                device=self.device,
            )
        except Diverged as error:
            if error.kept is None:
                raise Diverged(f"{error}; no epoch was good, nothing was saved") from error
            self._finish(error.kept)
            kept = f"{error}; epoch {error.kept.best_epoch}, the best before, is kept in {folder.path}"
            raise Diverged(kept, error.kept) from error
        self._finish(result)
        return result

    def identity(self) -> dict[str, Any]:
        """What the run was asked for and digests of its data and base, as plain JSON values; paths do not matter."""
        return {**self.checked.asked(), "digests": {**self.checked.digests(), "base": self.base}}

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
            "reads": sorted(self.checked.train[0]),
            "chat": is_chat(self.checked.train[0]),
        }
        folder = self.checked.folder
        folder.finish(self.model.save_pretrained, {**plain(self.checked.request), **found}, metrics)
        plot_curves(result.history, folder.path / CURVES_NAME)


def prepare(
    request: TrainRequest,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
) -> PreparedRun:
    """Read the data, load the base, build the model and run its longest row once; nothing is written.

    Args:
        output: the run's folder: absent or empty, unless `resume` or `overwrite`.
        resume: go on with the run in `output`, which must have been asked for the same.
        overwrite: train anew in a folder that holds a run.
        device: where it trains, as `fit` takes it.

    Raises:
        FileNotFoundError: a file, folder or dataset does not exist.
        ValueError: data, model and settings do not fit together; the message names what.
    """
    return build(check_run(request, output, resume=resume, overwrite=overwrite), device)


def build(checked: CheckedRun, device: str | None = None) -> PreparedRun:
    """Load the base of a checked run, build the model and run its longest row once; nothing is written.

    Raises:
        ValueError: base, data and settings do not fit together; the message names what.
    """
    request, train, dev = checked.request, checked.train, checked.dev
    base, tokenizer = load_base(request.model, request.task_type, dropout=request.dropout)
    digest = digest_of_weights(base)
    if checked.resume:
        checked.folder.check_base(digest)
    codec = TaskCodec(
        request.task_type,
        tokenizer,
        checked.labels,
        max_length=request.max_length or _usual_length(request, base),
        doc_stride=request.doc_stride,
        no_answer=any(not example["answers"]["text"] for example in train if "answers" in example),
        problem_type=request.problem_type,
    )
    torch.manual_seed(request.fit.seed)
    model = _build(request, base, codec, train)
    _try_longest(model, codec, [*train, *(dev or ())])
    return PreparedRun(checked, model, codec, digest, device)


def _versions() -> dict[str, str]:
    """What the run was made with."""
    others = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {"ptv2_fast": __version__, **others, "python": platform.python_version()}


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
    causal = family_of(backbone_of(base)).causal
    pooling = request.pooling or pooling_for(request.task_type, causal=causal)
    config = config_of(request, heads_of(request, codec.labels, pooling))
    texts = starting_texts(train, request.num_virtual_tokens) if config.prompt_init == "text" else None
    return get_ptv2_model(base, config, tokenizer=codec.tokenizer if texts else None, init_text=texts)


@torch.no_grad()
def _try_longest(model: PTuningV2Model, codec: TaskCodec, examples: Sequence[Mapping[str, Any]]) -> None:
    """One forward of the longest row: what cannot run is found before anything is written."""
    longest = max(codec.encode(examples, quiet=True), key=length_of)
    batch = PadCollator(codec.tokenizer, padding_side="right")([longest])
    model.eval()
    model(**batch)
