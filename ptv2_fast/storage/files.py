"""Files that belong together, switched all at once: killed at any moment, a folder holds the old set or the new one.

Several files cannot be renamed as one. While a save is under way each of them is therefore a symbolic link that leads
through one other link, `.ptv2-save/now`, first to the old files and then, by a single rename, to the new ones:

    adapter_config.json -> .ptv2-save/now/adapter_config.json
    .ptv2-save/now      -> old, then new

Whoever opens them by name, this package or another, reads one whole set. At the end they are plain files again; a save
that was killed is brought to that end by the next one.
"""

from __future__ import annotations

import contextlib
import filecmp
import glob
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: one saver at a time is then the caller's care
    fcntl = None  # type: ignore[assignment]

STAGE = ".ptv2-save"
Writer = Callable[[Path], Any]


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[bool]:
    """Keep other savers out of a folder, threads and processes alike; `shared` lets other readers in.

    The lock is the folder's own and ends with its holder. Yields whether there is one: some file systems have none.
    """
    handle = _handle(folder)
    held = False
    try:
        if handle is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
                held = True
        yield held
    finally:
        if handle is not None:
            if held:
                fcntl.flock(handle, fcntl.LOCK_UN)  # a child forked meanwhile has the handle too
            os.close(handle)


def write_whole(path: Path, write: Writer) -> None:
    """Let `write` fill a temporary file beside `path`, make it durable, then rename it over `path`."""
    with locked(path.parent) as alone:
        if alone:
            _sweep(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            _written(temporary, write)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_set(folder: Path, files: Mapping[str, Writer], outdated: Callable[[], Iterable[str]] = tuple) -> None:
    """Write files of a folder, and remove others, all at once.

    Args:
        folder: created where it does not exist.
        files: path below `folder` -> what fills it.
        outdated: gives paths below `folder` that are to be gone; one that is not there is passed over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        alone = stack.enter_context(locked(folder))
        _settle(folder)
        names = [*files, *(name for name in outdated() if name not in files)]
        parents = {(folder / name).parent for name in names if name in files or (folder / name).parent.is_dir()}
        below = sorted(parents - {folder})
        for parent in below:
            parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(parent))
            _settle(parent)
        for name in names if alone else ():
            _sweep(folder / name)
        try:
            _switch(folder, files, names)
        finally:
            _settle(folder)
            for parent in below:
                with contextlib.suppress(OSError):  # what else is in there stays
                    parent.rmdir()


def _switch(folder: Path, files: Mapping[str, Writer], names: list[str]) -> None:
    new, old = folder / STAGE / "new", folder / STAGE / "old"
    for name, write in files.items():
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        _written(new / name, write)
    changed = [name for name in names if not _is_same(folder / name, new / name)]
    if len(changed) > 1 and _can_link(folder):
        for name in changed:
            _keep(folder / name, old / name)
        os.symlink("old", folder / STAGE / "now")
        for name in changed:
            _lead_through(folder, name)
        _flush(folder)
        for parent in {(new / name).parent for name in files}:
            _flush(parent)
        os.symlink("new", folder / STAGE / "next")
        os.replace(folder / STAGE / "next", folder / STAGE / "now")
        _flush(folder / STAGE)
        return
    for name in changed:
        if name in files:
            os.replace(new / name, folder / name)
        else:
            (folder / name).unlink()
    _flush(folder)


def _settle(folder: Path) -> None:
    """Bring a save to its end: links become the plain files that they lead to, what was staged goes away."""
    stage = folder / STAGE
    if not stage.is_dir():
        return
    now = stage / "now"
    for side in ("old", "new"):
        for path in [p for p in (stage / side).rglob("*") if p.is_file()]:
            _make_plain(folder / path.relative_to(stage / side), now / path.relative_to(stage / side))
    shutil.rmtree(stage)
    _flush(folder)


def _make_plain(target: Path, content: Path) -> None:
    """Put the file at `content` in the place of a link that leads there; a link that leads nowhere goes away."""
    _half_made(target).unlink(missing_ok=True)
    leads_here = target.is_symlink() and f"{STAGE}/now/" in os.readlink(target).replace(os.sep, "/")
    if leads_here and content.is_file():
        os.replace(content, target)
    elif leads_here:
        target.unlink()
    if not target.exists():
        with contextlib.suppress(OSError):  # what else is in there stays
            target.parent.rmdir()


def _lead_through(folder: Path, name: str) -> None:
    """Put a link through `now` in the place of a file."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    way = os.path.relpath(folder.resolve() / STAGE / "now" / name, target.parent.resolve())
    link = _half_made(target)
    link.unlink(missing_ok=True)
    os.symlink(way, link)
    os.replace(link, target)


def _keep(path: Path, copy: Path) -> None:
    """A second name for a file's content, where there is a file."""
    if not path.is_file():
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path.resolve(), copy)
    except OSError:
        shutil.copy2(path, copy)


def _written(path: Path, write: Writer) -> None:
    """Let `write` fill a file, give it the mode of any new file, and make it durable."""
    with open(path, "wb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    write(path)
    with contextlib.suppress(OSError):  # not every file system has modes
        path.chmod(mode)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sweep(path: Path) -> None:
    """Remove what killed saves left beside a file; whoever calls this keeps other savers out."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            stale.unlink()


def _half_made(target: Path) -> Path:
    return target.with_name(f".{target.name}.link.tmp")


def _is_same(path: Path, new: Path) -> bool:
    """Whether a file already is what it is to become: of the same bytes, or gone."""
    if not new.is_file() or not path.is_file():
        return not new.is_file() and not path.is_file()
    return filecmp.cmp(path, new, shallow=False)


def _can_link(folder: Path) -> bool:
    """Whether the file system has symbolic links; without them files are renamed one after another."""
    probe = folder / STAGE / "probe"
    try:
        os.symlink("new", probe)
        probe.unlink()
    except (OSError, NotImplementedError):
        return False
    return True


def _handle(folder: Path) -> int | None:
    if fcntl is None:
        return None
    try:
        return os.open(folder, os.O_RDONLY)
    except OSError:
        return None


def _flush(folder: Path) -> None:
    """Make the names in a folder durable, where a folder can be opened for that."""
    handle = _handle(folder)
    if handle is not None:
        with contextlib.suppress(OSError):
            os.fsync(handle)
        os.close(handle)
