"""The suites under pytest-benchmark: ``pytest benchmarks/suites/bench_softmax.py``.

A test is one provider of one case in one direction, checked first: a failing check fails the test,
an unsupported case skips it. The times are pytest-benchmark's, wall time until the device is idle,
so on a GPU they hold the launch as well; ``run.py`` measures the device alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from harness.case import REFERENCE, Case, Inputs, Sizes, Suite
from harness.runner import Contender, check_all


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options of sizes and peers; device and dtype are chosen by what is there."""
    group = parser.getgroup("fusedformer benchmarks")
    group.addoption("--bench-sizes", choices=("full", "cpu", "tiny"))
    group.addoption("--bench-quick", action="store_true", help="headline cases only")
    group.addoption("--bench-compile", choices=("none", "headline", "all"), default="none")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test for each provider, direction and case of the module's ``SUITE``."""
    if "contest" not in metafunc.fixturenames:
        return
    suite: Suite = metafunc.module.SUITE
    on_gpu = _device().type == "cuda"
    option = metafunc.config.getoption
    sizes = Sizes.of(option("--bench-sizes") or ("full" if on_gpu else "cpu"))
    cases = suite.cases(sizes, torch.bfloat16 if on_gpu else torch.float32)
    names = list(suite.providers(_device(), option("--bench-compile")))
    found = [
        pytest.param((suite, case, name, direction), id=f"{case.name}-{direction}-{name}")
        for case in cases
        if case.headline or not option("--bench-quick")
        for direction in case.costs
        for name in names
    ]
    metafunc.parametrize("contest", found, indirect=True)


_last: dict[str, tuple[Inputs, list[Contender]]] = {}


def _checked(suite: Suite, case: Case, compile: str) -> tuple[Inputs, list[Contender]]:
    """Make inputs and checked contenders of a case; kept until a test asks for another case."""
    key = f"{suite.name} {case.name}"
    if key not in _last:
        _last.clear()
        torch.manual_seed(0)
        inputs = case.make(_device())
        providers = suite.providers(_device(), compile)
        _last[key] = inputs, check_all(suite, case, providers, inputs, _device())
    return _last[key]


@pytest.fixture
def contest(request: pytest.FixtureRequest) -> Callable[[Any], None]:
    """Time one provider with the ``benchmark`` fixture, if it passed its check."""
    suite, case, name, direction = request.param

    def time_it(benchmark: Any) -> None:
        inputs, contenders = _checked(suite, case, request.config.getoption("--bench-compile"))
        contender = next((c for c in contenders if c.name == name), None)
        if contender is None:
            pytest.skip(f"{name} is not for this case")
        verdict = contender.verdicts[direction]
        if verdict.status == "unsupported":
            pytest.skip(verdict.reason)
        if verdict.status != "timed" or contender.program is None:
            pytest.fail(f"{verdict.status}: {verdict.reason}")
        inputs = contender.program.own(inputs)
        with torch.no_grad():
            grads = [torch.randn_like(o) for o in contender.program.outputs(inputs)]
        call = contender.program.call(direction, inputs, grads)

        def until_idle() -> None:
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        cost = case.costs[direction]
        benchmark.group = f"{case.suite}: {case.name}, {direction}"
        benchmark.extra_info.update(
            provider=name,
            reference=REFERENCE,
            bytes=cost.bytes,
            flops=cost.flops,
            error_ratio=verdict.error_ratio,
        )
        until_idle()
        benchmark(until_idle)

    return time_it
