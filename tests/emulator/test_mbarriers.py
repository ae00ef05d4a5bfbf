"""mbarriers, bulk copies of tensors and specialized warps, right and with each fault planted."""

from __future__ import annotations

import ctypes
import functools
import re
from dataclasses import replace

import pytest
import torch
from tests.emulator.machine import Compiled, Machine, TensorMap, compiled
from tests.emulator.programs import program

N, K = 32, 64
BYTES = (64 + N) * K * 2  # of both boxes
LAYOUT = (
    "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2, transposed=False, "
    "fp4_padded=False, cga_layout=[])"
)


@functools.cache
def product() -> Compiled:
    signature = {
        "a_map": f"tensordesc<fp16[64,{K}],{LAYOUT}>",
        "b_map": f"tensordesc<fp16[{N},{K}],{LAYOUT}>",
        "out_ptr": "*fp32",
    }
    kernel = "tests.emulator.gluon_kernels:product_of_boxes"
    return compiled(kernel, "sm_90", signature, {"N": N, "K": K}, num_warps=4)


def run(kernel: Compiled, order: int = 0, columns: int = K) -> tuple[torch.Tensor, list[str]]:
    """The largest error of a product of 100 rows, which end within the second box, and findings."""
    torch.manual_seed(0)
    a, b = torch.randn(100, columns).half(), torch.randn(N, columns).half()
    out = torch.full((128, N), torch.nan)
    given = []
    for tensor, rows in ((a, 64), (b, N)):
        given += [TensorMap(tensor, (rows, K), 128), *tensor.shape, *tensor.stride()]
    machine = Machine(order=order)
    machine.launch(kernel, (2,), *given, out)
    want = torch.cat((a.double() @ b.double().T, torch.zeros(28, N, dtype=torch.double)))
    return (out - want).abs().max(), machine.findings()


def kinds(findings: list[str]) -> set[str]:
    return {finding.split()[0] for finding in findings}


@pytest.mark.parametrize("columns", [K, 40])
def test_product_of_boxes_that_descriptors_describe(columns: int) -> None:
    for order in range(3):
        error, findings = run(product(), order, columns)
        assert error < 1e-4 and findings == []


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        (r"mbarrier.try_wait[^;]*;", "setp.eq.u32 complete, 0, 0;", "pending-copy"),
        (r"@!complete bra.uni waitLoop;", "", "pending-copy"),
        # The phase ends with the first of two boxes.
        (rf"(expect_tx.*), {BYTES};", rf"\1, {BYTES - N * K * 2};", "shared-race"),
        (rf"(expect_tx.*), {BYTES};", rf"\1, {BYTES + 16};", "deadlock"),
        (r"(init.shared::cta.b64 .*), 1;", r"\1, 2;", "deadlock"),
        (r"(init.shared::cta.b64 .*)\]", r"\1+8]", "no-mbarrier"),
    ],
    ids=["no wait", "no loop", "few bytes", "many bytes", "count", "elsewhere"],
)  # fmt: skip
def test_fault_in_a_bulk_copy_is_found(old: str, new: str, kind: str) -> None:
    kernel = product()
    faulty, times = re.subn(old, new, kernel.ptx)
    assert times == 1
    _, findings = run(replace(kernel, ptx=faulty))
    assert kind in kinds(findings), findings


# A thread copies a box that is outside of its tensor in three dimensions; lanes take 16 bytes each.
BOX = """
mov.b32 %r1, global_smem;
mov.b32 %r2, -1;
mov.b32 %r5, 0;
shl.b32 %r3, %r0, 4;
add.s32 %r4, %r1, %r3;
cvt.u64.u32 %rd10, %r3;
add.s64 %rd11, %rd0, %rd10;
elect.sync _|%p1, -1;
@!%p1 bra MADE;
mbarrier.init.shared::cta.b64 [%r1+2048], 1;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+2048], 512;
cp.async.bulk.tensor.4d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], \
[%rd1, {16, 5, %r2, 1}], [%r1+2048];
MADE:
bar.sync 0;
L1:
mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r1+2048], %r5;
@!%p3 bra L1;
ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r4];
st.global.v4.b32 [%rd11], {%r10, %r11, %r12, %r13};
""".replace("\\\n", "")


@pytest.mark.parametrize("swizzle", [0, 32])
def test_box_of_four_dimensions_is_zero_outside_of_its_tensor(swizzle: int) -> None:
    x = torch.arange(1, 2 * 3 * 10 * 24 + 1, dtype=torch.int16).view(2, 3, 10, 24)
    out = torch.full((2, 8, 16), -1, dtype=torch.int16)
    boxes = TensorMap(x, (1, 2, 8, 16), swizzle)
    machine = Machine()
    with machine.allocated([x]):
        kernel = program(BOX, ["u64", "u64"])
        machine.launch(kernel, (1,), out, ctypes.addressof(boxes))
    assert machine.findings() == []
    want = torch.zeros_like(out)
    want[1, :5, :8] = x[1, 0, 5:, 16:]  # of heads -1 and 0, rows from 5 and elements from 16 on
    halves = want.view(-1, 4, 2, 8)  # four rows of two chunks: every other four are swapped
    if swizzle:
        halves[1::2] = halves[1::2].flip(2)
    assert torch.equal(out, want)


