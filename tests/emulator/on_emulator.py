"""Start pytest on the emulator, in a process of its own: torch is imported there anew."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Outcome:
    """Is how a run ended: messages of failures and reasons of skips by test, and all it said."""

    failed: dict[str, str]
    skipped: dict[str, str]
    passed: set[str]
    output: str


class Run:
    """Is pytest on the emulator, running."""

    def __init__(self, report: Path, target: str, *arguments: str, **settings: str) -> None:
        """Start it.

        Args:
            report: a file that it may write.
            target: "sm_80" or "sm_90".
            arguments: of pytest.
            settings: of the environment, see ``plugin.py``.
        """
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTEST_", "TRITON_", "FUSEDFORMER_EMULATE_B"))
        }
        environment.update(settings, FUSEDFORMER_EMULATE=target, OMP_NUM_THREADS="1")
        self._report = report
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.emulator.plugin"]
        options = ["-p", "no:cacheprovider", "-p", "no:xdist", f"--junitxml={report}"]
        self._process = subprocess.Popen(
            [*command, *options, *arguments], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def end(self, timeout: float) -> Outcome:
        """Wait for it."""
        try:
            output, _ = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        if not self._report.exists():
            raise RuntimeError(f"pytest did not run:\n{output[-4000:]}")
        failed, skipped, passed = {}, {}, set()
        for case in ET.parse(self._report).iter("testcase"):
            name = case.get("name", "")
            faults = [*case.findall("failure"), *case.findall("error")]
            skips = case.findall("skipped")
            if faults:
                failed[name] = "\n".join(f"{one.get('message')}\n{one.text}" for one in faults)
            elif skips:
                skipped[name] = skips[0].get("message", "")
            else:
                passed.add(name)
        return Outcome(failed, skipped, passed, output)
