"""Kernels in Gluon for the emulator's tests, with what only sm_90 and later have."""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.9 has renamed it.
copy_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def product_of_boxes(a_map, b_map, out_ptr, N: gl.constexpr, K: gl.constexpr):
    """Multiply a box of 64 rows by one of N rows, which are copied by their descriptors."""
    a = gl.allocate_shared_memory(gl.float16, [64, K], a_map.layout)
    b = gl.allocate_shared_memory(gl.float16, [N, K], b_map.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    mbarrier.expect(ready, (64 + N) * K * 2)
    copy_box(a_map, [gl.program_id(0) * 64, 0], ready, a)
    copy_box(b_map, [0, 0], ready, b)
    mbarrier.wait(ready, 0)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    sums = gl.zeros([64, N], gl.float32, layout)
    sums = warpgroup_mma(a, b.permute((1, 0)), sums, use_acc=False, is_async=True)
    sums = warpgroup_mma_wait(0, deps=[sums])
    rows = gl.program_id(0) * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
    columns = gl.arange(0, N, gl.SliceLayout(0, layout))
    gl.store(out_ptr + rows[:, None] * N + columns[None, :], sums)