# Warp 0 copies 512 bytes to shared memory; warp 1 waits for them, adds one and gives the memory
# back, on which warp 0 copies the next 512.
WAIT = "mbarrier.try_wait.parity.shared::cta.b64"
COPIED = "cp.async.mbarrier.arrive.noinc.shared.b64"
ARRIVE = "mbarrier.arrive.shared::cta.b64 _,"
HANDOVER = f"""
mov.b32 %r1, global_smem;
and.b32 %r2, %r0, 31;
shl.b32 %r3, %r2, 4;
add.s32 %r4, %r1, %r3;
cvt.u64.u32 %rd10, %r3;
add.s64 %rd11, %rd0, %rd10;
setp.ne.u32 %p1, %r0, 0;
@%p1 bra MADE;
mbarrier.init.shared::cta.b64 [%r1+1024], 32;
mbarrier.init.shared::cta.b64 [%r1+1032], 32;
MADE:
bar.sync 0;
setp.gt.u32 %p2, %r0, 31;
mov.b32 %r5, 0;
@%p2 bra TAKE;
GIVE:
cp.async.cg.shared.global [%r4], [%rd11], 16;
{COPIED} [%r1+1024];
L1:
{WAIT} %p3, [%r1+1032], %r5;
@!%p3 bra L1;
add.s32 %r5, %r5, 1;
add.s64 %rd11, %rd11, 512;
setp.lt.u32 %p4, %r5, 2;
@%p4 bra GIVE;
ret;
TAKE:
L2:
{WAIT} %p3, [%r1+1024], %r5;
@!%p3 bra L2;
ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r4];
{ARRIVE} [%r1+1032];
add.s32 %r10, %r10, 1;
st.global.v4.b32 [%rd11], {{%r10, %r11, %r12, %r13}};
add.s64 %rd11, %rd11, 512;
add.s32 %r5, %r5, 1;
setp.lt.u32 %p4, %r5, 2;
@%p4 bra TAKE;
"""


def handed_over(body: str, order: int) -> list[str]:
    machine, x = Machine(order=order), torch.arange(256, dtype=torch.int32)
    want = x.view(-1, 4).clone()
    want[:, 0] += 1
    machine.launch(program(body, threads=64), (1,), x)
    findings = machine.findings()
    assert findings or torch.equal(x.view(-1, 4), want)
    return findings


def test_warps_that_hand_memory_over_are_in_order() -> None:
    for order in range(3):
        assert handed_over(HANDOVER, order) == []


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        # Memory is taken before it is there, and given back before it is read.
        (f"{WAIT} %p3, [%r1+1024], %r5;", "setp.eq.u32 %p3, 0, 0;", "shared-race"),
        ("@!%p3 bra L1;", "", "shared-race"),
        ("bar.sync 0;", "", "shared-race"),
        (f"{COPIED} [%r1+1024];", f"{ARRIVE} [%r1+1024];", "pending-copy"),
        (f"{ARRIVE} [%r1+1032];", "", "deadlock"),
        ("[%r1+1032], 32;", "[%r1+1032], 31;", "mbarrier-count"),
    ],
    ids=["wait", "loop", "init", "arrival of copies", "arrival", "count"],
)  # fmt: skip
def test_fault_in_a_handover_is_found(old: str, new: str, kind: str) -> None:
    assert old in HANDOVER
    faulty = HANDOVER.replace(old, new)
    assert kind in set.union(*(kinds(handed_over(faulty, order)) for order in range(3)))


REGISTERS = """
setp.gt.u32 %p1, %r0, 127;
@%p1 bra MORE;
setmaxnreg.dec.sync.aligned.u32 40;
ret;
MORE:
setmaxnreg.inc.sync.aligned.u32 232;
"""


def test_registers_that_nobody_gave_back_never_come() -> None:
    machine = Machine()
    machine.launch(program(REGISTERS, threads=384), (1,), torch.zeros(1))
    assert machine.findings() == []
    few = REGISTERS.replace("dec.sync.aligned.u32 40", "dec.sync.aligned.u32 56")
    machine.launch(program(few, threads=384), (1,), torch.zeros(1))
    assert kinds(machine.findings()) == {"deadlock"}


ELECTION = """
elect.sync _|%p1, -1;
mul.wide.u32 %rd10, %r0, 4;
add.s64 %rd11, %rd0, %rd10;
@%p1 st.global.b32 [%rd11], 7;
"""


def test_one_lane_is_elected() -> None:
    machine, x = Machine(), torch.zeros(64, dtype=torch.int32)
    machine.launch(program(ELECTION, threads=64), (1,), x)
    assert machine.findings() == []
    assert x.sum() == 14 and (x.view(2, 32) == 7).sum(1).tolist() == [1, 1]
