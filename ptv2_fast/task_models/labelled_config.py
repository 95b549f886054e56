"""A model's configuration with other label names: everything else of it is the same configuration, live."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PretrainedConfig

Labels = Mapping[int, str]


def labelled(
    config: PretrainedConfig,
    read: Callable[[], Labels],
    write: Callable[[Any], None],
    problem_type: str | None = None,
) -> PretrainedConfig:
    """`config` under an object whose `id2label`, `label2id` and `num_labels` are somebody else's.

    Both objects share their attributes: what is set on either is read from both. Copies, files and dictionaries of the
    new object are plain configurations with its label names.

    Args:
        read: gives the names by id.
        write: is called with the names that are assigned, as the caller gave them, and checks them.
        problem_type: what the labels are for, and nothing else can be set; None leaves it as the configuration has it.
    """
    own: Any = type(config)
    view: Any = object.__new__(_with_labels_of(own, problem_type))
    view.__dict__ = config.__dict__
    object.__setattr__(view, "_owner", (config, read, write))
    return view


class _Names(dict):
    """Names by id (or ids by name), which are somebody's: an item that is set is set there."""

    def __init__(self, names: Mapping, write: Callable[[dict], None]):
        super().__init__(names)
        self._write = write

    def __setitem__(self, key: Any, value: Any) -> None:
        self._write({**self, key: value})
        super().__setitem__(key, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)


def _restored(kind: type[PretrainedConfig], attributes: Mapping[str, Any]) -> PretrainedConfig:
    config: Any = object.__new__(kind)
    config.__dict__.update(attributes)
    return config


def _parts(view: Any) -> tuple[type[PretrainedConfig], dict[str, Any]]:
    """The class and the attributes of a plain configuration with the view's label names."""
    config, read, _ = view._owner
    names = dict(read())
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    return type(config), {**config.__dict__, **labels, "problem_type": getattr(view, "problem_type", None)}


def _names(view: Any) -> dict[int, str]:
    _, read, write = view._owner
    return _Names(read(), write)


def _ids(view: Any) -> dict[str, int]:
    _, read, write = view._owner
    return _Names({name: i for i, name in read().items()}, lambda ids: write(_inverted(ids)))


def _inverted(ids: Any) -> Any:
    return {i: name for name, i in ids.items()} if isinstance(ids, Mapping) else ids


def _refuse_problem(problem_type: str) -> Callable[[Any, Any], None]:
    """A setter that takes what is there already."""

    def write(view: Any, value: Any) -> None:
        if value != problem_type:
            raise ValueError(
                f"problem_type must stay what the adapter's head was made for, {problem_type!r}: HeadConfig says it; "
                f"got {value!r}"
            )

    return write


@functools.cache
def _with_labels_of(kind: type, problem_type: str | None) -> type:
    """The subclass of a configuration's class whose label names are its owner's, for one kind of problem."""

    def forwarded(name: str) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: getattr(_restored(*_parts(self)), name)(*args, **kwargs)

    members: dict[str, Any] = {
        "__slots__": ("_owner",),
        "__module__": kind.__module__,
        "id2label": property(_names, lambda self, names: self._owner[2](names)),
        "label2id": property(_ids, lambda self, ids: self._owner[2](_inverted(ids))),
        "__reduce_ex__": lambda self, protocol: (_restored, _parts(self)),
        **{name: forwarded(name) for name in ("to_dict", "to_diff_dict")},
    }
    if problem_type is not None:
        members["problem_type"] = property(lambda self: problem_type, _refuse_problem(problem_type))
    return type(kind.__name__, (kind,), members)
