"""The shape of the source tree: who may import whom, what is packaged, how long a file may be."""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE, KERNELS = ROOT / "ptv2_fast", ROOT / "kernels"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.glob("*.py")])
MAX_LINES = 400

# From the bottom up: a room imports from itself and from the rooms below it. Rooms of one row do not know each other.
LAYERS = (
    ("kernels", "reference", "choices", "task_types"),
    ("attention",),
    ("backbone", "storage", "typed_modules", "config", "losses"),
    ("families",),
    ("inputs",),
    ("prompts", "heads"),
    ("step",),
    ("adapter", "frozen_base"),
    ("adapter_set", "base_attributes", "base_methods", "forward"),
    ("saving",),
    ("model",),
    ("task_models",),
    ("public", "checkpoint", "export", "hub"),
    ("training", "tutorials", "interop"),
    ("report",),
    ("cli", "demo"),
)
RANK = {layer: rank for rank, row in enumerate(LAYERS) for layer in row}
# The reference stands beside everything: only the backend of that name reaches it, when it is asked for.
MAY_IMPORT_REFERENCE = {"ptv2_fast.attention.api"}
# The one arrow upwards: the classes of the tasks are looked up by name where a saved model is rebuilt.
LAZY_UPWARDS = {("ptv2_fast.model", "ptv2_fast.task_models.classes")}
# Rooms that stay below transformers.
WITHOUT_TRANSFORMERS = {
    "kernels", "choices", "task_types", "config", "storage", "typed_modules", "public", "checkpoint", "export", "hub",
}  # fmt: skip
ATTENTION_WITHOUT_TRANSFORMERS = {
    "api", "checks", "layer", "prompt_batch", "torch_backend", "torch_layers", "triton_backend",
    "triton_layers", "row_groups", "visible", "__init__",
}  # fmt: skip


