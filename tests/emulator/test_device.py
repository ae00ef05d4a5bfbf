"""The fake device is one: ``on_device.py`` runs on it, and each planted fault is found."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from tests.emulator.on_emulator import Outcome, Run

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one here"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the device needs a C++ compiler"),
]
# What is said of each, with the kernel and the line that did it.
PLANTED = {
    "test_a_write_out_of_bounds_is_found": r"_shift.*(?i:out.of.bounds)",
    "test_a_read_out_of_bounds_is_found": r"_shift.*(?i:out.of.bounds)",
    "test_an_unwritten_read_is_found": r"_shift.*(?i:nobody wrote|unwritten)",
    "test_a_finding_whose_error_is_swallowed_is_found": r"_shift.*(?i:out.of.bounds)",
    "test_a_write_beside_memory_by_other_means_is_found": r"bytes behind an allocation of 16",
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    report: Path = tmp_path_factory.mktemp("device") / "report.xml"
    settings = {"FUSEDFORMER_EMULATE_BUDGET": "100000"}
    return Run(report, "sm_90", "tests/emulator/on_device.py", **settings).end(timeout=600)


def test_it_does_what_a_device_does(outcome: Outcome) -> None:
    wrong = {name: text for name, text in outcome.failed.items() if name not in PLANTED}
    assert not wrong, "\n".join(wrong.values())[-8000:]
    assert len(outcome.passed) >= 15


@pytest.mark.parametrize("name", PLANTED)
def test_faults_fail_their_test(name: str, outcome: Outcome) -> None:
    assert re.search(PLANTED[name], outcome.failed[name])


def test_launches_that_take_too_long_are_skipped_and_counted(outcome: Outcome) -> None:
    assert outcome.skipped == {"test_a_kernel_that_takes_long": "too long to emulate"}
    assert "launches too long to emulate: _count 1" in outcome.output
