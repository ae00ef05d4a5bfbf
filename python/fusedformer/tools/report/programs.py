"""Run the other programs whose results the report shows, each in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusedformer.tools.report.stages import Stopwatch

BENCHMARKS = Path(__file__).resolve().parents[4] / "benchmarks" / "run.py"
_BUDGET_SECONDS = 120


def op_parity(watch: Stopwatch, *, quick: bool) -> dict[str, Any]:
    """Run ``fusedformer parity``, in Triton's interpreter if need be; return its result."""
    with tempfile.TemporaryDirectory() as folder, watch.stage("Parity of all ops", None) as advance:
        path = Path(folder) / "parity.json"
        options = ["--quick"] if quick else []
        _run(["-m", "fusedformer", "parity", "--json", str(path), *options], path, advance)
        found: dict[str, Any] = json.loads(path.read_text())
    return found


def op_timings(
    watch: Stopwatch, given: dict[str, Any] | None, device: torch.device
) -> dict[str, Any]:
    """Take the given benchmark result, or make one on a GPU; else return ``{"skipped": why}``."""
    if given is not None:
        return given
    if device.type != "cuda":
        return {"skipped": "There is no GPU here; times of kernels in an interpreter mean nothing."}
    if not BENCHMARKS.exists():
        return {"skipped": "The benchmarks are not installed; run the report from a checkout."}
    with tempfile.TemporaryDirectory() as folder, watch.stage("Timings of ops", None) as advance:
        path = Path(folder) / "benchmarks.json"
        options = ["--quick", "--budget", str(_BUDGET_SECONDS), "--out", str(path)]
        try:
            _run([str(BENCHMARKS), *options], path, advance)
        except RuntimeError as error:
            return {"skipped": f"The benchmarks failed: {error}"}
        measured: dict[str, Any] = json.loads(path.read_text())
    return measured


def _run(arguments: list[str], result: Path, advance: Callable[[], None]) -> None:
    """Run Python, and advance with each line that it prints; raise if it leaves no result."""
    lines: list[str] = []
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            advance()
    if not result.exists():
        raise RuntimeError(f"{' '.join(arguments)} left no result:\n{''.join(lines[-20:])}")
