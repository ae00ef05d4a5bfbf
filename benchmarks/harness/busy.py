"""Processes beside a measurement that want a processor too, as on a shared server."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def spinning(processes: int) -> Iterator[None]:
    """Keep as many processes busy for as long as the block runs, each of which spins."""
    running = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)
    ]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()
