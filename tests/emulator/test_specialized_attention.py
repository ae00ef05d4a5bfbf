"""Attention by specialized warps: the other kernel's bits, and no race, in any order of warps."""

from __future__ import annotations

import pytest
from tests.emulator.machine import in_compiler
from tests.emulator.specialized import cases, compare

# Each order shows other races; all are run where most is to be waited for.
ORDERS = {"packed, causal": (0, 1, 2)}


@pytest.mark.parametrize("name", cases())
def test_specialized_warps_give_the_same_bits(name: str) -> None:
    equal, error, findings = in_compiler(compare, name, ORDERS.get(name, (1,)))
    assert findings == []
    assert all(equal)
    assert error <= 1
