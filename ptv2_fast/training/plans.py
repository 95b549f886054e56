"""What an adapter's folder needs of a base and reads of a file, known before any base is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptv2_fast.config import FEATURE_TASKS, HEAD_TASKS, HeadConfig
from ptv2_fast.task_types import TASKS, TaskType
from ptv2_fast.training.data.tasks import ReadingTask, reading_task
from ptv2_fast.training.described import (
    COLUMNS,
    config_in,
    folder_of,
    folders_in,
    read_description,
    read_settings,
)
from ptv2_fast.training.labels import LabelSet
from ptv2_fast.training.locating import check_base
from ptv2_fast.training.tasks import TrainingTask, task_row, training_task

if TYPE_CHECKING:
    from ptv2_fast.training.data.source import DataSource


@dataclass(frozen=True)
class Reader:
    """How an adapter's examples are read.

    Attributes:
        task_type, problem_type: as in `TaskCodec`.
        labels: the classes or tags of training; None for tasks without any, or where they are the base's own.
        settings: what it was trained with, where somebody wrote it down.
    """

    task_type: str
    problem_type: str | None = None
    labels: LabelSet | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def task(self) -> TrainingTask:
        """What is done for the task."""
        return training_task(self.task_type, self.problem_type)

    @property
    def reading(self) -> ReadingTask:
        """How rows become its examples."""
        return reading_task(self.task_type, self.problem_type)

    @property
    def row(self) -> TaskType:
        """The task's row, for what its head solves."""
        return task_row(self.task_type, self.problem_type)

    @property
    def columns(self) -> dict[str, Any]:
        """The columns that training was told to read, as arguments of `DataSource`."""
        source = self.settings.get("data") or {}
        return {name: _hashable(source[name]) for name in COLUMNS if source.get(name)}

    def read(self, source: DataSource, *, labelled: bool = True) -> list[dict[str, Any]]:
        """The examples of a source, as the adapter's task has them."""
        known = self.labels if labelled else None
        return source.read(self.task_type, known, labelled=labelled, problem_type=self.problem_type)

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
class Plan:
    """What a folder's adapter needs of a base.

    Attributes:
        base: the name of the base that it was trained on.
        head: the head that predicts; None where that is a copy of the base's own, or the base's own.
        own_head: whether it is such a copy.
        labels: what was saved of the copy's label names.
    """

    folder: Path
    base: str
    task_type: str
    head: HeadConfig | None
    head_name: str | None
    own_head: bool
    labels: Any
    settings: dict[str, Any]

    @property
    def needs_base_to_read(self) -> bool:
        """Whether the base alone knows what labels of a file mean."""
        task = TASKS[self.task_type]
        return self.own_head and (task.solves_others or (task.names_labels and not isinstance(self.labels, list)))

    @property
    def reader(self) -> Reader:
        """How its examples are read; their labels too, unless `needs_base_to_read`."""
        problem = self.head.problem_type if self.head is not None else None
        names = None
        if self.head is not None and task_row(self.task_type, problem).names_labels:
            names = self.head.labels or [str(index) for index in range(self.head.num_labels)]
        elif isinstance(self.labels, list) and self.labels:
            names = list(map(str, self.labels))
        return Reader(self.task_type, problem, LabelSet(tuple(names)) if names is not None else None, self.settings)


def plan_of(
    folder: str | Path, *, adapter: str | None = None, model: str | None = None, head: str | None = None
) -> Plan:
    """What the adapter of a folder needs, checked; arguments as those of `load_trained`.

    Raises:
        FileNotFoundError: there is no such folder, or no such base.
        ValueError: the folder holds no whole adapter, not that one, or several.
    """
    return _plan(Path(folder) if adapter is None else folder_of(Path(folder), adapter), model, head)


def plans_of(
    folder: str | Path,
    *,
    adapters: Sequence[str] | None = None,
    model: str | None = None,
    head: str | None = None,
) -> dict[str, Plan]:
    """What the adapters of a folder's sub-folders need, which share a base; arguments as those of `load_all`.

    Raises:
        FileNotFoundError, ValueError: as `load_all`.
    """
    folder = Path(folder)
    names = list(dict.fromkeys(adapters or folders_in(folder)))
    if not names:
        read_description(folder)
        raise ValueError(f"{folder} holds a single adapter; expected several, each in a folder")
    plans = {name: _plan(folder_of(folder, name), model, head, several=True) for name in names}
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
    return plans


def _plan(folder: Path, model: str | None, head: str | None, *, several: bool = False) -> Plan:
    """What an adapter needs, checked.

    Args:
        model, head: as in `load_trained`.
        several: `head` is meant for those that have several heads.
    """
    description = read_description(folder)
    values = description["config"]
    config, known = config_in(values)
    name = model or description["base"].get("name_or_path")
    if not name:
        raise ValueError(f"{folder} does not say which base it was trained on; name it")
    if several and len(known) < 2:
        head = None
    try:
        chosen = _chosen_head(known, head)
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
    if TASKS[task_type].predicts is None:
        raise ValueError(f"{folder} is an adapter for {task_type}, which predicts nothing by itself")
    settings = read_settings(folder)
    check_base(name)
    own_head = values.get("heads") is None and task_type in HEAD_TASKS
    return Plan(folder, name, task_type, chosen, head, own_head, description.get("labels"), settings)


def _chosen_head(heads: Mapping[str, HeadConfig], head: str | None) -> HeadConfig | None:
    if not heads:
        if head is not None:
            raise ValueError(f"head must be None for an adapter without named heads; got {head!r}")
        return None
    if head is None and len(heads) == 1:
        return next(iter(heads.values()))
    if head is None or head not in heads:
        raise ValueError(f"head must be one of {', '.join(heads)}; got {head!r}")
    return heads[head]


def _hashable(names: Any) -> Any:
    return tuple(names) if isinstance(names, list) else names
