"""Real English text that every machine has: docstrings of Python's standard library."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Packages that some distributions leave out: without them the corpus is the same everywhere.
_LEFT_OUT = {
    "ensurepip", "idlelib", "lib2to3", "site-packages", "dist-packages", "test", "tests",
    "tkinter", "turtledemo",
}
_SHORTEST_WORDS = 5
_CHOICE = 4  # docstrings read for each that is wanted: parsing the whole library takes long


@dataclass(frozen=True)
class Passage:
    """One docstring, and whose it is: ``textwrap.dedent``."""

    name: str
    text: str


def stdlib_passages(count: int, root: Path | None = None) -> list[Passage]:
    """``count`` docstrings of modules, classes and functions, of naturally mixed length.

    Files, then docstrings, are chosen by hashes: the same for the same Python, as good as random
    in length and topic, and little changed by another Python version.

    Args:
        count: number of passages.
        root: folder of ``.py`` files; the standard library if None.

    Raises:
        RuntimeError: the folder has fewer docstrings of at least five words.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    modules = {path.relative_to(root).with_suffix("").parts: path for path in root.rglob("*.py")}
    chosen = (parts for parts in modules if not _LEFT_OUT.intersection(parts))
    unique: dict[str, Passage] = {}
    for parts in sorted(chosen, key=lambda parts: _hash("/".join(parts))):
        for passage in _docstrings(modules[parts], ".".join(parts).removesuffix(".__init__")):
            unique.setdefault(passage.text, passage)
        if len(unique) >= _CHOICE * count:
            break
    if len(unique) < count:
        raise RuntimeError(f"found {len(unique)} docstrings under {root}, {count} are needed")
    return sorted(unique.values(), key=lambda passage: _hash(passage.text))[:count]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _docstrings(path: Path, module: str) -> Iterator[Passage]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escape sequences in other people's files
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    nodes: list[tuple[str, ast.AST]] = [(module, tree)]
    while nodes:
        name, node = nodes.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            if len(text.split()) >= _SHORTEST_WORDS:
                yield Passage(name, text)
            for child in node.body:
                nodes.append((f"{name}.{getattr(child, 'name', '')}", child))
