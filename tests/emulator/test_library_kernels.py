"""The library's kernels, as compiled for sm_80 and sm_90, load in the emulator and run in it.

With ``EMULATOR_EVERY_CASE=1`` every case of the compile report is loaded, not each kernel once.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import triton
from tests.emulator import library
from tests.emulator.machine import Compiled, Machine, in_compiler

TARGETS = "sm_80", "sm_90"
EVERY = os.environ.get("EMULATOR_EVERY_CASE", "0") == "1"
# Triton 3.6 puts no fence.proxy.async between cp.async and wgmma.
SETTINGS = {"fenced_copies": int(not triton.__version__.startswith("3.6."))}
ERRORS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_load(target: str) -> None:
    kernels = in_compiler(library.compiled_kernels, target, EVERY)
    assert len(kernels) > 25
    machine, unknown = Machine(), {}
    for name, kernel in kernels.items():
        try:
            assert isinstance(kernel, Compiled), kernel
            machine.load(kernel.ptx, kernel.name)
        except (RuntimeError, AssertionError) as error:
            unknown[name] = str(error)
    assert unknown == {}


CASES = [
    ("softmax", torch.float32), ("softmax", torch.bfloat16), ("layer_norm", torch.bfloat16),
    ("attention", torch.float32), ("attention", torch.float16), ("attention", torch.bfloat16),
    ("attention causal", torch.bfloat16), ("attention value dim 16", torch.bfloat16),
    ("attention d=128", torch.bfloat16), ("attention of few queries", torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_kernels_compute(name: str, dtype: torch.dtype, target: str) -> None:
    """Output and gradients are those of float64, and nothing is found."""
    errors, findings = in_compiler(library.errors_of, name, dtype, target, SETTINGS)
    assert findings == []
    assert max(errors) < ERRORS[dtype], errors


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (library.without_last_part, None),
        (library.with_overlapping_parts, "global-race _few_queries_backward"),
    ],
)
def test_faults_in_the_gradient_of_few_queries_are_seen(fault: Any, found: str | None) -> None:
    """By the gradient of the query, which alone is wrong; and as a race, where it is one."""
    given = "attention of few queries", torch.bfloat16, "sm_90", SETTINGS
    (output, dq, dk, dv), findings = in_compiler(library.errors_of, *given, fault)
    limit = ERRORS[torch.bfloat16]
    assert max(output, dk, dv) < limit
    assert not dq <= limit  # memory that nobody wrote may be NaN
    assert {" ".join(finding.split()[:2]) for finding in findings} == {found} - {None}


@pytest.mark.parametrize("settings", [{"order": 1}, {"order": 2}, {"late": 0}], ids=str)
def test_order_changes_nothing(settings: dict[str, int]) -> None:
    """Blocks and warps in another order, products read early: the same errors to the bit."""
    given = "attention", torch.bfloat16, "sm_90"
    first = in_compiler(library.errors_of, *given, SETTINGS)
    assert in_compiler(library.errors_of, *given, {**SETTINGS, **settings}) == first
