"""A pytest plugin of ``gpu_check``: results are kept as they come, and a lost GPU costs one test.

``python -m pytest -p harness.pytest_results --results FILE [--only FILE] [--without FILE]``, with
or without pytest-xdist. A kernel that reads memory that is not its own breaks the GPU for the whole
process, and so does a capture that failed: every later test there would fail too. So a worker
reports the first of them and ends, and xdist starts another in its place.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

# What torch and Triton say when a process can't use its GPU any more. Out of memory is not of them.
LOST = re.compile(
    r"illegal memory access|device-side assert|unspecified launch failure|misaligned address"
    r"|CUDA error|Triton Error \[CUDA\]|Offset increment outside graph capture"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options; lists of tests name a test, or one with all of its parameters, a line."""
    group = parser.getgroup("gpu_check")
    group.addoption("--results", type=Path, help="lines of JSON: a test, its outcome and message")
    group.addoption("--only", type=Path, help="a list of tests: no others are run")
    group.addoption("--without", type=Path, help="a list of tests: they are not run")


def pytest_configure(config: pytest.Config) -> None:
    """Let workers of xdist end when they must, and the process that starts them write results."""
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(EndsWithoutGpu())
    elif config.getoption("--results") is not None:
        config.pluginmanager.register(Results(config.getoption("--results")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select by the lists, which must not change while tests run: a new worker reads them again."""
    only, without = (read_list(config.getoption(name)) for name in ("--only", "--without"))
    left_out = [
        item
        for item in items
        if not (only is None or is_listed(item.nodeid, only))
        or (without is not None and is_listed(item.nodeid, without))
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = {id(item) for item in left_out}
        items[:] = [item for item in items if id(item) not in gone]


def read_list(path: Path | None) -> set[str] | None:
    """Read the tests of a list, or None where there is no list."""
    if path is None:
        return None
    lines = map(str.strip, path.read_text().splitlines())
    return {line for line in lines if line and not line.startswith("#")}


def is_listed(test: str, names: set[str]) -> bool:
    """Tell whether the list has the test, or all of its parameters."""
    return test in names or test.partition("[")[0] in names


class EndsWithoutGpu:
    """In a worker: end the process after a test that lost the GPU, once it was reported."""

    lost = False

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Look at the message of a failure."""
        self.lost |= report.failed and bool(LOST.search(report.longreprtext))

    @pytest.hookimpl(trylast=True)  # after the worker has sent it
    def pytest_runtest_logfinish(self) -> None:
        """End without the cleaning up that a broken GPU could hang in."""
        if self.lost:
            os._exit(1)


class Results:
    """In the process that reports: append each test's outcome to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failed: set[str] = set()

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: Any) -> None:
        """Count a test once whose worker ended itself after reporting it."""
        if crashitem in self.failed:
            report.outcome, report.when = "passed", "teardown"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write a line when a test is done, or failed before or after that."""
        if report.failed:
            self.failed.add(report.nodeid)
        if report.when != "call" and report.passed:
            return
        lines = report.longreprtext.splitlines()
        said = [line for line in lines if line.startswith("E ")] or lines[-1:]
        result = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
            "message": said[0].removeprefix("E ").strip()[:300] if said else "",
        }
        if report.skipped and isinstance(report.longrepr, tuple):
            result["message"] = str(report.longrepr[2])
        with self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")


def outcomes(path: Path) -> dict[str, dict[str, Any]]:
    """Read the last result of each test; a failure after the test itself counts as the test's."""
    found: dict[str, dict[str, Any]] = {}
    lines: Iterable[str] = path.read_text().splitlines() if path.exists() else ()
    for line in lines:
        try:
            result = json.loads(line)
        except ValueError:  # cut off when the process was killed
            continue
        found[result["test"]] = result
    return found
