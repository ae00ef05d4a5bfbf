"""Write Python functions out, so that what is known when they are made costs nothing later."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType
from typing import Any


class Written:
    """Is a function that is being written, line by line.

    Values that it uses have names, and no place in its text: functions that differ in values alone
    are compiled once.

    Args:
        parameters: as in Python, such as ``"tensors, pointers"``.
    """

    def __init__(self, parameters: str) -> None:
        self._lines = [f"def run({parameters}):"]
        self._values: dict[str, Any] = {}

    def line(self, text: str) -> None:
        """Add a line to the body."""
        self._lines.append(f" {text}")

    def value(self, value: Any) -> str:
        """Return a name for ``value``."""
        name = f"v{len(self._values)}"
        self._values[name] = value
        return name

    def unpack(self, letter: str, count: int, of: str) -> None:
        """Add a line that takes a list of ``count`` apart into ``letter0``, ``letter1``, ..."""
        if count:
            self.line("".join(f"{letter}{index}, " for index in range(count)) + f"= {of}")

    def function(self) -> Callable[..., Any]:
        """Return the function."""
        found = self._values
        exec(_compiled("\n".join(self._lines)), found)
        made: Callable[..., Any] = found.pop("run")
        return made


@functools.lru_cache(maxsize=4096)
def _compiled(text: str) -> CodeType:
    return compile(text, "<written by fusedformer>", "exec")


def sequence(parts: list[str]) -> str:
    """Return the text of a tuple of ``parts``."""
    return f"({''.join(f'{part}, ' for part in parts)})"
