"""Which forms of a kernel are compiled: none for each length, and none with sums fused unasked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """From a process whose triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "python", ROOT / "kernels", ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.forms"], env=environment, capture_output=True,
        text=True, cwd=ROOT, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def test_lengths_and_counts_are_not_compiled_in(found: dict[str, Any]) -> None:
    """One form for 1, 2 and 7: ptxas ended with a signal where both lengths were the constant 1."""
    assert (found["lengths"], found["sixteens"], found["rows"]) == (1, 1, 1)


def test_multiply_adds_are_fused_where_they_are_asked_for(found: dict[str, Any]) -> None:
    """By any version: ``a * b - c`` is 0 where c is the rounded product."""
    assert found["fusion"] == [False]
    assert found["multiply-adds"] == [0, 1]
