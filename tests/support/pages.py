"""A page of Markdown as a reader runs it: its blocks from top to bottom, in an empty folder, with nothing supplied.

Blocks of Python share one namespace. Of a block for the shell `ptv2-fast` runs in this process, `python` and `torchrun`
in some of their own, forked from one that has imported what takes long, a line that ends in `&` beside the rest; `pip`,
`make` and `git` are for the reader, and only extras and targets are looked up. A block of text right behind another is
what that one prints.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import tempfile
from dataclasses import dataclass, replace
from itertools import zip_longest
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from processes import free_port, started, torchruns
from ptv2_fast.cli import app

ROOT = Path(__file__).parents[2]
RUN = ("python", "bash")
# What a reader has: the repository's own folders beside the files that the page writes.
_BESIDE = ("examples", "benchmarks")
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", flags=re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, its line in the page, and what it prints by the page, or None."""

    language: str
    text: str
    line: int
    prints: str | None


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page that run, in their order."""
    text = page.read_text(encoding="utf-8")
    found = list(_FENCE.finditer(text))
    blocks = []
    for one, behind in zip_longest(found, found[1:]):
        language, content = one[2], re.sub(rf"^{one[1]}", "", one[3], flags=re.MULTILINE)
        if language in RUN:
            follows = behind is not None and behind[2] == "text" and not text[one.end() : behind.start()].strip()
            prints = behind[3] if behind is not None and follows else None
            blocks.append(Block(language, content, text[: one.start()].count("\n") + 1, prints))
    return blocks


def run_page(page: Path, folder: Path) -> None:
    """Run the blocks of a page; the working directory is an empty folder.

    Raises:
        AssertionError: a command fails, or a block prints something else than the page says.
        Exception: what a block raises.
    """
    for name in _BESIDE:
        (folder / name).symlink_to(ROOT / name)
    names: dict[str, Any] = {"__name__": "__main__"}
    port = str(free_port())
    beside: list[BaseProcess] = []
    try:
        for block in blocks_of(page):
            # The port of a server that a reader starts may be taken here.
            block = replace(block, text=re.sub(r"\b8000\b", port, block.text))
            printed = _run_python(block, page, names) if block.language == "python" else _run_shell(block, page, beside)
            if block.prints is not None:
                assert_printed(printed, block.prints, f"{page.name}, line {block.line}")
    finally:
        for process in beside:
            process.terminate()
            process.join(60)


def assert_printed(printed: str, shown: str, where: str) -> None:
    """The same lines; numbers may differ by what another processor's rounding makes of a short training."""
    got, wanted = printed.strip().splitlines(), shown.strip().splitlines()
    words = [[" ".join(_NUMBER.sub("#", line).split()) for line in lines] for lines in (got, wanted)]
    assert words[0] == words[1], f"{where} prints\n{printed}\nand not\n{shown}"
    for line, other in zip(got, wanted, strict=True):
        for one, two in zip(_numbers(line), _numbers(other), strict=True):
            assert abs(one - two) <= max(0.15, 0.15 * abs(two)), f"{where} prints\n{line}\nand not\n{other}"


def _numbers(line: str) -> list[float]:
    return [float(number.replace(",", "")) for number in _NUMBER.findall(line)]


def _run_python(block: Block, page: Path, names: dict[str, Any]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        # Blank lines in front, so that a traceback has the page's own lines.
        exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
    return printed.getvalue()


def _run_shell(block: Block, page: Path, beside: list[BaseProcess]) -> str:
    printed = []
    for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
        if words := shlex.split(line, comments=True):
            where = f"{page.name}, line {block.line}: {line}"
            printed.append(_run_command(words, where, beside))
    return "".join(printed)


def _run_command(words: list[str], where: str, beside: list[BaseProcess]) -> str:
    program, arguments = words[0], words[1:]
    if program in ("pip", "make", "git", "cd"):
        _look_up(program, arguments, where)
        return ""
    if program == "ptv2-fast":
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{where}\n{result.output}\n{result.exception!r}"
        return result.stdout
    if program == "curl":
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{where}\n{done.stderr}"
        return done.stdout
    assert program in ("python", "torchrun"), f"nothing runs {where}"
    ranks: list[dict[str, str]] = [{}]
    if program == "torchrun":
        option, world, *arguments = arguments
        assert option == "--nproc-per-node", f"what torchrun would do is not known: {where}"
        port = free_port()
        ranks = [torchruns(rank, int(world), port) for rank in range(int(world))]
    behind = arguments[-1] == "&"
    running = []
    for told in ranks:
        said = Path(tempfile.mkdtemp(prefix=".said-", dir=Path.cwd()))
        environment = {"CUDA_VISIBLE_DEVICES": "", **told}
        running.append((started(arguments[:-1] if behind else arguments, said, environment), said))
    if behind:
        beside += [process for process, _ in running]
        return ""
    for process, said in running:
        process.join(300)
        assert process.exitcode == 0, f"{where}\n{(said / 'stderr').read_text()}"
    return "".join((said / "stdout").read_text() for _, said in running)


def _look_up(program: str, arguments: list[str], where: str) -> None:
    """Whether what the reader is told to install or make is there."""
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        unknown = [word for word in arguments if "=" not in word and not word.startswith("-") and word not in targets]
    else:
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
        asked = [name for word in arguments for name in ",".join(re.findall(r"^\.\[(.*)\]$", word)).split(",") if name]
        unknown = [name for name in asked if name not in extras]
    assert not unknown, f"{where}: no {unknown}"
