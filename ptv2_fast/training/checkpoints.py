"""Trainer's checkpoints: which one a resumed run goes on from."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path

from ptv2_fast.saving.checkpoint import TRAINER_WEIGHTS_NAME
from ptv2_fast.storage.tensors import read_safetensors

logger = logging.getLogger(__name__)


def last_whole(checkpoints: Path) -> str | None:
    """The newest checkpoint that was written to its end and can be read; damaged ones are named in a warning."""
    for folder in sorted(checkpoints.glob("checkpoint-*"), key=_step, reverse=True):
        try:
            _check(folder)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            logger.warning("%s is passed over: %s", folder, " ".join(str(error).split()) or type(error).__name__)
            continue
        return str(folder)
    return None


def _step(folder: Path) -> int:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _check(folder: Path) -> None:
    """Raises where a part is missing or damaged; Trainer writes its state last."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    if not isinstance(state, dict) or state.get("global_step") != _step(folder):
        raise ValueError("trainer_state.json does not speak of this step")
    if not isinstance(state.get("log_history"), list):
        raise ValueError("trainer_state.json has no history")
    read_safetensors(folder / TRAINER_WEIGHTS_NAME)
    for path in (folder / "optimizer.pt", folder / "scheduler.pt", *folder.glob("rng_state*.pth")):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{path.name} is damaged in {damaged}")
