"""The folder of a run: what is in it belongs to one run, old or new, wherever a process is killed.

A run's folder holds

    ptv2_model.safetensors, ptv2_config.json   the adapter at its best epoch
    settings.json                              what it was trained with, and which weights it speaks of
    metrics.json                               dev scores, history, speed, rows, versions
    curves.png                                 losses and metrics over the steps
    checkpoints/                               Trainer's checkpoints: the best and the last epoch
    checkpoints/run.json                       what the run in progress was asked for; `--resume` compares it

While a run is in progress the adapter of an earlier one, with its settings and metrics, stays what it was. A new run
brings a whole new `checkpoints/`; its adapter is saved beside the old one and moved over it at the end, between two
settings of which the weights say which one is theirs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptv2_fast.storage.files import write_whole
from ptv2_fast.storage.names import WEIGHTS_NAME

SETTINGS_NAME, METRICS_NAME, CURVES_NAME = "settings.json", "metrics.json", "curves.png"
CHECKPOINTS, RUN_NAME = "checkpoints", "run.json"
# What a killed process may leave; the next one removes it.
_NEW, _OLD, _SAVED = ".checkpoints.new", ".checkpoints.old", ".adapter.new"
_RUN_KEYS = {"model", "task_type", "data", "fit"}


def check_writable(folder: Path) -> None:
    """Refuse a folder that is a file, or can be neither made nor written to.

    Raises:
        ValueError: see above.
    """
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        raise ValueError(f"output must be a folder; {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"output must be a folder to write to; {above} is read-only")


@dataclass(frozen=True)
class RunFolder:
    """A folder for one run at a time."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where Trainer saves."""
        return self.path / CHECKPOINTS

    def check(self, asked: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that the run must not or cannot use; nothing is written.

        Args:
            asked: what the run is asked for, as plain JSON values.

        Raises:
            ValueError: see above; the message names what to do.
        """
        if resume and overwrite:
            raise ValueError("--resume and --overwrite (resume, overwrite) contradict each other; give one of them")
        check_writable(self.path)
        if resume:
            differing = differences(self._run()["asked"], asked)
            if differing:
                raise ValueError(
                    f"{self.path} holds a run that was asked for something else: {'; '.join(differing)};"
                    " --resume goes on with the same, --overwrite trains anew"
                )
        elif self._occupied() and not overwrite:
            raise ValueError(
                f"output {self.path} is not empty; --resume goes on with the run in it, --overwrite trains anew in its"
                " place, or name another folder (--output)"
            )
        elif self._occupied() and not self._holds_run():
            raise ValueError(f"output {self.path} holds something else than a run; it is not overwritten")

    def check_data(self, digests: Mapping[str, Any]) -> None:
        """Refuse to resume on other examples than the run began with.

        Raises:
            ValueError: see above.
        """
        began = self._run().get("data")
        began = began if isinstance(began, dict) else {}
        changed = [name for name in digests if began.get(name) != digests[name]]
        if changed:
            raise ValueError(
                f"{self.path}: the examples of {' and '.join(changed)} are not those that the run began with;"
                " --resume needs the same data, --overwrite trains anew"
            )

    def check_base(self, digest: str) -> None:
        """Refuse to resume over other weights than the run began with.

        Raises:
            ValueError: see above.
        """
        if self._run().get("base", digest) != digest:
            raise ValueError(
                f"{self.path}: the weights of the base (--model) are not those that the run began with; --resume needs"
                " the same ones, --overwrite trains anew"
            )

    def begin(self, asked: Mapping[str, Any], digests: Mapping[str, Any], base: str) -> None:
        """Start a new run: from here on there are no checkpoints of an earlier one.

        Args:
            digests, base: of its examples and of its base's weights, which `--resume` compares.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.clean()
        (self.path / _NEW).mkdir()
        write_json(self.path / _NEW / RUN_NAME, {"asked": asked, "data": digests, "base": base})
        if self.checkpoints.exists():
            self.checkpoints.rename(self.path / _OLD)
        (self.path / _NEW).rename(self.checkpoints)
        self.clean()

    def clean(self) -> None:
        """Remove what a killed process left."""
        for name in (_NEW, _OLD, _SAVED):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def finish(self, save: Callable[[Path], Any], settings: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Put the run's adapter, settings and metrics in the place of an earlier run's.

        Args:
            save: writes the adapter into the folder that it is given.
        """
        self.clean()
        saved = self.path / _SAVED
        saved.mkdir()
        save(saved)
        final = {**settings, "weights": _digest(saved / WEIGHTS_NAME)}
        write_json(self.path / SETTINGS_NAME, {**final, "before": self.settings()})
        for name in (METRICS_NAME, CURVES_NAME):
            (self.path / name).unlink(missing_ok=True)
        # The weights, which describe themselves, then what is there for people.
        files = [path for path in saved.iterdir() if path.is_file() and not path.name.startswith(".")]
        for file in sorted(files, key=lambda file: file.name != WEIGHTS_NAME):
            os.replace(file, self.path / file.name)
        write_json(self.path / SETTINGS_NAME, final)
        write_json(self.path / METRICS_NAME, metrics)
        self.clean()

    def settings(self) -> dict[str, Any]:
        """What the adapter in the folder was trained with; {} where nobody wrote it down.

        Raises:
            ValueError: the file is damaged.
        """
        settings = read_object(self.path / SETTINGS_NAME) or {}
        before = settings.pop("before", None)
        weights = self.path / WEIGHTS_NAME
        if before is not None and not (weights.is_file() and _digest(weights) == settings.get("weights")):
            return before if isinstance(before, dict) else {}
        return settings

    def _run(self) -> dict[str, Any]:
        run = read_object(self.checkpoints / RUN_NAME)
        if run is None:
            raise ValueError(f"{self.path} holds no run to resume: there is no {CHECKPOINTS}/{RUN_NAME}")
        if not isinstance(run.get("asked"), dict):
            raise ValueError(f"{self.checkpoints / RUN_NAME} is damaged: it must say what the run was asked for")
        return run

    def _occupied(self) -> bool:
        return self.path.is_dir() and any(path.name not in (_NEW, _OLD, _SAVED) for path in self.path.iterdir())

    def _holds_run(self) -> bool:
        settings = read_object(self.path / SETTINGS_NAME) or {}
        return set(settings) >= _RUN_KEYS or (self.checkpoints / RUN_NAME).is_file()


def differences(was: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two plain values, one line for each place: `fit.seed was 0, is 5`."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = [*now, *(key for key in was if key not in now)]
        return [
            line for key in keys for line in differences(was.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if was == now else [f"{name} was {_shown(was)}, is {_shown(now)}"]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "given"
    return "not given" if value is None else repr(value)


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file.

    Raises:
        ValueError: it holds something else.
    """
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not whole JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(values).__name__}")
    return values


def plain_json(values: Any, **options: Any) -> str:
    """JSON as the standard has it: NaN and infinity, which it has not, become null."""
    return json.dumps(_finite(values), allow_nan=False, ensure_ascii=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON file, whole or not at all."""
    text = plain_json(values, indent=2) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def digest_of(examples: Any) -> str:
    """A digest of plain examples, whatever file they come from."""
    return hashlib.sha256(json.dumps(examples, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
