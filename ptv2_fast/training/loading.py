"""Trained adapters, ready to predict: from a folder to a model on its base, with the settings of its training."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ptv2_fast import PTuningV2Model
from ptv2_fast.storage.names import WEIGHTS_NAME, check_name, namesake
from ptv2_fast.task_types import TASKS, TaskType
from ptv2_fast.training.bases import head_size, load_base
from ptv2_fast.training.labels import LabelSet
from ptv2_fast.training.plans import Plan, Reader, plan_of, plans_of
from ptv2_fast.training.task_data import DEFAULT_MAX_LENGTH, TaskCodec
from ptv2_fast.training.tasks import task_row
from ptv2_fast.training.train_request import DataSource


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

    def chosen(self) -> LoadedAdapter:
        """This adapter, active in its model: what `predict`, `evaluate` and `records_of` run."""
        self.model.active_adapter = self.name
        return self

    @property
    def reader(self) -> Reader:
        """How its examples are read."""
        return Reader(self.codec.task_type, self.codec.problem_type, self.codec.labels, self.settings)

    @property
    def columns(self) -> dict[str, Any]:
        """The columns that training was told to read, as arguments of `DataSource`."""
        return self.reader.columns

    def read(self, source: DataSource, *, labelled: bool = True) -> list[dict[str, Any]]:
        """The examples of a `DataSource`, as the adapter's task has them."""
        return self.reader.read(source, labelled=labelled)

    def check_parts(self, where: str, examples: Sequence[Mapping[str, Any]]) -> None:
        """Refuse single texts where training read pairs, and pairs where it read single texts.

        Raises:
            ValueError: see above.
        """
        self.reader.check_parts(where, examples)


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
        folder: what `ptv2-fast train` or `save_pretrained` wrote.
        adapter: which one, where the folder holds several, each in a sub-folder.
        model: the base, where it is not where it was.
        max_length: tokens of a row; None means as in training, where the folder says it.
        head: which head, where there are several.

    Raises:
        FileNotFoundError: there is no such folder, or no such base.
        ValueError: the folder holds no whole adapter, not that one, or several; or the base is another one.

    Example:
        ```python
        from transformers import AutoModel, BertConfig, BertModel, BertTokenizer

        from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model
        from ptv2_fast.training.loading import load_trained
        from ptv2_fast.training.predict import predict

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fine", "film"]
        BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained("base")
        BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)).save_pretrained("base")
        head = HeadConfig("SEQ_CLS", 2, labels=["bad", "good"])
        config = PTuningV2Config("SEQ_CLS", heads={"opinion": head})
        get_ptv2_model(AutoModel.from_pretrained("base"), config).save_pretrained("adapter")

        loaded = load_trained("adapter")  # or the folder of `ptv2-fast train`
        (prediction,) = predict(loaded.model, loaded.codec, [{"text": "fine film"}])
        assert prediction.value in ("bad", "good")
        ```
    """
    return load_plan(plan_of(folder, adapter=adapter, model=model, head=head), max_length)


def load_plan(plan: Plan, max_length: int | None = None, device: Any = None) -> LoadedAdapter:
    """Load the adapter of a plan, onto a device; see `load_trained`."""
    outputs = None
    if plan.own_head and TASKS[plan.task_type].names_labels:
        shapes = _shapes(plan.folder / WEIGHTS_NAME)
        outputs = len(plan.labels) if isinstance(plan.labels, list) else head_size(plan.base, plan.task_type, shapes)
    base, tokenizer = load_base(plan.base, plan.task_type, own_head=plan.own_head, num_labels=outputs)
    codec = _codec(plan, base, tokenizer, max_length)
    wrapped = PTuningV2Model.from_pretrained(base, plan.folder)
    if device is not None:
        wrapped.to(device)
    return LoadedAdapter(wrapped, codec, plan.head_name, plan.settings, wrapped.active_adapter)


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

    Example:
        ```python
        from transformers import AutoModel, BertConfig, BertModel, BertTokenizer

        from ptv2_fast import HeadConfig, PTuningV2Config, get_ptv2_model
        from ptv2_fast.training.loading import load_all
        from ptv2_fast.training.predict import predict

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fine", "film"]
        BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained("base")
        BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)).save_pretrained("base")
        opinion = HeadConfig("SEQ_CLS", 2, labels=["bad", "good"])
        topic = HeadConfig("SEQ_CLS", 2, labels=["films", "books"])
        base = AutoModel.from_pretrained("base")
        model = get_ptv2_model(base, PTuningV2Config("SEQ_CLS", heads={"opinion": opinion}), "opinions")
        model.add_adapter("topics", PTuningV2Config("SEQ_CLS", heads={"topic": topic}))
        model.save_pretrained("adapters")

        loaded = load_all("adapters")
        topics = loaded["topics"].chosen()
        (prediction,) = predict(topics.model, topics.codec, [{"text": "fine film"}])
        assert prediction.value in ("films", "books")
        ```
    """
    return load_plans(plans_of(folder, adapters=adapters, model=model, head=head), max_length)


def load_plans(
    plans: Mapping[str, Plan], max_length: int | None = None, device: Any = None
) -> dict[str, LoadedAdapter]:
    """Load the adapters of plans that share a base, onto a device; see `load_all`."""
    first = next(iter(plans.values()))
    if len(plans) == 1:
        return {name: load_plan(plan, max_length, device) for name, plan in plans.items()}
    writer = next((plan.task_type for plan in plans.values() if TASKS[plan.task_type].gives == "text"), None)
    base, tokenizer = load_base(first.base, writer or first.task_type)
    codecs = {name: _codec(plan, base, tokenizer, max_length) for name, plan in plans.items()}
    called, names = _usable_names(plans), list(plans)
    wrapped = PTuningV2Model.from_pretrained(base, first.folder, adapter_name=called[names[0]])
    for name in names[1:]:
        wrapped.load_adapter(plans[name].folder, called[name])
    wrapped.eval()
    if device is not None:
        wrapped.to(device)
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


def _codec(plan: Plan, base: Any, tokenizer: Any, max_length: int | None) -> TaskCodec:
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
        _labels(plan, base, row),
        max_length=max_length or plan.settings.get("row_length") or DEFAULT_MAX_LENGTH[plan.task_type],
        doc_stride=plan.settings.get("doc_stride", 128),
        no_answer=plan.settings.get("no_answer", False),
        problem_type=problem,
    )


def _shapes(path: Path) -> dict[str, list[int]]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}


def _solved_by(base: Any, task_type: str) -> str | None:
    """What a base's own head solves, as its loss has it: numbers where it has one output and says nothing else."""
    if not TASKS[task_type].solves_others:
        return None
    said: str | None = base.config.problem_type
    return said or ("regression" if base.config.num_labels == 1 else None)


def _labels(plan: Plan, base: Any, row: TaskType) -> LabelSet | None:
    if not row.names_labels:
        return None
    names = base.config.id2label
    return plan.reader.labels or LabelSet(tuple(names[index] for index in range(len(names))))
