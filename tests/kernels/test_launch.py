"""Kernels launched past Triton's own way to them are those that Triton would have launched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_same_kernels_with_the_same_arguments() -> None:
    """Every compile case's launches, and every kind of pointer and integer."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    roots = (ROOT / folder for folder in ("python", "kernels", "benchmarks", "."))
    environment["PYTHONPATH"] = os.pathsep.join(map(str, roots))
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.launches"], env=environment, capture_output=True,
        text=True, cwd=ROOT, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
