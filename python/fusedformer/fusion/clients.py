"""Libraries whose models ``fuse`` knows: whether they were imported, in a version that is known."""

from __future__ import annotations

import re
import sys
from typing import Any

from torch import nn

from fusedformer.fusion._classes import Plan

_OLDEST = {"transformers": (5, 17), "sentence_transformers": (6, 2)}


def is_known(library: str) -> bool:
    """Return whether ``library`` was imported, in a version whose models are known."""
    return library in sys.modules and not outdated(library)


def outdated(library: str) -> str:
    """Say which version of ``library`` was imported, if that is too old."""
    version = str(getattr(sys.modules.get(library), "__version__", ""))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    oldest = _OLDEST[library]
    if numbers is None or (int(numbers[1]), int(numbers[2])) >= oldest:
        return ""
    return f"{library.replace('_', '-')} {version} is older than {oldest[0]}.{oldest[1]}"


def leave_outdated(plan: Plan, model: nn.Module) -> None:
    """Report the models of libraries that are too old: each one that is not part of another."""
    for library in _OLDEST:
        reason = outdated(library)
        outer: tuple[str, ...] = ()
        for path, module in model.named_modules() if reason else ():
            is_theirs = any(_library(cls) == library for cls in type(module).__mro__)
            if is_theirs and not path.startswith(outer):
                plan.leave(path, module, reason)
                outer += (f"{path}." if path else "",)


def _library(cls: type[Any]) -> str:
    return cls.__module__.partition(".")[0]
