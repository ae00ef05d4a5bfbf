"""Read English text that every machine has: docstrings of Python's standard library."""

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
    "ensurepip",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
}
_SHORTEST_WORDS = 5
_CHOICE = 4  # docstrings read for each one taken; parsing the whole library takes long


@dataclass(frozen=True)
class Passage:
    """A docstring, the dotted name of its object, and a function's signature."""

    name: str
    text: str
    signature: str = ""  # dedent(text)


def all_docstrings(root: Path | None = None) -> list[Passage]:
    """Return every docstring of at least five words once, in the order of files.

    Args:
        root: folder of ``.py`` files; the standard library if None. Folders of tests are left out.
    """
    modules = files_under(_standard_library() if root is None else root, ".py")
    unique: dict[str, Passage] = {}
    for parts in sorted(modules):
        for passage in _docstrings(modules[parts], parts):
            unique.setdefault(passage.text, passage)
    return list(unique.values())


def stdlib_passages(count: int, root: Path | None = None) -> list[Passage]:
    """Choose ``count`` docstrings of modules, classes and functions, of naturally mixed length.

    Files, then docstrings, are chosen by hashes: the same for the same Python, as good as random
    in length and topic, and little changed by another Python version.

    Args:
        count: number of passages.
        root: folder of ``.py`` files; the standard library if None.

    Raises:
        RuntimeError: the folder has fewer docstrings of at least five words.
    """
    root = _standard_library() if root is None else root
    modules = files_under(root, ".py")
    unique: dict[str, Passage] = {}
    for parts in sorted(modules, key=lambda parts: _hash("/".join(parts))):
        for passage in _docstrings(modules[parts], parts):
            unique.setdefault(passage.text, passage)
        if len(unique) >= _CHOICE * count:
            break
    if len(unique) < count:
        raise RuntimeError(f"found {len(unique)} docstrings under {root}, {count} are needed")
    return sorted(unique.values(), key=lambda passage: _hash(passage.text))[:count]


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def files_under(root: Path, ending: str) -> dict[tuple[str, ...], Path]:
    """Return files by the parts of their module names; folders of tests are left out."""
    found = (path for path in root.rglob("*" + ending) if path.is_file())
    files = {path.relative_to(root).with_suffix("").parts: path for path in found}
    return {parts: path for parts, path in files.items() if not _LEFT_OUT.intersection(parts)}


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _docstrings(path: Path, parts: tuple[str, ...]) -> Iterator[Passage]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old escape sequences in the files that are read
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the parser raises the last two
        return
    nodes: list[tuple[str, ast.AST]] = [(".".join(parts).removesuffix(".__init__"), tree)]
    while nodes:
        name, node = nodes.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            text = text.encode(errors="replace").decode()  # replaces lone surrogates
            if len(text.split()) >= _SHORTEST_WORDS:
                yield Passage(name, text, _signature(node))
            for child in node.body:
                nodes.append((f"{name}.{getattr(child, 'name', '')}", child))


def _signature(node: ast.AST) -> str:
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return ""
    return f"{node.name}({ast.unparse(node.args)})"
