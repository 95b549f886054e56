"""Every block of README and of the pages runs as it stands."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from pages import ROOT, RUN, Block, assert_printed, blocks_of, run_page

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_BLOCKS = [page for page in PAGES if blocks_of(page)]


@pytest.fixture
def untouched():
    """What a page may set for the process, set back."""
    threads, level = torch.get_num_threads(), logging.getLogger("ptv2_fast").level
    yield
    torch.set_num_threads(threads)
    logging.getLogger("ptv2_fast").setLevel(level)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=[str(page.relative_to(ROOT)) for page in WITH_BLOCKS])
def test_a_page_runs(page, tmp_path, monkeypatch, untouched):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_page(page, tmp_path)


def test_every_block_that_could_run_does():
    """A block of Python or for the shell under another name would be passed over."""
    named = [re.findall(r"^ *```(\w+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE) for page in PAGES]
    assert {name for names in named for name in names} <= {*RUN, "text", "json"}


TRUE = "```python\nx = 2\nprint('a', x)\n```\n\n```text\na 2\n```\n\n```bash\nmake test\n```\n"


@pytest.mark.parametrize(
    ("there", "lie"),
    [("", ""), ("a 2", "a 3"), ("a 2", "b 2"), ("make test", "make gone"), ("make test", "rm x"), ("x = 2", "x = y")],
)
def test_a_page_that_lies_fails(there, lie, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(TRUE.replace(there, lie) if there else TRUE)
    if not there:
        python = Block("python", "x = 2\nprint('a', x)\n", 1, "a 2\n")
        assert blocks_of(page) == [python, Block("bash", "make test\n", 10, None)]
        return run_page(page, tmp_path)
    with pytest.raises((AssertionError, NameError)):
        run_page(page, tmp_path)


def test_numbers_may_differ_by_rounding():
    assert_printed("loss 0.41 of 1,000\n", "loss 0.45 of 1,100", "here")
    with pytest.raises(AssertionError):
        assert_printed("loss 0.41\n", "loss 0.95", "here")
