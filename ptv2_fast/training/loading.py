"""Trained adapters, ready to predict: from a folder to a model on its base, with the settings of its training."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open

from ptv2_fast import PTuningV2Config, PTuningV2Model
from ptv2_fast.config import FEATURE_TASKS, HEAD_TASKS, HeadConfig
from ptv2_fast.saving.checkpoint import WEIGHTS_NAME
from ptv2_fast.storage.names import check_name, namesake
from ptv2_fast.task_types import TASKS, TaskType
from ptv2_fast.training.bases import head_size, load_base
from ptv2_fast.training.described import COLUMNS, folder_of, folders_in, read_description, read_settings
from ptv2_fast.training.labels import LabelSet
from ptv2_fast.training.task_data import DEFAULT_MAX_LENGTH, TaskCodec
from ptv2_fast.training.tasks import task_row


@dataclass(frozen=True)
class LoadedAdapter:
    """A trained adapter on its base, ready to predict.

    Attributes:
        model: the wrapped base; where it holds other adapters too, `chosen()` makes this one the active one.
        codec: how examples of its task become features.
        head: which head, where it has several.
        settings: what it was trained with, where somebody wrote it down.
        name: what the model calls it.
    """

    model: PTuningV2Model
    codec: TaskCodec
    head: str | None
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    name: str = "default"

    @property
    def columns(self) -> dict[str, Any]:
        """The columns that training was told to read, as arguments of `DataSource`."""
        source = self.settings.get("data") or {}
        return {name: _hashable(source[name]) for name in COLUMNS if source.get(name)}

    def chosen(self) -> LoadedAdapter:
        """This adapter, active in its model: what `predict`, `evaluate` and `records_of` run."""
        self.model.active_adapter = self.name
        return self

    def read(self, source: Any, *, labelled: bool = True) -> list[dict[str, Any]]:
        """The examples of a `DataSource`, as the adapter's task has them."""
        known = self.codec.labels if labelled else None
        problem = self.codec.problem_type
        examples: list[dict[str, Any]] = source.read(
            self.codec.task_type, known, labelled=labelled, problem_type=problem
        )
        return examples

    def check_parts(self, where: str, examples: Sequence[Mapping[str, Any]]) -> None:
        """Refuse single texts where training read pairs, and pairs where it read single texts.

        Raises:
            ValueError: see above.
        """
        reads = self.settings.get("reads")
        if reads is None or not examples:
            return
        there, here = ("pairs of texts" if "text_pair" in parts else "single texts" for parts in (reads, examples[0]))
        if there != here:
            raise ValueError(f"{where}: expected {there} as in training; got {here} (--file, --text-column)")


@dataclass(frozen=True)
class _Plan:
    """What a folder's adapter needs of a base, read before any base is loaded.

    Attributes:
        base: the name of the base that it was trained on.
        head: the head that predicts; None where that is a copy of the base's own, or the base's own.
        own_head: whether it is such a copy.
        labels: what was saved of the copy's label names.
    """

    folder: Path
    base: str
    config: PTuningV2Config
    task_type: str
    head: HeadConfig | None
    head_name: str | None
    own_head: bool
    labels: Any
    settings: dict[str, Any]


def load_trained(
    folder: str | Path,
    *,
    adapter: str | None = None,
    model: str | None = None,
    max_length: int | None = None,
    head: str | None = None,
) -> LoadedAdapter:
    """Load an adapter folder on the base it was trained on.

    Args:
        folder: what `prepare(...).execute()` or `save_pretrained` wrote.
        adapter: which one, where the folder holds several, each in a sub-folder.
        model: the base, where it is not where it was.
        max_length: tokens of a row; None means as in training, where the folder says it.
        head: which head, where there are several.

    Raises:
        FileNotFoundError: there is no such folder, or no such base.
        ValueError: the folder holds no whole adapter, not that one, or several; or the base is another one.
    """
    place = Path(folder) if adapter is None else folder_of(Path(folder), adapter)
    plan = _planned(place, model, head)
    outputs = None
    if plan.own_head and TASKS[plan.task_type].names_labels:
        shapes = _shapes(place / WEIGHTS_NAME)
        outputs = len(plan.labels) if isinstance(plan.labels, list) else head_size(plan.base, plan.task_type, shapes)
    base, tokenizer = load_base(plan.base, plan.task_type, own_head=plan.own_head, num_labels=outputs)
    codec = _codec(plan, base, tokenizer, max_length)
    wrapped = PTuningV2Model.from_pretrained(base, place)
    return LoadedAdapter(wrapped, codec, head, plan.settings, wrapped.active_adapter)


