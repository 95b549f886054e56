"""Processes that start at once, commands in them, and two on this machine that talk through gloo."""

from __future__ import annotations

import datetime
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
_SUPPORT = Path(__file__).resolve().parent


def forkserver() -> BaseContext:
    """Processes forked from one that has imported what takes long and has computed nothing.

    It is started here, once for all tests of this process: the rehearsals of a card fork from the same server.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["forked_from"])
    path = os.environ.get("PYTHONPATH", "")
    # Told by the environment alone: before Python 3.12 a server does not take over where modules are looked for.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_SUPPORT), str(_SUPPORT.parents[1]), path])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ["PYTHONPATH"] = path
    return context


def started(command: Sequence[object], said: Path, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """`python <command>` in a process that has imported what takes long: a file to run, or "-m" and a module.

    Args:
        said: a folder for the files "stdout" and "stderr".
        environment: variables to set for it.
    """
    for name in ("stdout", "stderr"):
        (said / name).touch()
    words, told = list(map(str, command)), dict(environment or {})
    process = forkserver().Process(target=_command, args=(words, os.getcwd(), said, told))
    process.start()
    return process


def _command(command: list[str], folder: str, said: Path, environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    os.chdir(folder)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(said / name, os.O_WRONLY | os.O_APPEND), stream)
    # A shell's background jobs, and all that they start, ignore the signal: this one shall not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    name, *sys.argv[1:] = command[1:] if command[0] == "-m" else command
    sys.argv[0] = name
    if command[0] == "-m":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(name).parent)
        runpy.run_path(name, run_name="__main__")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchruns(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun tells a process by its environment."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in told.items()}


def in_two_processes(checks: Mapping[str, Callable[[int], Any]]) -> list[dict[str, Any]]:
    """What every check gives in every process: (rank) -> a value, or the text of what it raised.

    One start of the processes serves all checks; they are functions of a module.
    """
    results = forkserver().SimpleQueue()
    mp.start_processes(_run, args=(free_port(), dict(checks), results), nprocs=WORLD, start_method="forkserver")
    found = dict(results.get() for _ in range(WORLD))
    return [found[rank] for rank in range(WORLD)]


def _run(rank: int, port: int, checks: dict[str, Callable[[int], Any]], results: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    os.environ.update(torchruns(rank, WORLD, port))
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    found = {}
    for name, check in checks.items():
        torch.manual_seed(0)
        try:
            found[name] = check(rank)
        except Exception:
            found[name] = traceback.format_exc()
        dist.barrier()
    results.put((rank, found))
    dist.destroy_process_group()
