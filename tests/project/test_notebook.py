"""The notebook runs from top to bottom, and the text that is stored in it is what it prints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pages import ROOT, assert_printed

NOTEBOOK = ROOT / "docs" / "start" / "first-look.ipynb"

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")


def _printed(cell) -> str:
    """What a cell prints and returns, as text; a picture is told by its kind alone."""
    found = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream" and output["name"] == "stdout":
            found.append(output["text"])
        elif output["output_type"] in ("execute_result", "display_data"):
            found += [f"{kind}\n" for kind in output["data"] if kind.startswith("image/")]
            if output["output_type"] == "execute_result":
                found.append(output["data"]["text/plain"] + "\n")
    return "".join(found)


def _run(cells: list[tuple[str, str]], folder: Path):
    """The code cells of a notebook of such (id, source), executed in a process of their own."""
    made = [nbformat.v4.new_code_cell(source, id=name) for name, source in cells]
    notebook = nbformat.v4.new_notebook(cells=made)
    resources = {"metadata": {"path": str(folder)}}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    # Another backend would draw no picture into the notebook.
    environment.pop("MPLBACKEND", None)
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources)
    client.execute(env=environment)
    return notebook["cells"]


def test_the_notebook_prints_what_is_stored_in_it(tmp_path):
    stored = [cell for cell in nbformat.read(NOTEBOOK, as_version=4)["cells"] if cell["cell_type"] == "code"]
    ran = _run([(cell["id"], cell["source"]) for cell in stored], tmp_path)
    for cell, other in zip(ran, stored, strict=True):
        assert_printed(_printed(cell), _printed(other), f"{NOTEBOOK.name}, {cell['id']}")
    assert any("image/png" in _printed(cell) for cell in ran)
