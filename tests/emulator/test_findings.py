"""Each kind of fault that the emulator reports is found where it is planted, and only there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.emulator.machine import Machine
from tests.emulator.programs import program

FRESH = 0x7FA5  # 16 bits of memory that nobody wrote


def found(body: str, *tensors: torch.Tensor, grid: int = 1, **options: int) -> list[str]:
    machine = Machine()
    kernel = program(body, ["u64"] * len(tensors), **options)
    machine.launch(kernel, (grid,), *tensors)
    return machine.findings()


def check(right: str, wrong: str, kind: str, line: int, where: str, **options: int) -> None:
    """Nothing is found in ``right``; in ``wrong`` one fault of ``kind`` at ``line``."""
    assert found(right, torch.zeros(4096), **options) == []
    (finding,) = found(wrong, torch.zeros(4096), **options)
    assert finding.startswith(f"{kind} program program.py:{line} (block {where}): "), finding


def edited(body: str, old: str, new: str = "") -> str:
    assert old in body
    return body.replace(old, new)


COPY_OUT = """
mul.wide.u32 %rd10, %r0, 4;
add.s64 %rd11, %rd0, %rd10;
ld.global.b32 %r1, [%rd11+128];
st.global.b32 [%rd11], %r1;
"""


def test_access_past_an_allocation() -> None:
    wrong = edited(COPY_OUT, "[%rd11+128]", "[%rd11+16260]")
    check(COPY_OUT, wrong, "out-of-bounds", 3, "0,0,0; thread 31")
    wrong = edited(COPY_OUT, "[%rd11],", "[%rd11+-4],")
    check(COPY_OUT, wrong, "out-of-bounds", 4, "0,0,0; thread 0")


def test_access_to_freed_memory() -> None:
    machine = Machine()
    x = torch.zeros(256)
    kernel = program(COPY_OUT)
    machine.launch(kernel, (1,), x)
    assert machine.findings() == []
    machine.launch(kernel, (1,), x.data_ptr())
    assert len(machine.findings()) == 2


def test_access_before_the_wait_for_the_launch_before() -> None:
    right = "griddepcontrol.launch_dependents;\ngriddepcontrol.wait;\nld.global.b32 %r1, [%rd0];"
    wrong = edited(right, "griddepcontrol.wait;\n") + "\ngriddepcontrol.wait;"
    check(right, wrong, "early", 2, "0,0,0; thread 0")
    body = "setp.lt.u32 %p1, %r0, 32;\n@%p1 bra L1;\ngriddepcontrol.wait;\nL1:"
    assert found(edited(body, "lt.u32 %p1, %r0, 32", "ge.u32 %p1, %r0, 64"), threads=64) == []
    (finding,) = found(body, threads=64)
    assert finding.startswith("early program") and "warp 0): ends" in finding


def test_misaligned_access() -> None:
    wrong = edited(COPY_OUT, "[%rd11+128]", "[%rd11+130]")
    check(COPY_OUT, wrong, "misaligned", 3, "0,0,0; thread 0")
    right = "shl.b32 %r1, %r0, 3;\nadd.s32 %r1, %r1, 1024;\nst.shared.v2.b32 [%r1], {%r0, %r0};"
    check(right, edited(right, "[%r1]", "[%r1+4]"), "misaligned", 3, "0,0,0; thread 0")


SHARED = """
mov.b32 %r1, global_smem;
shl.b32 %r2, %r0, 2;
add.s32 %r3, %r1, %r2;
st.shared.b32 [%r3], %r0;
bar.sync 0;
xor.b32 %r4, %r2, 128;
add.s32 %r5, %r1, %r4;
ld.shared.b32 %r6, [%r5];
"""


def test_access_past_shared_memory() -> None:
    wrong = edited(SHARED, "[%r3]", "[%r3+4096]")
    assert "out-of-bounds program program.py:4 (block 0,0,0; thread 0)" in str(
        found(wrong, threads=64)
    )
    (finding,) = found(edited(SHARED, "[%r5]", "[%r5+-256]"), threads=64)
    assert finding.startswith("out-of-bounds program program.py:8")


def test_race_in_shared_memory() -> None:
    assert found(SHARED, threads=64) == []
    for instead in ("bar.warp.sync -1;", "mov.b32 %r7, 0;"):
        (finding,) = found(edited(SHARED, "bar.sync 0;", instead), threads=64)[-1:]
        assert finding.startswith("shared-race program program.py:8 (block 0,0,0; thread 32)")
    findings = found(SHARED + "st.shared.b32 [%r3], %r4;", threads=64)
    assert [f.split()[:3] for f in findings] == [
        ["shared-race", "program", "program.py:8"],  # warp 1 reads what warp 0 wrote
        ["shared-race", "program", "program.py:9"],  # and writes what warp 0 read
    ]
    # Narrow accesses of neighbours are none, and so is a value that is there already.
    right = "mov.b32 %r1, global_smem;\nadd.s32 %r3, %r1, %r0;\nst.shared.b8 [%r3+1], %r0;"
    assert found(right, threads=64) == []
    assert found("mov.b32 %r1, global_smem;\nst.shared.b32 [%r1], 5;", threads=64) == []


def test_read_of_unwritten_shared_memory() -> None:
    wrong = edited(SHARED, "[%r5]", "[%r5+256]")
    check(SHARED, wrong, "unwritten-shared", 8, "0,0,0; thread 0", threads=64)


def test_blocks_do_not_see_each_others_shared_memory() -> None:
    body = "mov.u32 %r8, %ctaid.x;\nsetp.eq.s32 %p1, %r8, 0;\n" + SHARED.strip()
    right = body.replace("st.shared", "@%p1 st.shared")
    (finding,) = found(right, grid=2, threads=64)
    assert finding.startswith("unwritten-shared program program.py:10 (block 1,0,0; thread 0)")


def test_races_between_blocks() -> None:
    own = """
    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r2, %r1, 32, %r0;
    mul.wide.u32 %rd10, %r2, 4;
    add.s64 %rd11, %rd0, %rd10;
    ld.global.b32 %r3, [%rd11];
    st.global.b32 [%rd11], %r1;
    """
    writes = edited(own, "%r1, 32,", "%r1, 31,")
    check(own, edited(writes, "ld.global.b32 %r3, [%rd11];", ""), "global-race", 6,
          "1,0,0; thread 0", grid=2)  # fmt: skip
    reads = edited(own, "[%rd11];", "[%rd11+4];")
    (finding,) = found(reads, torch.zeros(4096), grid=2)
    assert finding.startswith("global-race program program.py:6 (block 1,0,0; thread 0)")
    same = edited(edited(writes, "ld.global.b32 %r3, [%rd11];", ""), "[%rd11], %r1", "[%rd11], 7")
    assert found(same, torch.zeros(4096), grid=2) == []
    halves = """
    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r2, %r1, 31, %r0;
    setp.lt.u32 %p1, %r0, 31;
    mul.wide.u32 %rd10, %r2, 2;
    add.s64 %rd11, %rd0, %rd10;
    cvt.u16.u32 %rs1, %r2;
    @%p1 st.global.b16 [%rd11], %rs1;
    """
    assert found(halves, torch.zeros(4096), grid=2) == []


def test_a_launch_may_write_what_another_did() -> None:
    machine, x = Machine(), torch.zeros(4096)
    kernel = program(COPY_OUT)
    for _ in range(2):
        machine.launch(kernel, (1,), x)
    assert machine.findings() == []


@pytest.mark.parametrize(
    ("load", "size"),
    [("b16 %rs1", 2), ("b32 %r1", 4), ("v4.b32 {%r1, %r2, %r3, %r4}", 16), ("b64 %rd12", 8)],
)
def test_read_of_unwritten_global_memory(load: str, size: int) -> None:
    x = torch.full((1024,), FRESH, dtype=torch.int16)
    x[: 31 * size // 2] = 1
    body = f"""
    mul.wide.u32 %rd10, %r0, {size};
    add.s64 %rd11, %rd0, %rd10;
    ld.global.{load}, [%rd11];
    """
    (finding,) = found(body, x)
    assert finding.startswith("unwritten-global program program.py:3 (block 0,0,0; thread 31)")
    x[: 32 * size // 2] = 1
    assert found(body, x) == []


def test_barrier_reached_by_part_of_a_warp() -> None:
    right = "setp.lt.u32 %p1, %r0, 7;\nbra L1;\nL1:\nbar.sync 0;"
    wrong = edited(right, "bra L1;", "@%p1 bra L1;\nbar.sync 0;\nbra L2;") + "\nL2:"
    assert found(right) == []
    findings = found(wrong)
    assert [f.split()[:3] for f in findings] == [
        ["partial-barrier", "program", "program.py:3"],
        ["partial-barrier", "program", "program.py:6"],
    ]


def test_barrier_that_some_warps_never_reach() -> None:
    right = "setp.ge.u32 %p1, %r0, 32;\nbar.sync 0;"
    check(right, edited(right, "bar", "@%p1 bra L1;\nbar") + "\nL1:", "partial-barrier", 3,
          "0,0,0; warp 0", threads=64)  # fmt: skip


def test_named_barriers() -> None:
    body = edited(SHARED, "bar.sync 0;", "bar.sync 1, 64;")
    assert found(body, threads=64) == []
    assert "partial-barrier" in str(found(edited(body, "1, 64", "1, 96"), threads=64))


def test_instruction_of_a_whole_warp_run_by_a_part() -> None:
    right = "setp.lt.u32 %p1, %r0, 7;\nshfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;"
    check(right, edited(right, "shfl", "@%p1 shfl"), "partial-warp", 2, "0,0,0; thread 0")


COPY = """
mov.b32 %r1, global_smem;
shl.b32 %r2, %r0, 4;
add.s32 %r3, %r1, %r2;
cvt.u64.u32 %rd10, %r2;
add.s64 %rd11, %rd0, %rd10;
cp.async.cg.shared.global [%r3], [%rd11], 16;
cp.async.commit_group;
cp.async.wait_group 0;
ld.shared.b32 %r4, [%r3];
"""


def test_read_of_a_copy_that_is_not_waited_for() -> None:
    wrong = edited(COPY, "wait_group 0", "wait_group 1")
    findings = found(wrong, torch.zeros(4096))
    assert findings[0].startswith("pending-copy program program.py:9 (block 0,0,0; thread 0)")
    assert found(COPY, torch.zeros(4096)) == []


def test_copy_that_another_warp_reads_without_a_barrier() -> None:
    right = COPY.strip() + "\nbar.sync 0;\nxor.b32 %r5, %r3, 512;\nld.shared.b32 %r4, [%r5];"
    findings = found(edited(right, "bar.sync 0;"), torch.zeros(4096), threads=64)
    assert any(f.startswith("shared-race program program.py:12") for f in findings)
    assert found(right, torch.zeros(4096), threads=64) == []


# A 64 x 16 tile at 0 and an 8 x 16 tile at 2048, in core matrices without swizzle.
PRODUCT = """
mov.b32 %r1, global_smem;
shl.b32 %r2, %r0, 4;
add.s32 %r3, %r1, %r2;
mov.b32 %r4, 1065369472;
st.shared.v4.b32 [%r3], {%r4, %r4, %r4, %r4};
setp.lt.u32 %p1, %r0, 16;
@%p1 st.shared.v4.b32 [%r3+2048], {%r4, %r4, %r4, %r4};
fence.proxy.async.shared::cta;
bar.sync 0;
bfe.u32 %r5, %r1, 4, 14;
cvt.u64.u32 %rd10, %r5;
add.s64 %rd11, %rd10, 68720001024;
add.s64 %rd12, %rd11, 128;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r10,%r11,%r12,%r13}, %rd11, %rd12, 0, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
shl.b32 %r6, %r0, 2;
cvt.u64.u32 %rd13, %r6;
add.s64 %rd14, %rd0, %rd13;
st.global.b32 [%rd14], %r10;
"""  # noqa: E501
COMMIT = "wgmma.commit_group.sync.aligned;"


def product_findings(body: str, late: int = 1) -> tuple[list[str], torch.Tensor]:
    machine, result = Machine(late=late), torch.zeros(128)
    machine.launch(program(body, threads=128), (1,), result)
    return machine.findings(), result


# With an mbarrier in a kernel, its accesses are ordered by the steps of warps.
MBARRIER = "\nsetp.eq.u32 %p9, 0, 1;\n@%p9 mbarrier.init.shared::cta.b64 [%r1], 1;"


@pytest.mark.parametrize("more", ["", MBARRIER], ids=["by intervals", "by steps"])
@pytest.mark.parametrize("late", [0, 1])
def test_a_product_that_keeps_the_rules(late: int, more: str) -> None:
    findings, result = product_findings(PRODUCT + more, late)
    assert findings == []
    assert (result == 16).all()  # all elements of the tiles are 1


PRODUCT_FAULTS = {
    "no proxy fence": ("fence.proxy.async.shared::cta;", "", "proxy-fence", 15),
    "no wgmma.fence": ("wgmma.fence.sync.aligned;", "", "wgmma-fence", 15),
    "accumulator written after the fence": (
        "wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned;\nmov.b32 %r11, 0;",
        "wgmma-fence", 16,
    ),
    "tile written before the wait": (
        COMMIT, f"{COMMIT}\nst.shared.b32 [%r3], %r0;", "wgmma-race", 17,
    ),
    "accumulator read before the wait": (
        COMMIT, f"{COMMIT}\nmov.b32 %r7, %r12;", "wgmma-register", 17,
    ),
    "accumulator written before the wait": (
        COMMIT, f"{COMMIT}\nmov.b32 %r12, 0;", "wgmma-register", 17,
    ),
    "no wait": ("wgmma.wait_group.sync.aligned 0;", "", "wgmma-register", 21),
    "tile out of bounds": ("%rd11, 128;", "%rd11, 1024;", "out-of-bounds", 15),
    "no barrier": ("bar.sync 0;", "", "shared-race", 15),
    "descriptor of each lane": ("%rd11, 128;", "%rd11, 128;\ncvt.u64.u32 %rd12, %r0;",
                                "wgmma-descriptor", 16),
    "written after the wait, before a barrier": (
        "shl.b32 %r6", "st.shared.b32 [%r1+2048], %r0;\nshl.b32 %r6", "shared-race", 18,
    ),
}  # fmt: skip


@pytest.mark.parametrize("more", ["", MBARRIER], ids=["by intervals", "by steps"])
@pytest.mark.parametrize("fault", PRODUCT_FAULTS)
def test_products_that_break_the_rules(fault: str, more: str) -> None:
    old, new, kind, line = PRODUCT_FAULTS[fault]
    findings, _ = product_findings(edited(PRODUCT, old, new or "mov.b32 %r9, 0;") + more)
    start = f"{kind} program program.py:{line} "
    assert any(finding.startswith(start) for finding in (findings if more else findings[:1])), (
        findings
    )


def test_operand_register_overwritten_before_the_wait() -> None:
    in_registers = edited(
        PRODUCT, "%rd11, %rd12, 0, 1, 1, 0, 0;", "{%r4,%r4,%r4,%r4}, %rd12, 0, 1, 1, 0;"
    )
    findings, result = product_findings(in_registers)
    assert findings == []
    assert (result == 16).all()
    findings, result = product_findings(edited(in_registers, COMMIT, f"{COMMIT}\nmov.b32 %r4, 0;"))
    assert findings[0].startswith("wgmma-register program program.py:17 ")
    assert (result == 0).all()  # what a product reads late is seen in its result


def test_operand_register_written_after_the_fence() -> None:
    body = edited(
        PRODUCT, "%rd11, %rd12, 0, 1, 1, 0, 0;", "{%r4,%r4,%r4,%r4}, %rd12, 0, 1, 1, 0;"
    )  # fmt: skip
    fence = "wgmma.fence.sync.aligned;"
    late = edited(body, fence, f"{fence}\nmov.b32 %r4, 1065369472;")
    result = torch.zeros(128)
    for fenced_operands, kinds in ((1, ["wgmma-fence-operand"]), (0, [])):
        machine = Machine(fenced_operands=fenced_operands)
        machine.launch(program(late, threads=128), (1,), result)
        assert [finding.split()[0] for finding in machine.findings()] == kinds
    assert (result == 16).all()


def test_product_of_what_cp_async_wrote() -> None:
    copied = edited(
        PRODUCT, "st.shared.v4.b32 [%r3], {%r4, %r4, %r4, %r4};",
        "cp.async.cg.shared.global [%r3], [%rd0], 16;\ncp.async.wait_all;",
    )  # fmt: skip
    right = edited(copied, "[%rd14], %r10;", "[%rd14+16], %r10;")
    unfenced = edited(right, "fence.proxy.async.shared::cta;", "mov.b32 %r9, 0;")
    x = torch.ones(256)
    for more in ("", MBARRIER):
        kernel = program(unfenced + more, threads=128)
        for fenced_copies, kinds in (
            (1, {"proxy-fence", "proxy-fence-copy"}), (0, {"proxy-fence"}),
        ):  # fmt: skip
            machine = Machine(fenced_copies=fenced_copies)
            machine.launch(kernel, (1,), x)
            assert {finding.split()[0] for finding in machine.findings()} == kinds
        machine.launch(program(right + more, threads=128), (1,), x)
        assert machine.findings() == []


def test_the_same_finding_is_counted() -> None:
    (finding,) = found(edited(COPY_OUT, "[%rd11+128]", "[%rd11+130]"), torch.zeros(4096))
    assert finding.endswith("[32 times]")


def test_checks_can_be_left_out() -> None:
    machine = Machine(check=0)
    machine.launch(program(edited(SHARED, "bar.sync 0;"), [], threads=64), (1,))
    assert machine.findings() == []


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_race_is_found_in_any_order(order: int) -> None:
    machine = Machine(order=order)
    machine.launch(program(edited(SHARED, "bar.sync 0;"), [], threads=64), (1,))
    assert any("shared-race" in f for f in machine.findings())


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("tcgen05.alloc.sync %r1, %r2;", "tcgen05.alloc.sync"),
        ("add.sat.s32 %r1, %r0, %r0;", "sat"),
        ("fma.rz.f32 %r1, %r0, %r0, %r0;", "fma.rz.f32"),
        ("mov.u32 %r1, %clock;", "%clock"),
        ("cvt.rp.f16.f32 %rs1, %r0;", "rp"),
        ("add.s64 %r1, %r0, %r0;", "add.s64"),
        ("bra NOWHERE;", "NOWHERE"),
        ("ld.global.b32 %r1, [%r0];", "ld.global.b32"),
    ],
)
def test_what_is_not_known_is_named(statement: str, named: str) -> None:
    with pytest.raises(RuntimeError, match=r"emulator: .*" + named.replace(".", r"\.")):
        Machine().load(program(statement, []).ptx)


def test_a_launch_without_end_is_given_up() -> None:
    machine = Machine(budget=1000)
    with pytest.raises(RuntimeError, match="more than 1000 warp instructions"):
        machine.launch(program("L1:\nbra L1;", []), (1,))


def test_a_launch_of_another_size_than_the_kernel_is_for() -> None:
    kernel = replace(program("bar.sync 0;", []), threads=64)
    with pytest.raises(RuntimeError, match="is for 32 threads, not 64"):
        Machine().launch(kernel, (1,))
