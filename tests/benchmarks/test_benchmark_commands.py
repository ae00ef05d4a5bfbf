"""The suites run by other commands too: pytest-benchmark, ``fusedformer bench``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.benchmarks.square import measured_square

from harness.suites import SUITES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# The suite may run under the interpreter; benchmarks never do.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def test_the_list_of_suites_is_what_is_there() -> None:
    assert {path.stem for path in BENCHMARKS.glob("suites/bench_*.py")} == {
        f"bench_{s}" for s in SUITES
    }


def test_suite_runs_under_pytest_benchmark() -> None:
    pytest.importorskip("pytest_benchmark")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            str(BENCHMARKS / "suites" / "bench_softmax.py"),
            "--bench-sizes=tiny",
            "--bench-quick",
            "--benchmark-max-time=0.01",
            "--benchmark-min-rounds=1",
            "-k",
            "64x128",
        ],
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert re.search(r"\b6 passed", result.stdout)  # two providers in three directions


def test_bench_is_a_command_of_the_checkout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedformer.tools import bench

    file = tmp_path / "square.json"
    file.write_text(json.dumps(measured_square()))
    assert bench.main(["compare", str(file), str(file)]) == 0
    assert "0 faster, 0 slower" in capsys.readouterr().out
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    assert bench.main([]) == 2
    assert "checkout" in capsys.readouterr().err


def test_the_table_of_embed_compares_what_it_times() -> None:
    """Each is called once and compared with the truth, and then timed in turns with the others."""
    import embed_table

    turns: list[str] = []

    def call(name: str, found: torch.Tensor) -> torch.Tensor:
        turns.append(name)
        return found

    truth = torch.eye(2, dtype=torch.float64)
    calls = {
        ("right", 40): lambda: call("right", truth.float()),
        ("off", None): lambda: call("off", torch.tensor([[1.0, 0.0], [3.0, 4.0]])),
    }
    right, off = embed_table.measured(calls, truth, rounds=2)
    assert turns == ["right", "off"] * 3
    assert right[:2] == ("right", 40) and right.mean_cosine == right.least_cosine == 1
    assert off.least_cosine == pytest.approx(0.8) and off.mean_cosine == pytest.approx(0.9)
    assert right.seconds > 0
    cells = embed_table._cells(off._replace(seconds=0.5), 2)
    assert cells == ["off", "", "0.50", "4", "0.900000", "0.800000"]
