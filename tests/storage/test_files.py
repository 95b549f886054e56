"""Files that are switched together: before every single step of a save, what is there is one whole set."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import stat
import sys
import threading
from pathlib import Path

import pytest

from ptv2_fast.storage import files as storage
from ptv2_fast.storage.files import STAGE, locked, write_set, write_whole

FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
pytestmark = [
    pytest.mark.skipif(FORK is None, reason="kills are of forked processes"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
STEPS = {"os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}

# Everything of one set is of one value, so that a mix shows.
OLD = {"weights": "old", "config": "old", "a/weights": "old", "gone/weights": "old"}
NEW = {"weights": "new", "config": "new", "a/weights": "new", "b/weights": "new", "b/config": "new"}


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    """Nobody pulls the plug here, and waiting for the disk is most of a save."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def _writers(contents):
    return {name: lambda path, text=text: path.write_text(text) for name, text in contents.items()}


def _contents(folder: Path) -> dict[str, str]:
    """What a reader finds under the names of the files."""
    names = {*OLD, *NEW}
    return {name: (folder / name).read_text() for name in names if (folder / name).is_file()}


def _everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _save(folder: Path) -> None:
    write_set(folder, _writers(NEW), lambda: ["gone/weights", "never/there"])


def _killed_before(step: int, save, *arguments) -> bool:
    """Run `save` in another process that dies before its n-th step on the disk; whether it came so far."""

    def run():
        left = [step]

        def watch(event, _):
            if event in STEPS:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        save(*arguments)

    process = FORK.Process(target=run)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize(
    ("before", "stride"), [(OLD, 2), ({}, 6), ({"weights": "old"}, 6)], ids=["over a set", "first", "over one file"]
)
def test_killed_before_every_step(tmp_path, before, stride):
    write_set(tmp_path / "kept", _writers(before))
    found, step = [], 0
    while True:
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", folder)
        (folder / "mine.txt").write_text("mine")
        if not _killed_before(step, _save, folder):
            break
        now = _contents(folder)
        assert now in (before, NEW), step
        found.append(now == NEW)
        # A copy of what a killed save left is as good as the folder itself.
        shutil.copytree(folder, tmp_path / "copy", symlinks=True)
        assert _contents(tmp_path / "copy") == now
        shutil.rmtree(tmp_path / "copy")
        _save(folder)
        assert _everything(folder) == {*NEW, "a", "b", "mine.txt"}, step
        assert _contents(folder) == NEW and not any(path.is_symlink() for path in folder.rglob("*"))
        step += stride
    assert found == sorted(found) and len(found) > 40 // stride and len(set(found)) == 2
    assert _everything(folder) == {*NEW, "a", "b", "mine.txt"}


def test_a_save_that_was_killed_twice(tmp_path):
    write_set(tmp_path / "kept", _writers(OLD))
    for first in range(4, 80, 11):
        for second in range(2, 40, 11):
            folder = tmp_path / f"{first}-{second}"
            shutil.copytree(tmp_path / "kept", folder)
            if not _killed_before(first, _save, folder):
                return
            before = _contents(folder)
            _killed_before(second, write_set, folder, _writers(OLD))
            assert _contents(folder) in (before, OLD, {**before, **OLD}), (first, second)


def test_an_error_in_the_middle_leaves_what_was_there(tmp_path):
    write_set(tmp_path, _writers(OLD))

    def fails(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_set(tmp_path, {**_writers(NEW), "b/config": fails})
    assert _contents(tmp_path) == OLD and _everything(tmp_path) == {*OLD, "a", "gone"}
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "weights", fails)
    assert _contents(tmp_path) == OLD and _everything(tmp_path) == {*OLD, "a", "gone"}


def test_without_symbolic_links_files_are_renamed_one_by_one(tmp_path, monkeypatch):
    write_set(tmp_path, _writers(OLD))

    def refused(*arguments, **named):
        raise OSError("a privilege is missing")

    monkeypatch.setattr(os, "symlink", refused)
    monkeypatch.setattr(storage, "fcntl", None)
    _save(tmp_path)
    assert _contents(tmp_path) == NEW and _everything(tmp_path) == {*NEW, "a", "b"}


def test_a_folder_that_is_a_link_and_files_that_are_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "blob").write_text("old")
    (tmp_path / "real" / "weights").symlink_to(tmp_path / "elsewhere" / "blob")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "b").symlink_to(tmp_path / "elsewhere")
    _save(tmp_path / "link")
    assert _contents(tmp_path / "real") == NEW
    assert (tmp_path / "elsewhere" / "blob").read_text() == "old"


def test_files_have_the_mode_of_any_new_file(tmp_path):
    from safetensors.torch import save_file

    before = os.umask(0o027)
    try:
        write_set(tmp_path, {"weights": lambda path: save_file({}, path), "config": lambda path: path.write_text("")})
        write_whole(tmp_path / "single", lambda path: save_file({}, path))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize("one", [True, False], ids=["one file", "a set"])
def test_threads_and_processes_that_write_one_folder(tmp_path, one):
    errors = []

    def write(value):
        try:
            for _ in range(15):
                if one:
                    write_whole(tmp_path / "weights", lambda path: path.write_text(value))
                else:
                    write_set(tmp_path, _writers(dict.fromkeys(OLD, value)))
        except BaseException as error:
            errors.append(error)
            raise

    workers = [FORK.Process(target=write, args=(f"process {i}",)) for i in range(2)]
    for worker in workers:
        worker.start()
    workers += [threading.Thread(target=write, args=(f"thread {i}",)) for i in range(2)]
    for worker in workers[2:]:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        with locked(tmp_path, shared=True):
            assert len(set(_contents(tmp_path).values())) <= 1
    for worker in workers:
        worker.join()
    assert not errors and [worker.exitcode for worker in workers[:2]] == [0, 0]
    assert len(set(_contents(tmp_path).values())) == 1
    assert _everything(tmp_path) == ({"weights"} if one else {*OLD, "a", "gone"})


def test_what_killed_saves_left_is_cleaned_by_the_next(tmp_path):
    (tmp_path / ".weights.123.tmp").write_text("of an earlier version")
    (tmp_path / ".weights.4-5.tmp").write_text("of this one")
    (tmp_path / ".config.4-5.tmp").write_text("")
    (tmp_path / ".other.4-5.tmp").write_text("another file's")
    write_whole(tmp_path / "weights", lambda path: path.write_text("new"))
    assert _everything(tmp_path) == {"weights", ".config.4-5.tmp", ".other.4-5.tmp"}
    (tmp_path / STAGE / "new").mkdir(parents=True)
    write_set(tmp_path, _writers({"weights": "new", "config": "new"}))
    assert _everything(tmp_path) == {"weights", "config", ".other.4-5.tmp"}
