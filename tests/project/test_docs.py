"""The documents for contributors name what is there: files, names, commands, links, rooms."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import io
import re
import tokenize
from pathlib import Path

import pytest

from ptv2_fast.cli import app

ROOT = Path(__file__).parents[2]
PAGES = ("docs/design.md", "CONTRIBUTING.md")
READMES = ("README.md", "benchmarks/README.md", "kernels/README.md", "examples/README.md")
LINKED = (*PAGES, *READMES, "docs/data.md", "docs/serving.md", "CHANGELOG.md")
FOLDERS = ("ptv2_fast", "kernels", "tests", "benchmarks")
# Packages whose names a document may use as well.
OTHERS = ("torch", "transformers", "triton")
OURS = ("ptv2_fast", "benchmarks")
# Shapes, formulas, file patterns to fill in, and words of other programs.
_NO_NAME = re.compile(r"[^A-Za-z_]|--|.*[<>{}*\s=\"'|]")


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _quoted(text: str) -> list[str]:
    """What stands in backticks, outside of blocks of code and the table of rooms, which a test of its own reads."""
    without_blocks = re.sub(r"```.*?```|^\| \d+ \| `\w+`", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", without_blocks)


@functools.cache
def _identifiers() -> set[str]:
    """Every identifier of the sources."""
    found = set()
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        if path == Path(__file__):
            continue
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        found |= {token.string for token in tokens if token.type == tokenize.NAME}
    return found


@functools.cache
def _members() -> dict[str, set[str]]:
    """Class -> what its body defines."""
    found: dict[str, set[str]] = {}
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                fields = {getattr(getattr(part, "target", None), "id", "") for part in node.body}
                functions = {getattr(part, "name", "") for part in node.body}
                found.setdefault(node.name, set()).update(fields | functions)
    return found


def _is_file(name: str) -> bool:
    return "/" in name or name.endswith((".py", ".md", ".json", ".toml", ".yml")) or name == "Makefile"


def _missing_file(name: str) -> bool:
    """Whether no file is at a path from the root, or, where only its last part is said, anywhere in the sources."""
    if "/" in name:
        return not (ROOT / name.replace("ptv2_fast/kernels/", "kernels/")).exists()
    return not (ROOT / name).exists() and not any(found for folder in FOLDERS for found in (ROOT / folder).rglob(name))


def _missing_name(name: str) -> bool:
    first, *parts = name.split("(")[0].split(".")
    if first in OTHERS:
        return False
    if first in OURS:
        # The longest module, then names of the sources.
        module = first
        while parts and hasattr(importlib.import_module(module), "__path__") and _is_module(f"{module}.{parts[0]}"):
            module = f"{module}.{parts.pop(0)}"
        return any(part not in _identifiers() for part in parts)
    if parts and first in _members():
        return parts[0] not in _members()[first]
    return any(part not in _identifiers() for part in (first, *parts))


def _is_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _wrong(text: str) -> list[str]:
    """What a text has in backticks and the tree has not."""
    wrong = []
    for quoted in _quoted(text):
        if quoted.startswith(("make ", "python ", "pytest", "ptv2-fast")):
            if _wrong_commands(quoted):
                wrong.append(quoted)
        elif re.fullmatch(r"ptv2_\w+\.(json|safetensors)", quoted):
            # Files that the package writes.
            if quoted not in _text("ptv2_fast/saving/checkpoint.py"):
                wrong.append(quoted)
        elif _is_file(quoted) and not re.search(r"[<>*\s]", quoted):
            if _missing_file(quoted):
                wrong.append(quoted)
        elif not _NO_NAME.match(quoted) and re.fullmatch(r"[\w.]+(\([\w, ]*\))?", quoted) and _missing_name(quoted):
            wrong.append(quoted)
    return wrong


def _wrong_commands(text: str) -> list[str]:
    """The commands in a text that this project does not have."""
    targets = set(re.findall(r"^([a-z]+):", _text("Makefile"), flags=re.MULTILINE))
    programs = {command.name or command.callback.__name__ for command in app.registered_commands}
    wrong = [f"make {name}" for name in re.findall(r"\bmake ([a-z]+)", text) if name not in targets]
    wrong += [f"ptv2-fast {name}" for name in re.findall(r"\bptv2-fast ([a-z]+)", text) if name not in programs]
    modules = re.findall(r"python -m ((?:ptv2_fast|benchmarks)[\w.]*)", text)
    return wrong + [module for module in modules if not _is_module(module)]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    assert len(_quoted(_text(page))) > 50
    assert _wrong(_text(page)) == []


@pytest.mark.parametrize("page", LINKED)
def test_commands_and_links_lead_somewhere(page):
    text = _text(page)
    assert _wrong_commands("\n".join([*re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL), *_quoted(text)])) == []
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not ((ROOT / page).parent / link).exists()] == []


def test_the_rooms_are_those_that_the_layout_holds():
    """`tests/project/test_layout.py` says which there are, and in which order."""
    tree = ast.parse(_text("tests/project/test_layout.py"))
    (layers,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "LAYERS"
    ]
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| \S.* \|$", _text("docs/design.md"), flags=re.MULTILINE)
    named = [[name for number, name in rows if int(number) == height] for height in range(len(layers))]
    wanted = [sorted(row) for row in layers]
    assert [sorted(row) for row in named] == wanted
    assert len(rows) == sum(map(len, layers))


def test_a_page_that_lies_is_seen():
    text = (
        "`ptv2_fast/attention/api.py` `prompt_attention` `PromptBatch.at` `ptv2_fast.step.packed.Buckets` `make test`"
    )
    assert _wrong(text) == []
    lies = "`ptv2_fast/gone.py` `promt_attention` `PromptBatch.gone` `ptv2_fast.step.Gone` `make gone` `ptv2-fast gone`"
    assert _wrong(lies) == re.findall(r"`([^`]+)`", lies)
