"""A file with a letter too many wherever it names an attribute or an argument of ours: a type checker sees each."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Typo:
    """A name with a letter too many, and the line of the expression that it stands in."""

    line: int
    name: str


def plant(module: ModuleType) -> tuple[str, list[Typo]]:
    """The source of a module with typos, and those.

    Misspelt are the attributes of `self` and of parameters that are annotated with classes of this package, and the
    keywords of calls of its functions; not the attributes of PyTorch's modules, which are Any where none declares them.
    """
    source = inspect.getsource(module)
    found: dict[tuple[int, int], Typo] = {}
    tree = ast.parse(source)
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        known = {one.arg for one in (*function.args.args, *function.args.kwonlyargs) if _is_ours(module, one)}
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
                found[node.end_lineno, node.end_col_offset] = Typo(node.lineno, node.attr)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and _made_here(module, node.func.id):
                for keyword in node.keywords:
                    if keyword.arg is not None:
                        end = keyword.col_offset + len(keyword.arg.encode())
                        found[keyword.lineno, end] = Typo(node.lineno, keyword.arg)
    lines = [line.encode() for line in source.splitlines()]
    for line, column in sorted(found, reverse=True):
        lines[line - 1] = lines[line - 1][:column] + b"x" + lines[line - 1][column:]
    typos = [Typo(typo.line, f"{typo.name}x") for typo in found.values()]
    return b"\n".join(lines).decode() + "\n", typos


def _is_ours(module: ModuleType, parameter: ast.arg) -> bool:
    if parameter.annotation is None:
        return parameter.arg == "self"
    named = parameter.annotation
    return isinstance(named, ast.Name) and _made_here(module, named.id)


def _made_here(module: ModuleType, name: str) -> bool:
    """Whether a name of a module is a class or a function of this package, or some of its classes together."""
    named: Any = getattr(module, name, None)
    if inspect.isclass(named) and issubclass(named, nn.Module):
        return False
    return any(getattr(one, "__module__", "").startswith("ptv2_fast.") for one in getattr(named, "__args__", (named,)))