def load_all(
    folder: str | Path,
    *,
    adapters: Sequence[str] | None = None,
    model: str | None = None,
    max_length: int | None = None,
    head: str | None = None,
) -> dict[str, LoadedAdapter]:
    """Load the adapters of a folder's sub-folders over one base, which is loaded once.

    The base is a language model where one of them writes text, otherwise the backbone.

    Args:
        folder: what `save_pretrained` wrote of several adapters, or a folder of trained ones.
        adapters: which ones, by the names of their folders; None means all.
        model: the base, where it is not where it was.
        max_length: tokens of a row, of all of them; None means as each was trained.
        head: which head, for those that have several.

    Returns:
        The adapters by the names of their folders; `model` is the same object in all of them, and calls each by its
        `name`, the same one but where no adapter can have it ("ner.v2").

    Raises:
        FileNotFoundError: there is no such folder, or no such base.
        ValueError: the folder holds no such adapters, they are of several bases, one of them has a copy of its base's
            own head, or as `load_trained`.
    """
    folder = Path(folder)
    names = list(dict.fromkeys(adapters or folders_in(folder)))
    if not names:
        read_description(folder)
        raise ValueError(f"{folder} holds a single adapter; expected several, each in a folder")
    plans = {name: _planned(folder_of(folder, name), model, head, several=True) for name in names}
    first = next(iter(plans.values()))
    for name, plan in plans.items():
        if len(plans) > 1 and plan.own_head:
            raise ValueError(
                f"{plan.folder} holds a copy of its base's own head, which shares no base with other adapters; give "
                f"{plan.folder} itself (--adapter {name})"
            )
        if plan.base != first.base:
            raise ValueError(
                f"{first.folder} and {plan.folder} must be of one base to share it; they name {first.base!r} and "
                f"{plan.base!r}: give one of the folders (--adapter), or name the base (--model)"
            )
    if len(plans) == 1:
        (name,) = plans
        single = load_trained(first.folder, model=model, max_length=max_length, head=first.head_name)
        return {name: single}
    writer = next((plan.task_type for plan in plans.values() if TASKS[plan.task_type].gives == "text"), None)
    base, tokenizer = load_base(first.base, writer or first.task_type)
    codecs = {name: _codec(plan, base, tokenizer, max_length) for name, plan in plans.items()}
    called = _usable_names(plans)
    wrapped = PTuningV2Model.from_pretrained(base, first.folder, adapter_name=called[names[0]])
    for name in names[1:]:
        wrapped.load_adapter(plans[name].folder, called[name])
    wrapped.eval()
    return {
        name: LoadedAdapter(wrapped, codecs[name], plan.head_name, plan.settings, called[name])
        for name, plan in plans.items()
    }


def _usable_names(folders: Collection[str]) -> dict[str, str]:
    """What a model calls the adapters of folders: the same, but where no adapter can have a folder's name."""
    names: dict[str, str] = {}
    for folder in folders:
        try:
            check_name(folder)
            usable = namesake(folder, names.values()) is None
        except ValueError:
            usable = False
        others = (name for name in map("adapter_{}".format, count()) if name not in {*folders, *names.values()})
        names[folder] = folder if usable else next(others)
    return names


def _planned(folder: Path, model: str | None, head: str | None, *, several: bool = False) -> _Plan:
    """What an adapter needs, checked.

    Args:
        model, head: as in `load_trained`.
        several: `head` is meant for those that have several heads.
    """
    description = read_description(folder)
    config = PTuningV2Config.from_dict(description["config"])
    name = model or description["base"].get("name_or_path")
    if not name:
        raise ValueError(f"{folder} does not say which base it was trained on; name it")
    if several and len(config.heads or {}) < 2:
        head = None
    try:
        chosen = _chosen_head(config, head)
    except ValueError as error:
        raise (ValueError(f"{folder}: {error}") if several else error) from None
    task_type = chosen.task_type if chosen is not None else config.task_type
    if task_type in FEATURE_TASKS:
        raise ValueError(f"{folder} is an adapter for {task_type}; the command line and ptv2_fast.training serve texts")
    if task_type == "SEQ_2_SEQ_LM":
        raise ValueError(
            f"{folder} is an adapter for SEQ_2_SEQ_LM, which the command line and ptv2_fast.training do not serve; "
            "PTuningV2Model.from_pretrained loads it, and its generate writes"
        )
    if task_type not in DEFAULT_MAX_LENGTH:
        raise ValueError(f"{folder} is an adapter for {task_type}, which predicts nothing by itself")
    settings = read_settings(folder)
    own_head = config.heads is None and task_type in HEAD_TASKS
    return _Plan(folder, name, config, task_type, chosen, head, own_head, description.get("labels"), settings)


def _codec(plan: _Plan, base: Any, tokenizer: Any, max_length: int | None) -> TaskCodec:
    """How examples become features for an adapter on a base.

    Raises:
        ValueError: its head gives several numbers a row.
    """
    problem = plan.head.problem_type if plan.head is not None else _solved_by(base, plan.task_type)
    row = task_row(plan.task_type, problem)
    outputs = plan.head.num_labels if plan.head is not None else base.config.num_labels
    if row.predicts == "number" and outputs != 1:
        raise ValueError(
            f"{plan.folder} gives {outputs} numbers a row; the command line and ptv2_fast.training serve one"
        )
    return TaskCodec(
        plan.task_type,
        tokenizer,
        _labels(plan.head, base, row, plan.labels),
        max_length=max_length or plan.settings.get("row_length") or DEFAULT_MAX_LENGTH[plan.task_type],
        doc_stride=plan.settings.get("doc_stride", 128),
        no_answer=plan.settings.get("no_answer", False),
        problem_type=problem,
    )


def _shapes(path: Path) -> dict[str, list[int]]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}


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


def _solved_by(base: Any, task_type: str) -> str | None:
    """What a base's own head solves, as its loss has it: numbers where it has one output and says nothing else."""
    if not TASKS[task_type].solves_others:
        return None
    said: str | None = base.config.problem_type
    return said or ("regression" if base.config.num_labels == 1 else None)


def _labels(head: HeadConfig | None, base: Any, row: TaskType, saved: Any) -> LabelSet | None:
    if not row.names_labels:
        return None
    if head is not None:
        return LabelSet(tuple(head.labels or (str(index) for index in range(head.num_labels))))
    if isinstance(saved, list) and saved:
        return LabelSet(tuple(map(str, saved)))
    names = base.config.id2label
    return LabelSet(tuple(names[index] for index in range(len(names))))


def _hashable(names: Any) -> Any:
    return tuple(names) if isinstance(names, list) else names
