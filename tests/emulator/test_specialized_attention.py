"""Attention by specialized warps: the other kernel's bits, and no race, in any order of warps."""

from __future__ import annotations

import pytest
from tests.emulator.machine import in_compiler
from tests.emulator.specialized import cases, compare, findings_of

# Each order shows other races; all are run where most is to be waited for.
ORDERS = {"packed, causal": (0, 1, 2), "causal at the end, by TMA": (0, 1, 2)}


@pytest.mark.parametrize("name", cases())
def test_specialized_warps_give_the_same_bits(name: str) -> None:
    equal, error, findings = in_compiler(compare, name, ORDERS.get(name, (1,)))
    assert findings == []
    assert all(equal)
    assert error <= 1


# Of "groups, by TMA" a tile of keys has 64 * 64 * 2 bytes. Waits of the producer come before it
# says how many it expects, those of consumers before they multiply.
BYTES = r"(expect_tx.*), 8192;"
WAIT_BEFORE = r"(?s)@!complete bra.uni waitLoop;(?=(?:(?!waitLoop|setmaxnreg).)*?{})"


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        (BYTES, r"\1, 4096;", "shared-race"),
        (BYTES, r"\1, 8208;", "deadlock"),
        (WAIT_BEFORE.format("expect_tx"), "", "shared-race"),
        (WAIT_BEFORE.format("wgmma.fence"), "", "pending-copy"),
        (r"(mbarrier.init.shared::cta.b64 .*), 1;", r"\1, 2;", "deadlock"),
    ],
    ids=["few bytes", "many bytes", "producer's wait", "consumers' wait", "count"],
)
def test_fault_in_copies_by_tma_is_found(old: str, new: str, kind: str) -> None:
    findings = in_compiler(findings_of, "groups, by TMA", old, new)
    assert kind in {finding.split()[0] for finding in findings}, findings
