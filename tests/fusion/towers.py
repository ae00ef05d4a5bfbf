"""Modules of timm and open_clip, which import torchvision for the transforms of images."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest


class _AnyName(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """timm imports torchvision for the transforms of images, which nothing here needs."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        def any_name(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return _AnyName(name, (), {})

        module = types.ModuleType(spec.name)
        module.__dict__["__getattr__"] = any_name
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextlib.contextmanager
def torchvision() -> Iterator[None]:
    """Put something in the place of torchvision, of which nothing here is used."""
    finder = _Torchvision()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def open_clip_transformer() -> Any:
    """Import open_clip's blocks without its package, which imports tokenizers and loaders."""
    found = importlib.util.find_spec("open_clip")
    if found is None:
        pytest.skip("open_clip is not installed")
    package = types.ModuleType("open_clip")
    package.__path__ = list(found.submodule_search_locations or [])
    sys.modules.setdefault("open_clip", package)
    with torchvision():
        return importlib.import_module("open_clip.transformer")