def _name(path: Path) -> str:
    """The module that a file is installed as."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("ptv2_fast", *parts) if parts[0] == "kernels" else parts
    return ".".join(part for part in parts if part != "__init__")


def _layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in RANK else "public"


MODULES = {_name(source): source for source in SOURCES}


@functools.cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def _imports(path: Path, *, types: bool = False) -> list[tuple[str, bool]]:
    """Every module that a file imports, and whether it does so when it is itself imported.

    Args:
        types: also those that only a type checker imports.
    """
    found = []

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            if not types:
                return
            at_import = False
        if isinstance(node, ast.Import):
            found.extend((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from package import module` imports a module too.
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found.extend((name if name in MODULES else node.module, at_import) for name in inner)
        lazily = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, at_import and not lazily)

    visit(_parsed(path.read_text(encoding="utf-8")), True)
    return found


def test_every_source_has_a_layer():
    layers = {_layer(_name(path)) for path in SOURCES}
    assert layers == {layer for layer in RANK}
    assert [name for name in (_name(path) for path in SOURCES) if _layer(name) == "public"] == ["ptv2_fast"]


def test_imports_point_down():
    # The public names are of all rooms, and a type checker has to see where they come from.
    arrows = [
        (module, imported)
        for module, path in MODULES.items()
        for imported, _ in _imports(path, types=module != "ptv2_fast")
        if imported.startswith("ptv2_fast") and (module, imported) not in LAZY_UPWARDS
    ]
    layers = [(_layer(module), _layer(imported)) for module, imported in arrows]
    wrong = [arrow for arrow, (own, to) in zip(arrows, layers, strict=True) if RANK[to] >= RANK[own] and to != own]
    assert len(arrows) > len(MODULES) and not wrong, "a module imports from above or beside it"


def _circles(arrows: dict[str, set[str]]) -> set[str]:
    """What stands on a circle or between two: all that is left once whoever imports, or is imported by, nobody goes."""
    left = dict(arrows)
    while True:
        imported = {to for reached in left.values() for to in reached if to in left}
        kept = {name: {to for to in reached if to in left} for name, reached in left.items() if name in imported}
        kept = {name: reached for name, reached in kept.items() if reached}
        if kept == left:
            return set(left)
        left = kept


def test_imports_have_no_circle():
    """Files of one room too; those that a function or a type checker imports are counted."""
    arrows = {
        module: {imported for imported, _ in _imports(path, types=True) if imported in MODULES and imported != module}
        for module, path in MODULES.items()
        if module != "ptv2_fast"
    }
    for module, imported in LAZY_UPWARDS:
        arrows[module].remove(imported)
    assert not _circles(arrows)
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"b", "c"}


def test_the_reference_is_imported_where_it_is_asked_for_alone():
    found = [
        (module, imported, at_import)
        for module, path in MODULES.items()
        for imported, at_import in _imports(path)
        if _layer(imported) == "reference" and _layer(module) != "reference"
    ]
    assert found and not [one for one in found if one[0] not in MAY_IMPORT_REFERENCE or one[2]]


def test_kernels_need_torch_and_triton_alone():
    for path in KERNELS.glob("*.py"):
        for imported, at_import in _imports(path):
            top = imported.split(".")[0]
            # The interpreter is written in NumPy: what mends it may look at that, when it runs.
            known = top in ("torch", "triton") or top in sys.stdlib_module_names or (top == "numpy" and not at_import)
            assert known or imported.startswith("ptv2_fast.kernels"), f"{path.name} imports {imported}"


def _importing(packages: set[str]) -> set[str]:
    """The modules that import one of some packages."""
    return {
        module
        for module, path in MODULES.items()
        if any(imported.split(".")[0] in packages for imported, _ in _imports(path))
    }


def test_transformers_stays_above_the_hook():
    low = {f"ptv2_fast.attention.{name}" for name in ATTENTION_WITHOUT_TRANSFORMERS if name != "__init__"}
    low |= {module for module in MODULES if _layer(module) in WITHOUT_TRANSFORMERS} | {"ptv2_fast.attention"}
    using = _importing({"transformers"})
    assert using and low < MODULES.keys() and not using & low


def test_only_training_needs_what_the_train_extra_installs():
    using = _importing({"accelerate", "sklearn", "seqeval", "matplotlib", "rich", "typer", "datasets", "gguf", "peft"})
    assert using and not [module for module in using if _layer(module) not in ("training", "cli", "demo")]


def test_a_lower_layer_is_really_seen(tmp_path):
    """The walk can fail: it reads imports in functions, of modules and from packages."""
    file = tmp_path / "sample.py"
    file.write_text("import a.b\ndef f():\n    from ptv2_fast.task_models import classes\n    import torch\n")
    assert _imports(file) == [("a.b", True), ("ptv2_fast.task_models.classes", False), ("torch", False)]
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ptv2_fast.model import PTuningV2Model\n"
    )
    assert _imports(file) == [("typing", True)]
    assert _imports(file, types=True) == [("typing", True), ("ptv2_fast.model", False)]
    assert _layer("ptv2_fast.task_models.classes") == "task_models" and RANK["task_models"] > RANK["kernels"]


def test_files_stay_readable():
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert lines and not {path: count for path, count in lines.items() if count > MAX_LINES}


def test_kernels_is_no_package_of_its_own():
    """The top-level name belongs to another project; transformers probes it at import."""
    assert not (KERNELS / "__init__.py").exists()
    assert not [path for path in KERNELS.iterdir() if path.is_dir() and path.name != "__pycache__"]
    shim = [path.name for path in (PACKAGE / "kernels").glob("*.py")]
    assert shim == ["__init__.py"]


def test_tests_mirror_the_sources_without_packages():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "OMP_NUM_THREADS": "1"}


def test_the_wheel_holds_the_kernels_as_they_are(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in (PACKAGE, KERNELS):
        shutil.copytree(folder, source / folder.name, ignore=ignored)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    command = [sys.executable, "-c", build, str(tmp_path)]
    done = subprocess.run(command, cwd=source, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(installed)
    # The shim only points to the folder whose files the wheel carries in its place.
    for path in set(SOURCES) - {PACKAGE / "kernels" / "__init__.py"}:
        inside = installed / (_name(path).replace(".", "/") + ".py")
        if path.name == "__init__.py":
            inside = installed / path.relative_to(ROOT)
        assert inside.read_bytes() == path.read_bytes(), path
    assert {"ptv2_fast/py.typed", "ptv2_fast/report/style.css"} <= names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "benchmarks/"))]
    data = {f"ptv2_fast/demo/data/{path.name}" for path in (PACKAGE / "demo" / "data").iterdir()}
    assert data and data <= names
    # Installed, the kernels come from the wheel and not from a folder beside it.
    code = "from importlib.util import find_spec; print(find_spec('ptv2_fast.kernels.launch').origin)"
    where = {**_environment(), "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=where, capture_output=True, text=True)
    assert done.stdout.strip() == str(installed / "ptv2_fast" / "kernels" / "launch.py"), done.stderr


def _asks_for_equal_outputs(tree: ast.AST) -> list[int]:
    """Lines of `assert torch.equal(...)` on what a model computes."""
    asked = (node for node in ast.walk(tree) if isinstance(node, ast.Assert) and isinstance(node.test, ast.Call))
    calls = [node.test for node in asked if ast.unparse(node.test.func) == "torch.equal"]
    outputs = {"logits", "last_hidden_state", "loss"}
    return [call.lineno for call in calls if any(getattr(node, "attr", None) in outputs for node in ast.walk(call))]


def test_equal_outputs_are_asked_for_where_it_is_written_when_they_may_be():
    """`assert_same_bits` says what rounds alike on every processor, and what does not."""
    files = [path for path in (ROOT / "tests").rglob("*.py") if "kernels" not in path.parts]
    found = {str(path): _asks_for_equal_outputs(ast.parse(path.read_text(encoding="utf-8"))) for path in files}
    assert not {path: lines for path, lines in found.items() if lines}
    assert _asks_for_equal_outputs(ast.parse("assert torch.equal(model(x).logits, y)")) == [1]
    assert _asks_for_equal_outputs(ast.parse("assert not torch.equal(a.logits, b.logits)")) == []


def test_no_page_asks_for_equal_outputs():
    """A reader's processor rounds in its own way, with an assert or without."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]
    asking = re.compile(r"torch\.equal\(.*(logits|last_hidden_state|loss)")
    assert not [str(page) for page in pages if asking.search(page.read_text(encoding="utf-8"))]
    assert asking.search("print(torch.equal(model(x).logits, y))")


def test_links_stay_within_the_tree():
    """A link to an environment or a folder outside leads nowhere on another machine."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    done = subprocess.run([git, "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True)
    links = [ROOT / line.split("\t")[1] for line in done.stdout.splitlines() if line.startswith("120000")]
    assert links and all((link.parent / os.readlink(link)).resolve().is_relative_to(ROOT) for link in links), links
