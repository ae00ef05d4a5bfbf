"""Triton's interpreter without the work it throws away: more than half of the suite's time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def thrifty_interpreter() -> Iterator[None]:
    """Kernels interpreted inside compute the same, sooner.

    - A launch puts interpreted functions in the place of those of ``triton.language`` until it
      ends. Each call of one device function by another does so again, though what it replaces
      depends on nothing but the function's module: here, once for each module in a launch.
    - Integer arithmetic is repeated in int64 to see whether it overflows, but what comes out is
      looked at in debug mode alone: here, not otherwise.
    """
    from triton.runtime import interpreter

    replace, options = interpreter._patch_lang, interpreter.interpreter_builder.options
    replaced: set[str] = set()

    class Scope:
        """What a launch restores when it ends; that of a call within it never is."""

        def __init__(self, scope: Any) -> None:
            self.scope = scope

        def restore(self) -> None:
            replaced.clear()
            self.scope.restore()

    def replace_once(function: Any) -> Scope | None:
        if function.__module__ in replaced:
            return None
        replaced.add(function.__module__)
        return Scope(replace(function))

    interpreter._patch_lang = replace_once
    interpreter.interpreter_builder.options = dataclasses.replace(
        options, sanitize_overflow=options.debug
    )
    try:
        yield
    finally:
        interpreter._patch_lang = replace
        interpreter.interpreter_builder.options = options
