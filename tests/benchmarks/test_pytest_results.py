"""The plugin of ``gpu_check``: what it keeps, what it selects, and workers that lost the GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.pytest_results import LOST, is_listed, outcomes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# What the first test that touches a lost GPU raises, and every later one of its process.
LOSING = """
import os, pytest
lost = []

def test_before(): pass

@pytest.mark.parametrize("i", range(2))
def test_loses(i):
    lost.append(i)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

@pytest.mark.parametrize("i", range(6))
def test_after(i):
    assert not lost

def test_wrong(): assert 1 == 2

@pytest.mark.skip(reason="not here")
def test_skipped(): pass

@pytest.fixture
def breaks():
    yield
    raise ValueError("after the test")

def test_breaks_afterwards(breaks): pass
"""


def run(folder: Path, *arguments: str, text: str = LOSING) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    plugin = ["-p", "harness.pytest_results", "--results", str(folder / "results.jsonl")]
    return subprocess.run(
        [*command, *plugin, "--rootdir", str(folder), *arguments, "test_it.py"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(BENCHMARKS)}, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip


def test_a_worker_that_lost_the_gpu_ends_and_another_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    done = run(tmp_path, "-n", "1", "--dist", "worksteal", "--max-worker-restart", "10")
    found = outcomes(tmp_path / "results.jsonl")
    by_outcome: dict[str, set[str]] = {}
    for test, result in found.items():
        by_outcome.setdefault(result["outcome"], set()).add(test.partition("::")[2])
    after = {f"test_after[{i}]" for i in range(6)}
    assert by_outcome["passed"] == {"test_before", *after}, done.stdout
    failed = {"test_loses[0]", "test_loses[1]", "test_wrong", "test_breaks_afterwards"}
    assert by_outcome["failed"] == failed
    assert by_outcome["skipped"] == {"test_skipped"}
    assert done.stdout.count("node down") == 2
    assert "3 failed, 8 passed, 1 skipped, 1 error" in done.stdout  # each test once
    assert found["test_it.py::test_skipped"]["message"] == "Skipped: not here"
    assert found["test_it.py::test_wrong"]["message"] == "assert 1 == 2"
    assert "illegal memory access" in found["test_it.py::test_loses[0]"]["message"]


def test_lists_name_what_is_run_and_what_is_not(tmp_path: Path) -> None:
    only, without = tmp_path / "only.txt", tmp_path / "without.txt"
    only.write_text("# a comment\ntest_it.py::test_after\ntest_it.py::test_before\nno.py::test_x\n")
    without.write_text("test_it.py::test_after[1]\ntest_it.py::test_after[4]\n")
    done = run(tmp_path, "--only", str(only), "--without", str(without))
    assert done.returncode == 0, done.stdout
    ran = [test.partition("::")[2] for test in outcomes(tmp_path / "results.jsonl")]
    assert ran == ["test_before", *(f"test_after[{i}]" for i in (0, 2, 3, 5))]


def test_what_was_cut_off_is_no_result(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert outcomes(file) == {}
    file.write_text('{"test": "a", "outcome": "failed"}\n{"test": "a", "outcome": "passed"}\n{"tes')
    assert outcomes(file) == {"a": {"test": "a", "outcome": "passed"}}


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("torch.AcceleratorError: CUDA error: operation not permitted when stream is capturing", 1),
        ("RuntimeError: Triton Error [CUDA]: an illegal memory access was encountered", 1),
        ("RuntimeError: Offset increment outside graph capture encountered unexpectedly.", 1),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.", 0),
        ("AssertionError: 13.3 times the limit", 0),
    ],
)
def test_which_failures_cost_the_process_its_gpu(message: str, lost: bool) -> None:
    assert bool(LOST.search(message)) == lost


def test_a_list_may_name_all_parameters() -> None:
    assert is_listed("a.py::test[1]", {"a.py::test"})
    assert is_listed("a.py::test[1]", {"a.py::test[1]"})
    assert not is_listed("a.py::test[1]", {"a.py::test[2]", "a.py"})
