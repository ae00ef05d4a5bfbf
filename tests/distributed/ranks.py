"""A few processes of one gloo group, started once, that run what tests send them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import pytest

SECONDS = 60.0  # to answer in
GROUP_SECONDS = 30.0  # to take part in a collective
GRACE_SECONDS = 20.0  # for the other ranks, once one has failed

# A server imports torch once, without threads; the ranks are forked from it, again and again.
_context = multiprocessing.get_context("forkserver")


class RankError(RuntimeError):
    """Some rank raised, died or did not answer; ``errors`` says what, by rank."""

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__("\n".join(f"rank {r}: {error}" for r, error in sorted(errors.items())))
        self.errors = errors


class Ranks:
    """``size`` processes, each a rank of one gloo group, with one thread each.

    They are started by the first :meth:`run`, and again by the next after an error, since the
    group is then of no use.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._started: list[tuple[Any, Connection]] = []
        self._folder = tempfile.TemporaryDirectory()
        self._starts = 0

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        size: int | None = None,
        seconds: float = SECONDS,
        group_seconds: float = GROUP_SECONDS,
    ) -> list[Any]:
        """``function(mesh, *args)`` on the first ``size`` ranks, and what they return, by rank.

        Args:
            function: of a module's top level. ``mesh`` is a ``DeviceMesh`` of those ranks. Torch
                is seeded with 0 on every rank, and unwritten memory is NaN.
            args: anything that can be pickled; no rank shares memory with another.
            size: of the mesh; all ranks if None. The default process group always has all ranks.
            seconds: after which a rank that did not answer is killed.
            group_seconds: after which a collective that not all take part in raises. Other than
                the usual starts ranks of their own for this call.

        Raises:
            RankError: if any rank raised, with its traceback, died, or did not answer.
        """
        size = self.size if size is None else size
        own = group_seconds != GROUP_SECONDS
        if own:
            self.close()
        if not self._started:
            self._start(group_seconds)
        request = pickle.dumps((function, args, size))
        for _, connection in self._started[:size]:
            connection.send_bytes(request)
        results, errors = self._answers(size, seconds)
        if errors or own:
            self.close()
        if errors:
            raise RankError(errors)
        return [results[rank] for rank in range(size)]

    def close(self) -> None:
        """End all processes."""
        for process, connection in self._started:
            connection.close()
            process.kill()
        for process, _ in self._started:
            process.join()
        self._started = []

    def _start(self, group_seconds: float) -> None:
        store = str(Path(self._folder.name) / f"store{self._starts}")
        self._starts += 1
        _start_server()
        for rank in range(self.size):
            here, there = _context.Pipe()
            args = there, rank, self.size, store, group_seconds
            process = _context.Process(target=_serve, args=args, daemon=True)
            process.start()
            there.close()
            self._started.append((process, here))

    def _answers(self, size: int, seconds: float) -> tuple[dict[int, Any], dict[int, str]]:
        """Results and errors, by rank."""
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        pending: dict[Any, int] = {c: r for r, (_, c) in enumerate(self._started[:size])}
        deadline = time.monotonic() + seconds
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                errors |= dict.fromkeys(pending.values(), "did not answer in time")
                break
            for connection in cast(list[Connection], ready):
                rank = pending.pop(connection)
                try:
                    fine, answer = pickle.loads(connection.recv_bytes())
                except EOFError:
                    process = self._started[rank][0]
                    process.join(GRACE_SECONDS)
                    fine, answer = False, f"died with exit code {process.exitcode}"
                (results if fine else errors)[rank] = answer
            if errors:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return results, errors


def _start_server() -> None:
    """Start what ranks are forked from, unless it runs; Python 3.11 does not tell it the path."""
    _context.set_forkserver_preload(["tests.distributed.rank"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()


def _serve(*args: Any) -> None:
    from tests.distributed import rank  # only where it is to run: it changes the environment

    rank.serve(*args)
