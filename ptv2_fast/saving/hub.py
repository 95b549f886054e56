"""Adapters on the Hugging Face hub: found, described by a model card, and pushed."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ptv2_fast.saving.checkpoint import CONFIG_NAME, TRAINER_WEIGHTS_NAME, WEIGHTS_NAME
from ptv2_fast.saving.described import Described
from ptv2_fast.task_types import TASKS

CARD_NAME = "README.md"
_FILES = [WEIGHTS_NAME, CONFIG_NAME, f"*/{WEIGHTS_NAME}", f"*/{CONFIG_NAME}"]


def adapter_folder(name: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """A folder with adapters: `name` itself where it is one, otherwise the hub's repository of that name.

    Only what a checkpoint consists of is downloaded.

    Raises:
        ValueError: there is no such folder and no such repository, or the hub cannot be reached; the message says
            which.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    is_repository = isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not is_repository:
        raise ValueError(f"adapter folder {name} does not exist")
    files = [*_FILES, TRAINER_WEIGHTS_NAME]
    try:
        return Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name} is neither a folder nor a repository that could be read: {reason}") from error


def model_card(
    model: Described,
    adapter_names: Sequence[str] | None = None,
    metrics: Mapping[str, float] | None = None,
    repo_id: str = ".",
) -> ModelCard:
    """The card of a model's adapters: base, task, injection, P, trained parameters, metrics and how to load them.

    Adapters of several tasks have a tag each for theirs; the hub's pipeline is that of a single one.

    Args:
        metrics: name -> value of a single adapter, "accuracy" for instance; the hub's table of results names its task,
            so that it has them where all adapters have one.
        repo_id: what the example loads: a repository, or the folder of the card.
    """
    names = list(model.adapters) if adapter_names is None else list(adapter_names)
    configs = {name: model.adapters[name].config for name in names}
    base, kind = model.base_model.config.name_or_path, type(model.base_model).__name__
    tasks = list(dict.fromkeys(TASKS[config.task_type].hub_tag for config in configs.values()))
    injections = dict.fromkeys(config.injection for config in configs.values())
    results = (metrics or {}).items() if len(tasks) == 1 else ()
    data = ModelCardData(
        base_model=base or None,
        library_name="ptv2-fast",
        pipeline_tag=tasks[0] if len(tasks) == 1 else None,
        tags=["p-tuning-v2", "prompt-tuning", *injections, *(tasks if len(tasks) > 1 else ())],
        model_name="prompts",
        eval_results=[EvalResult(tasks[0], "held-out", "held-out rows", metric, value) for metric, value in results]
        or None,
    )
    rows = [
        f"| {name} | {config.task_type} | {config.injection} | {config.num_virtual_tokens} "
        f"| {sum(p.numel() for p in model.adapters[name].parameters()):,} |"
        for name, config in configs.items()
    ]
    lines = [
        "---",
        data.to_yaml(),
        "---",
        f"# Prompts for {base or 'a ' + kind}",
        "",
        "Trained virtual tokens (P-Tuning v2) for a frozen model, made with ptv2_fast. The base is not in here.",
        "",
        "| adapter | task | injection | virtual tokens | trained parameters |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]
    if metrics:
        lines += ["| metric | value |", "|---|---|", *(f"| {k} | {v:.4g} |" for k, v in metrics.items()), ""]
    if base:
        lines += [
            "```python",
            f"from transformers import {kind}",
            "from ptv2_fast import PTuningV2Model",
            "",
            f"base = {kind}.from_pretrained({base!r})",
            f"model = PTuningV2Model.from_pretrained(base, {repo_id!r})",
            *_choosing(model, names),
            "```",
            "",
        ]
    else:
        lines += [f"`PTuningV2Model.from_pretrained(base, {repo_id!r})` loads them over their {kind}.", ""]
    return ModelCard("\n".join(lines))


def _choosing(model: Described, names: Sequence[str]) -> list[str]:
    """How one of several adapters is chosen: for all rows, and for each where a batch may hold rows of all."""
    if len(names) == 1:
        return []
    lines = [f"model.set_adapter({names[-1]!r})  # the one that runs, trains and says what the model is for"]
    kinds = [TASKS[model.adapters[name].config.task_type] for name in names]
    copied = any(len(model.adapters[name].base_heads) for name in names)
    if not copied and not any(kind.in_groups and not kind.pools_itself for kind in kinds):
        lines.append(f"# or one for each row of a batch: model(**batch, adapter_names={list(names)!r})")
    return lines


def push_to_hub(
    model: Described,
    repo_id: str,
    *,
    adapter_names: Sequence[str] | None = None,
    metrics: Mapping[str, float] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload prompts",
) -> Any:
    """Create the repository where it does not exist and upload adapters with their card, in one commit.

    What is pushed is what the repository then holds: the commit removes adapters that an earlier push left there.

    Returns:
        The hub's description of the commit.

    Raises:
        ValueError: as `save_pretrained`; nothing is created then.
    """
    with tempfile.TemporaryDirectory() as folder:
        names = None if adapter_names is None else list(adapter_names)
        model.save_pretrained(folder, adapter_names=names)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        text = str(model_card(model, names, metrics, repo_id))
        (Path(folder) / CARD_NAME).write_text(text, encoding="utf-8")
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            delete_patterns=_FILES,
        )
