"""Tell a recorder of launches what else a call does; see :mod:`plans`.

It imports no triton: the library's steps run on machines that have no kernels too.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class _Recording(threading.local):
    recorder: Any = None  # a recording.Recorder, in the thread whose launcher is recorded


_recording = _Recording()


def recorder() -> Any:
    """Return who notes what this thread does, or None."""
    return _recording.recorder


@contextlib.contextmanager
def recording(recorder: Any) -> Iterator[None]:
    """Have ``recorder`` note what this thread does; None for nobody."""
    previous, _recording.recorder = _recording.recorder, recorder
    try:
        yield
    finally:
        _recording.recorder = previous


def step(function: F) -> F:
    """Have plans call a function each time, as it is; a decorator.

    It does something else than launch, or more than kinds decide what it does. It takes tensors and
    what plans hold as it is, and returns a tensor whose size and layout follow from kinds, or None.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        noted = _recording.recorder
        if noted is None:
            return function(*args)
        with recording(None):
            found = function(*args)
        if found is not None:
            noted.called(function, args, found)
        return found

    return run  # type: ignore[return-value]


def unplanned() -> None:
    """Say that the call that is running does more than a plan can hold."""
    if _recording.recorder is not None:
        _recording.recorder.failed = True
