"""Trained adapters, ready to predict: from a folder to a model on its base, with the settings of its training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open

from ptv2_fast import PTuningV2Config, PTuningV2Model
from ptv2_fast.config import FEATURE_TASKS, HEAD_TASKS, HeadConfig
from ptv2_fast.saving.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from ptv2_fast.task_types import TASKS, TaskType
from ptv2_fast.training.bases import head_size, load_base
from ptv2_fast.training.labels import LabelSet
from ptv2_fast.training.run_folder import SETTINGS_NAME, RunFolder, read_object
from ptv2_fast.training.task_data import DEFAULT_MAX_LENGTH, TaskCodec
from ptv2_fast.training.tasks import task_row

_COLUMNS = ("text_column", "label_column", "prompt_column", "completion_column")
_MOST = (1 << 31) - 1  # what tokenizers count up to


@dataclass(frozen=True)
class LoadedAdapter:
    """A trained adapter on its base, ready to predict."""

    model: PTuningV2Model
    codec: TaskCodec
    head: str | None
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def columns(self) -> dict[str, Any]:
        """The columns that training was told to read, as arguments of `DataSource`."""
        source = self.settings.get("data") or {}
        return {name: _hashable(source[name]) for name in _COLUMNS if source.get(name)}

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
    if task_type == "SEQ_2_SEQ_LM":
        raise ValueError(
            f"{folder} is an adapter for SEQ_2_SEQ_LM, which the command line and ptv2_fast.training do not serve; "
            "PTuningV2Model.from_pretrained loads it, and its generate writes"
        )
    if task_type not in DEFAULT_MAX_LENGTH:
        raise ValueError(f"{folder} is an adapter for {task_type}, which predicts nothing by itself")
    settings = _checked_settings(Path(folder) / SETTINGS_NAME, RunFolder(Path(folder)).settings())
    own_head = config.heads is None and task_type in HEAD_TASKS
    saved = description.get("labels")
    count = None
    if own_head and TASKS[task_type].names_labels:
        shapes = _shapes(Path(folder) / WEIGHTS_NAME)
        count = len(saved) if isinstance(saved, list) else head_size(name, task_type, shapes)
    base, tokenizer = load_base(name, task_type, own_head=own_head, num_labels=count)
    problem = chosen.problem_type if chosen is not None else _solved_by(base, task_type)
    row = task_row(task_type, problem)
    outputs = chosen.num_labels if chosen is not None else base.config.num_labels
    if row.predicts == "number" and outputs != 1:
        raise ValueError(f"{folder} gives {outputs} numbers a row; the command line and ptv2_fast.training serve one")
    adapter = PTuningV2Model.from_pretrained(base, folder)
    codec = TaskCodec(
        task_type,
        tokenizer,
        _labels(chosen, base, row, saved),
        max_length=max_length or settings.get("row_length") or DEFAULT_MAX_LENGTH[task_type],
        doc_stride=settings.get("doc_stride", 128),
        no_answer=settings.get("no_answer", False),
        problem_type=problem,
    )
    return LoadedAdapter(adapter, codec, head, settings)


def read_description(folder: str | Path) -> dict[str, Any]:
    """The description of the single adapter in a folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no adapter, or its description is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"adapter folder {folder} does not exist")
    if not (folder / WEIGHTS_NAME).is_file():
        below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f"; name one of its folders {', '.join(below)}" if below else ""
        raise ValueError(f"{folder} holds no adapter ({WEIGHTS_NAME}){hint}")
    _checked(folder / CONFIG_NAME, read_object(folder / CONFIG_NAME))
    path = folder / WEIGHTS_NAME
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("ptv2")
        description = json.loads(text) if text is not None else None
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole adapter: {error}") from error
    if description is None:
        raise ValueError(f"{path} was not written by ptv2_fast: its metadata has no 'ptv2' entry")
    found: dict[str, Any] = _checked(path, description)
    return found


def _checked(path: Path, description: Any) -> Any:
    parts = {"config": dict, "base": dict}
    whole = isinstance(description, dict) and all(isinstance(description.get(k), t) for k, t in parts.items())
    if description is not None and not whole:
        raise ValueError(f"{path} must hold a description with 'config' and 'base'")
    if whole and not isinstance(description["base"].get("name_or_path"), str | None):
        raise ValueError(f"{path} must name its base by a text; got {description['base']['name_or_path']!r}")
    return description


def _checked_settings(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of which the parts that are read here are of their kinds, where they are there.

    Raises:
        ValueError: one is not; the message names it.
    """
    data = settings.get("data")
    columns = data if isinstance(data, dict) else {}
    fits = {
        "row_length": _is_count(settings.get("row_length"), 1),
        "doc_stride": _is_count(settings.get("doc_stride"), 0),
        "no_answer": isinstance(settings.get("no_answer"), bool | None),
        "reads": settings.get("reads") is None or _are_names(settings["reads"]),
        "data": isinstance(data, dict | None),
        **{name: isinstance(columns.get(name), str | None) for name in _COLUMNS[1:]},
        _COLUMNS[0]: columns.get(_COLUMNS[0]) is None or _are_names(columns[_COLUMNS[0]]),
    }
    wrong = next((name for name, fit in fits.items() if not fit), None)
    if wrong is not None:
        raise ValueError(f"{path} is damaged: {wrong} cannot be {columns.get(wrong, settings.get(wrong))!r}")
    return {name: value for name, value in settings.items() if value is not None}


def _is_count(value: Any, low: int) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and low <= value <= _MOST)


def _are_names(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


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
