"""What an adapter's folder says of itself: its description and the settings of its training, checked; no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ptv2_fast.config import HeadConfig, PTuningV2Config, head_configs
from ptv2_fast.storage.names import CONFIG_NAME, WEIGHTS_NAME
from ptv2_fast.training.run_folder import SETTINGS_NAME, RunFolder, read_object

# What settings say of columns, as arguments of `DataSource`.
COLUMNS = (
    "text_column", "label_column", "prompt_column", "completion_column", "tag_scheme", "label_names",
)  # fmt: skip
# Of these, the ones that are names alone; the others may be lists of names.
_SINGLE = ("prompt_column", "completion_column", "tag_scheme")
_MOST = (1 << 31) - 1  # what tokenizers count up to


def folders_in(folder: str | Path) -> list[str]:
    """The names of a folder's sub-folders that hold an adapter each; none where the folder itself holds one.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"adapter folder {folder} does not exist")
    if (folder / WEIGHTS_NAME).is_file():
        return []
    below = (path.parent.name for path in folder.glob(f"*/{WEIGHTS_NAME}") if path.is_file())
    return sorted(name for name in below if not name.startswith("."))


def several_in(folder: str | Path, adapters: Sequence[str] | None = None) -> list[str]:
    """The adapters that are meant of a folder with several: those that are named, else all; none where it holds one.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no adapter of a name.
    """
    if not adapters:
        return folders_in(folder)
    for name in adapters:
        folder_of(Path(folder), name)
    return list(dict.fromkeys(adapters))


def folder_of(folder: Path, adapter: str) -> Path:
    """The folder of an adapter by its name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no adapter of that name.
    """
    names = folders_in(folder)
    if adapter in names:
        return folder / adapter
    if names:
        raise ValueError(f"adapter must be one of {', '.join(names)}, which {folder} holds; got {adapter!r}")
    own = read_description(folder).get("adapter_name")
    if own != adapter:
        raise ValueError(f"adapter must be {own!r}, the single one of {folder}, or left out; got {adapter!r}")
    return folder


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
        below = folders_in(folder)
        hint = f"; name one of its folders {', '.join(below)} (--adapter)" if below else ""
        raise ValueError(f"{folder} holds no adapter ({WEIGHTS_NAME}){hint}")
    _checked(folder / CONFIG_NAME, read_object(folder / CONFIG_NAME))
    path = folder / WEIGHTS_NAME
    try:
        with safe_open(path, framework="numpy") as file:
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


def config_in(values: Mapping[str, Any]) -> tuple[PTuningV2Config, dict[str, HeadConfig]]:
    """What a description says in "config": the configuration, which is another one without its heads, and those.

    Raises:
        ValueError: it is no configuration.
    """
    heads = values.get("heads")
    if heads is not None and not isinstance(heads, Mapping):
        raise ValueError(f"heads must be a mapping of names or None; got {heads!r}")
    config = PTuningV2Config.from_dict({**values, "heads": None})
    return config, head_configs(config.task_type, heads or {})


def read_settings(folder: Path) -> dict[str, Any]:
    """What an adapter was trained with, where somebody wrote it down; the parts that are read here are of their kinds.

    Raises:
        ValueError: one is not; the message names it.
    """
    path, settings = folder / SETTINGS_NAME, RunFolder(folder).settings()
    data = settings.get("data")
    columns = data if isinstance(data, dict) else {}
    fits = {
        "row_length": _is_count(settings.get("row_length"), 1),
        "doc_stride": _is_count(settings.get("doc_stride"), 0),
        "no_answer": isinstance(settings.get("no_answer"), bool | None),
        "chat": isinstance(settings.get("chat"), bool | None),
        "reads": settings.get("reads") is None or _are_names(settings["reads"]),
        "data": isinstance(data, dict | None),
        **{name: isinstance(columns.get(name), str | None) for name in _SINGLE},
        "label_column": isinstance(columns.get("label_column"), str | None) or _are_names(columns["label_column"]),
        **{name: columns.get(name) is None or _are_names(columns[name]) for name in ("text_column", "label_names")},
    }
    wrong = next((name for name, fit in fits.items() if not fit), None)
    if wrong is not None:
        raise ValueError(f"{path} is damaged: {wrong} cannot be {columns.get(wrong, settings.get(wrong))!r}")
    return {name: value for name, value in settings.items() if value is not None}


def _is_count(value: Any, low: int) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and low <= value <= _MOST)


def _are_names(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
