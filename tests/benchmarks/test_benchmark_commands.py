"""The suites run by every command: ``gpu_check.sh``, pytest-benchmark, ``fusedformer bench``."""

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

from harness import records
from harness.suites import SUITES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# The suite may run under the interpreter; benchmarks never do.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def test_the_list_of_suites_is_what_is_there() -> None:
    assert {path.stem for path in BENCHMARKS.glob("suites/bench_*.py")} == {
        f"bench_{s}" for s in SUITES
    }


STAGES = "environment confirm tests bench tune memory compile"


def _gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(BENCHMARKS / "gpu_check.sh"), *arguments],
        env={**ENVIRONMENT, "PYTHON": sys.executable, "STAGES": STAGES},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_gpu_check_runs_every_stage_dry_and_resumes(tmp_path: Path) -> None:
    result = _gpu_check(str(tmp_path), "--cpu-dry-run")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert len(files) <= 16
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in files)
    document = json.loads((tmp_path / "bench.json").read_text())
    assert records.problems(document) == []
    assert {r["suite"] for r in document["records"]} == set(SUITES)
    # float32 on the same backend as stock: the library passes wherever it runs.
    ours = [r for r in document["records"] if r["provider"] == "fusedformer"]
    assert {r["status"] for r in ours} == {"timed"}
    done = (tmp_path / "stages.done").read_text().split()
    assert set(done) == set(SUITES) | set(STAGES.split()) - {"bench"}
    assert result.stdout.rstrip().endswith("none")  # the summary comes last

    again = _gpu_check(str(tmp_path), "--cpu-dry-run")
    assert again.returncode == 0
    assert again.stdout.count("complete before") == len(done)
    assert json.loads((tmp_path / "bench.json").read_text()) == document


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_check_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    result = _gpu_check(str(tmp_path))
    assert result.returncode == 2
    assert "no GPU" in result.stderr
    assert _gpu_check().returncode == 2


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
