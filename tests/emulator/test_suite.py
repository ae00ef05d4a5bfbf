"""Every kernel that ships runs emulated, on sm_90 and on sm_80; see ``chosen.py``."""

from __future__ import annotations

import shutil

import pytest
import torch
from tests.emulator.on_emulator import Run

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs a C++ compiler"),
]
TARGETS = "sm_90", "sm_80"
ALONE_PADDED_AND_PACKED = "tests/ops/test_varlen_attention.py::test_"
CHOSEN = (
    "tests/emulator/chosen.py",
    f"{ALONE_PADDED_AND_PACKED}alone_padded_and_packed_are_the_same_bits[full-torch.bfloat16]",
    f"{ALONE_PADDED_AND_PACKED}alone_padded_and_packed_are_the_same_bits[causal-torch.bfloat16]",
    f"{ALONE_PADDED_AND_PACKED}dropout_is_the_same_packed_and_padded",
    f"{ALONE_PADDED_AND_PACKED}a_bound_too_low_touches_no_memory_outside",
    # Its backward once waited for a thread that waited for it, on a GPU alone.
    "tests/ops/test_registration.py::test_opcheck[packed ATen, log-sum-exp, learned]",
)
MORE = {"sm_90": ("tests/ops/test_attention_specialized.py",), "sm_80": ()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("emulated")
    return {
        target: Run(folder / f"{target}.xml", target, *CHOSEN, *MORE[target]) for target in TARGETS
    }


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel(target: str, runs: dict[str, Run]) -> None:
    """First and cached launches, odd sizes, masks, dropout; alone = padded = packed."""
    outcome = runs[target].end(timeout=1200)
    assert not outcome.failed, "\n".join(outcome.failed.values())[-8000:]
    assert not outcome.skipped
    assert len(outcome.passed) > 60
