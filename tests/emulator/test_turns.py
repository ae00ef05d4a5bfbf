"""Blocks of a launch that wait for each other: what the emulator makes of them."""

from __future__ import annotations

import pytest
import torch
from tests.emulator import library
from tests.emulator.machine import Machine, in_compiler
from tests.emulator.programs import program

# Each block takes a ticket, waits for its turn and adds 1 to what each thread has.
ADD_IN_TURN = """
setp.eq.u32 %p1, %r0, 0;
@%p1 atom.global.gpu.relaxed.add.u32 %r1, [%rd0], 1;
shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;
again: ld.acquire.gpu.global.s32 %r3, [%rd0+4];
setp.lt.s32 %p2, %r3, %r2;
@%p2 bra again;
mul.wide.u32 %rd10, %r0, 4;
add.s64 %rd11, %rd0, %rd10;
mov.b32 %r4, 0x3f800000;
red.relaxed.gpu.global.add.f32 [%rd11+8], %r4;
bar.sync 0;
fence.acq_rel.gpu;
@%p1 red.relaxed.gpu.global.add.s32 [%rd0+4], 1;
"""


def found(body: str, order: int) -> list[str]:
    machine, x = Machine(order=order), torch.zeros(34)
    machine.launch(program(body), (3,), x)
    assert torch.equal(x[2:], torch.full((32,), 3.0))
    assert x[:2].view(torch.int32).tolist() == [3, 3]
    return machine.findings()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_sums_in_turn_are_no_race(order: int) -> None:
    assert found(ADD_IN_TURN, order) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("fence.acq_rel.gpu;", ""),
        ("ld.acquire", "ld.relaxed"),
        ("again: ld.acquire.gpu.global.s32 %r3, [%rd0+4];", "again: mov.b32 %r3, 9;"),
    ],
    ids=["no fence", "no acquire", "no wait"],
)
def test_sums_out_of_turn_are_found(right: str, wrong: str) -> None:
    """Their order, and with it their bits, would not be the same in every run."""
    assert right in ADD_IN_TURN
    (finding,) = found(ADD_IN_TURN.replace(right, wrong), 0)
    assert finding.startswith("global-race program program.py:10 "), finding


def test_a_turn_that_never_comes_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="waits for what no block before it does"):
        found(ADD_IN_TURN.replace("setp.lt.s32", "setp.le.s32"), 0)


def test_a_relaxed_load_may_see_an_old_turn() -> None:
    """Where programs run last to first: what looks at a turn once must wait for it later."""
    looks = ADD_IN_TURN.replace("again: ld.acquire", "again: ld.relaxed")
    looks = looks.replace("@%p2 bra again;", "fence.acq_rel.gpu;")
    assert found(looks, 0) == []
    assert found(looks, 1) != []


@pytest.mark.parametrize(("target", "dim"), [("sm_90", 64), ("sm_90", 32), ("sm_80", 32)])
def test_attention_in_one_pass(target: str, dim: int) -> None:
    """Right, without a race, and the same bits in whatever order programs and warps run.

    Of 32 dimensions two warps hold the same share, which one of them may add.
    """
    runs = [in_compiler(library.one_pass, target, dim, order) for order in (0, 1, 2)]
    for errors, findings, _ in runs:
        assert findings == []
        assert max(errors) < 1.2e-2
    assert len({bits for _, _, bits in runs}) == 1
