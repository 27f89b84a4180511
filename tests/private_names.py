"""Finds the private names of other libraries that a file uses."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Iterator, Set

OF_NAMED_TUPLES = {"_replace", "_asdict", "_fields", "_make"}
_BY_NAME = {"getattr", "hasattr", "setattr", "delattr"}


def of_others(path: Path, own: Set[str]) -> Set[str]:
    """Return them as written, such as "torch._C._jit_pass_inline"; `own` are the project's own private names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return set(_imported(tree)) | set(_chains(tree, own)) | set(_by_name(tree, own))


def defined(path: Path) -> Set[str]:
    """Return the private names that a file defines: functions, classes, variables, and attributes of `self`."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and _text(node.value) == "self"}
    names |= {alias.asname or alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return set(filter(_private, names))


def _private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        named = [alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] not in (
            "traceserve",
            "traceserve_runtime",
        ):
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in named if any(map(_private, name.split("."))))


def _chains(tree: ast.AST, own: Set[str]) -> Iterator[str]:
    """Yield attributes of attributes, the longest of each; torch's even if ours have the same name."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            first, *parts = _text(node).split(".")
            private = {part for part in parts if _private(part)} - OF_NAMED_TUPLES
            if private - (set() if first == "torch" or "_c" in private else own):
                yield ".".join([first, *parts])


def _by_name(tree: ast.AST, own: Set[str]) -> Iterator[str]:
    """Yield names in `hasattr(torch, "_int_mm")` and the like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _text(node.func) in _BY_NAME and len(node.args) > 1:
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if isinstance(name, str) and _private(name) and name not in own:
                yield f"{_text(node.args[0])}.{name}"


def _text(node: ast.AST) -> str:
    """Return an expression of names and attributes as text; other parts are left out."""
    if isinstance(node, ast.Attribute):
        return f"{_text(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""
