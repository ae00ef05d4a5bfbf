"""The emulator computes products, reductions and scans as GPUs do, as Triton compiles them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.emulator import kernels
from tests.emulator.machine import compiled
from tests.emulator.programs import run

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
TARGETS = "sm_80", "sm_90"
PRODUCT, REDUCTIONS = "tests.emulator.kernels:product", "tests.emulator.kernels:reductions"
SHAPES = [(64, 8, 32), (64, 16, 64), (128, 32, 128), (128, 128, 64), (64, 256, 32), (16, 16, 16)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape: tuple[int, int, int], dtype: torch.dtype, target: str) -> None:
    """Tiles that lie transposed or come out of registers, by one group of warps or two."""
    rows, columns, steps = shape
    a = torch.randn(rows, steps).to(dtype)
    b = torch.randn(steps, columns).to(dtype)
    want = a.double() @ b.double()
    instructions = set()
    for left, right, registers, warps in (
        (0, 0, 0, 4), (1, 1, 0, 8), (0, 1, 1, 4),
    ):  # fmt: skip
        constants = {
            "ROWS": rows, "COLUMNS": columns, "STEPS": steps, "LEFT_TRANSPOSED": left,
            "RIGHT_TRANSPOSED": right, "IN_REGISTERS": registers,
        }  # fmt: skip
        name = "*" + NAMES[dtype]
        kernel = compiled(
            PRODUCT, target, {"a": name, "b": name, "c": "*fp32"}, constants, num_warps=warps
        )
        result = torch.full((rows, columns), float("nan"))
        stored = (a.T if left else a).contiguous(), (b.T if right else b).contiguous()
        run(kernel, 1, *stored, result)
        # tf32 has 10 bits of mantissa, of which Triton cuts the rest.
        error = 2e-3 if dtype == torch.float32 else 1e-6
        torch.testing.assert_close(
            result.double(), want, rtol=0, atol=error * want.abs().max().item()
        )
        instructions |= {n for n in ("wgmma.mma_async", "mma.sync") if n in kernel.ptx}
    if columns > 8:  # with as few, each version of Triton chooses differently
        wide = target == "sm_90" and rows >= 64
        assert ("wgmma.mma_async" in instructions) == wide


@pytest.mark.parametrize("target", TARGETS)
def test_products_in_float32(target: str) -> None:
    """Without tensor cores: a fused multiply-add for each step."""
    a, b = torch.randn(32, 64), torch.randn(64, 32)
    sizes = {"ROWS": 32, "COLUMNS": 32, "STEPS": 64}
    flags = dict.fromkeys(("LEFT_TRANSPOSED", "RIGHT_TRANSPOSED", "IN_REGISTERS"), 0)
    constants = {**sizes, **flags, "PRECISION": "ieee"}
    kernel = compiled(PRODUCT, target, dict.fromkeys("abc", "*fp32"), constants)
    result = torch.empty(32, 32)
    run(kernel, 1, a, b, result)
    torch.testing.assert_close(result.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_products_in_float32_by_three_of_tf32(target: str) -> None:
    """As near as float32, the same bits with operands in each other's place, and infinities."""
    a, b = torch.randn(32, 64), torch.randn(64, 32)
    sizes = {"ROWS": 32, "COLUMNS": 32, "STEPS": 64}
    flags = dict.fromkeys(("LEFT_TRANSPOSED", "RIGHT_TRANSPOSED", "IN_REGISTERS"), 0)
    constants = {**sizes, **flags, "PRECISION": "tf32x3"}
    kernel = compiled(PRODUCT, target, dict.fromkeys("abc", "*fp32"), constants)
    assert "mma.sync.aligned.m16n8k8" in kernel.ptx
    result, swapped = torch.empty(32, 32), torch.empty(32, 32)
    run(kernel, 1, a, b, result)
    run(kernel, 1, b.T.contiguous(), a.T.contiguous(), swapped)
    assert torch.equal(swapped.T, result)
    error = (result.double() - a.double() @ b.double()).abs()
    assert (error <= 2.0**-21 * (a.abs().double() @ b.abs().double())).all()
    a[3, 5], a[4, 6], b[7, 8], a[9, 9] = torch.inf, -torch.inf, torch.inf, torch.nan
    b[5, 10] = 0.0
    run(kernel, 1, a, b, result)
    torch.testing.assert_close(result, a @ b, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("rows", "columns", "warps"), [(1, 32, 1), (4, 100, 4), (7, 1000, 8)])
def test_reductions_and_scans(rows: int, columns: int, warps: int, target: str) -> None:
    x = torch.randn(rows, columns)
    constants = {"COLUMNS": 1 << (columns - 1).bit_length()}
    signature = {**dict.fromkeys(("x", "sums", "most", "where", "scan"), "*fp32"), "columns": "i32"}
    signature["where"] = "*i32"
    kernel = compiled(REDUCTIONS, target, signature, constants, num_warps=warps)
    sums, most = torch.empty(rows), torch.empty(rows)
    where, scan = torch.empty(rows, dtype=torch.int32), torch.empty(rows, columns)
    run(kernel, rows, x, sums, most, where, scan, columns)
    torch.testing.assert_close(sums, x.sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(most, x.amax(1), rtol=0, atol=0)
    torch.testing.assert_close(where.long(), x.argmax(1))
    torch.testing.assert_close(scan, x.cumsum(1), rtol=1e-4, atol=1e-4)


def interpreted(name: str) -> Any:
    """The kernel as Triton's interpreter runs it; skip where nothing is interpreted."""
    kernel: Any = getattr(kernels, name)
    if type(kernel).__name__ != "InterpretedFunction":
        pytest.skip("no kernel is interpreted here")
    return kernel


@pytest.mark.parametrize("target", TARGETS)
def test_products_and_reductions_as_interpreted(target: str) -> None:
    """In float16 products are exact, so that only the order of sums is left to differ."""
    a, b = torch.randn(64, 32).half(), torch.randn(32, 16).half()
    sizes = {"ROWS": 64, "COLUMNS": 16, "STEPS": 32}
    flags = dict.fromkeys(("LEFT_TRANSPOSED", "RIGHT_TRANSPOSED", "IN_REGISTERS"), 0)
    kernel = compiled(PRODUCT, target, {"a": "*fp16", "b": "*fp16", "c": "*fp32"}, sizes | flags)
    got, want = torch.empty(2, 64, 16)
    run(kernel, 1, a, b, got)
    interpreted("product")[(1,)](a, b, want, **sizes, **flags)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)

    x = torch.randn(4, 100)
    found: list[list[torch.Tensor]] = []
    signature = {**dict.fromkeys(("x", "sums", "most", "where", "scan"), "*fp32"), "columns": "i32"}
    kernel = compiled(REDUCTIONS, target, {**signature, "where": "*i32"}, {"COLUMNS": 128})
    for is_interpreted in (False, True):
        results = [torch.empty(4), torch.empty(4), torch.empty(4, dtype=torch.int32)]
        results.append(torch.empty(4, 100))
        if is_interpreted:
            interpreted("reductions")[(4,)](x, *results, 100, COLUMNS=128)
        else:
            run(kernel, 4, x, *results, 100)
        found.append(results)
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
