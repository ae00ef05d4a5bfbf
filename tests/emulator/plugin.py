"""A pytest plugin that gives tests a GPU: PTX, emulated on the CPU.

    FUSEDFORMER_EMULATE=sm_90 python -m pytest -p tests.emulator.plugin tests/ops/test_softmax.py

Settings, in the environment:

- ``FUSEDFORMER_EMULATE``: sm_90 or sm_80.
- ``FUSEDFORMER_EMULATE_BUDGET``: warp instructions that a launch may take, 20,000,000 unless told;
  a test with a longer one is skipped, and counted at the end. 0: as many as it takes.
- ``FUSEDFORMER_EMULATE_ORDER``: the order that programs and warps run in: 0, 1 or 2.

See docs/emulator.md.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
from tests.emulator import device
from tests.emulator.build import emulator_library
from tests.emulator.device.launches import Launches

TARGET = os.environ.get("FUSEDFORMER_EMULATE", "sm_90")
BUDGET = int(os.environ.get("FUSEDFORMER_EMULATE_BUDGET", "20000000"))
ORDER = int(os.environ.get("FUSEDFORMER_EMULATE_ORDER", "0"))
_SLOWEST = 8  # kernels named in the summary
# Tests that hold results to what the host's operators do here, and why they cannot.
_ORDER = "stock adds in the host's order here, in fewer steps than a GPU: within 1.02 of its limit"
_BITS = "the host's products have other bits at other addresses"
_REPLAYS = "tests/ecosystem/test_cuda_graphs.py::test_every_op_replays_with_eager_bits"
_HELD_TO_THE_HOST = {
    "tests/ops/test_attention_sinks.py::test_one_part_of_the_keys_has_the_sink[triton]": _ORDER,
    "tests/ops/test_attention_parts.py::test_few_queries[16-torch.float32]": _ORDER,
    f"{_REPLAYS}[linear_cross_entropy chunks of rows]": _BITS,
    f"{_REPLAYS}[linear_cross_entropy blocks of classes]": _BITS,
    f"{_REPLAYS}[linear_cross_entropy label smoothing]": _BITS,
}

launches = device.install(TARGET, emulator_library())
launches.emulator.configure("budget", BUDGET)
launches.emulator.configure("order", ORDER)
_begun = time.perf_counter()


def _phase() -> Generator[None, Any, Any]:
    """Let a phase of a test fail by what its launches did, or skip if one was too long."""
    launches.findings.clear()
    before = launches.too_long.total()
    error: BaseException | None = None
    result = None
    try:
        result = yield
    except BaseException as caught:
        error = caught
    if launches.too_long.total() > before and not isinstance(error, KeyboardInterrupt):
        pytest.skip("too long to emulate")
    found = [*launches.findings, *launches.damage()]
    if found:
        text = "\n".join(dict.fromkeys(found))
        raise pytest.fail.Exception(f"the emulator found:\n{text}") from error
    if error is not None:
        raise error
    return result


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if reason := _HELD_TO_THE_HOST.get(item.nodeid):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _phase())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _phase())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _phase())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let the process that started this one have the figures, if there is one."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["emulator"] = Figures.of(launches).to_dict()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    figures = getattr(node, "workeroutput", {}).get("emulator")
    if figures is not None:
        _of_workers.append(Figures(**figures))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    parts = _of_workers or [Figures.of(launches)]
    terminalreporter.section(f"emulated on {TARGET}")
    for line in Figures.sum(parts).lines(time.perf_counter() - _begun):
        terminalreporter.line(line)


@dataclass
class Figures:
    """Is what has run: in one process, or in all."""

    kernels: int = 0
    first: int = 0  # launches by Triton's own way
    cached: int = 0  # launches by the library's
    instructions: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by kernel
    too_long: dict[str, int] = field(default_factory=dict)  # launches, by kernel

    @staticmethod
    def of(launches: Launches) -> Figures:
        """Those of this process."""
        kernels = launches.kernels.values()
        cached = sum(kernel.cached for kernel in kernels)
        first = sum(kernel.launches for kernel in kernels) - cached
        seconds: dict[str, float] = defaultdict(float)
        for kernel in kernels:
            seconds[kernel.name] += kernel.seconds
        count = launches.emulator.instructions
        return Figures(len(kernels), first, cached, count, dict(seconds), dict(launches.too_long))

    @staticmethod
    def sum(parts: list[Figures]) -> Figures:
        """Those of several processes together."""
        total = Figures()
        for part in parts:
            total.kernels += part.kernels
            total.first += part.first
            total.cached += part.cached
            total.instructions += part.instructions
            for name, spent in part.seconds.items():
                total.seconds[name] = total.seconds.get(name, 0.0) + spent
            for name, count in part.too_long.items():
                total.too_long[name] = total.too_long.get(name, 0) + count
        return total

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, which go from process to process."""
        return asdict(self)

    def lines(self, wall: float) -> list[str]:
        """Say them in words."""
        busy = sum(self.seconds.values())
        slowest = sorted(self.seconds.items(), key=lambda one: -one[1])[:_SLOWEST]
        lines = [
            f"{self.kernels} kernels; {self.first} launches by Triton's own way, {self.cached} "
            f"cached ones; {self.instructions:,} warp instructions in {busy:.0f} s; {wall:.0f} s "
            "in all",
            "slowest: " + ", ".join(f"{name} {spent:.1f} s" for name, spent in slowest),
        ]
        if self.too_long:
            longest = ", ".join(f"{name} {count}" for name, count in self.too_long.items())
            lines.append(f"launches too long to emulate: {longest}")
        return lines


_of_workers: list[Figures] = []
