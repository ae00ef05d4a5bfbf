"""The emulator computes what GPUs do, instruction by instruction: floats, integers, conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.emulator.programs import program, run

# What numpy says of infinities and NaN among the inputs.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INTEGERS = {torch.int32: "i32", torch.int64: "i64"}


def elementwise(statements: str, inputs: list[torch.Tensor], result: torch.Tensor) -> torch.Tensor:
    """Run PTX on each element: from registers a, b, c of the inputs' width into register d."""
    body = ["mov.u32 %r90, %ctaid.x;", "mad.lo.s32 %r91, %r90, 32, %r0;"]
    suffix = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}
    prefix = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}
    names = {}
    for index, tensor in enumerate([*inputs, result]):
        size, number = tensor.element_size(), 10 + index
        names["abcd"[index] if index < len(inputs) else "d"] = f"{prefix[size]}{number}"
        body += [
            f"mul.wide.u32 %rd{15 + index}, %r91, {size};",
            f"add.s64 %rd{15 + index}, %rd{index}, %rd{15 + index};",
        ]
        if index < len(inputs):
            body.append(f"ld.global.{suffix[size]} {prefix[size]}{number}, [%rd{15 + index}];")
    body += statements.format(**names).splitlines()
    size, index = result.element_size(), len(inputs)
    body.append(f"st.global.{suffix[size]} [%rd{15 + index}], {names['d']};")
    kernel = program("\n".join(body), ["u64"] * (len(inputs) + 1))
    assert all(tensor.numel() % 32 == 0 for tensor in inputs)
    run(kernel, result.numel() // 32, *inputs, result)
    return result


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_equal(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same bits, but for the pattern of NaN."""
    if got.is_floating_point():
        torch.testing.assert_close(got.isnan(), want.isnan())
        got, want = got.nan_to_num(), want.nan_to_num()
        assert (bits(got) == bits(want)).all()
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=0)


EVERY_HALF = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_as_a_float(dtype: torch.dtype) -> None:
    halves = EVERY_HALF.view(dtype)
    kept = halves[bits(halves) != 0x7FA5]  # the pattern of unwritten memory
    kept = torch.cat([kept, kept[: 32 - len(kept) % 32]])
    name = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    got = elementwise(f"cvt.f32.{name} {{d}}, {{a}};", [kept], torch.empty(len(kept)))
    assert_equal(got, kept.float())


def floats_beside(dtype: torch.dtype) -> torch.Tensor:
    """Every half, what lies between it and the next, and floats just beside these."""
    halves = EVERY_HALF.view(dtype).float()
    halves = halves[halves.isfinite()]
    middle = (halves.double() + torch.nextafter(halves, halves + 1).double()) / 2
    step = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    ties = (halves.double() * (1 + step)).float()
    some = torch.cat([halves, middle.float(), ties])
    values = torch.cat([some, torch.nextafter(some, some + 1), torch.nextafter(some, some - 1)])
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 65519.996, 65520.0, 3.4e38])
    values = torch.cat(
        [values, special, torch.randn(10000) * 10.0 ** torch.randint(-30, 30, (10000,))]
    )
    return values[: len(values) // 32 * 32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floats_rounded_to_halves(dtype: torch.dtype) -> None:
    values = floats_beside(dtype)
    name = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    got = elementwise(
        f"cvt.rn.{name}.f32 {{d}}, {{a}};", [values], torch.empty(len(values), dtype=dtype)
    )
    assert_equal(got, values.to(dtype))
    other = values.flip(0).contiguous()
    statement = f"cvt.rn.{name}x2.f32 {{d}}, {{a}}, {{b}};"
    pair = elementwise(statement, [values, other], torch.empty(len(values), dtype=torch.int32))
    both = pair.view(dtype).view(-1, 2)
    assert_equal(both[:, 1].contiguous(), values.to(dtype))
    assert_equal(both[:, 0].contiguous(), other.to(dtype))


def hard_floats(count: int = 8192) -> torch.Tensor:
    """Floats of all sizes, subnormals, infinities, NaN and zeros of both signs among them."""
    patterns = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int64).to(torch.int32)
    values = patterns.view(torch.float32)
    values[:2000] = torch.randn(2000)
    values[2000:2010] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, float("inf"), float("-inf"),
                                      float("nan"), 1.0, -1.0, 1.1754944e-38])  # fmt: skip
    shuffled = values[torch.randperm(count)].contiguous()
    shuffled[bits(shuffled) == 0x7FA57FA5] = 0
    return shuffled


def test_a_fused_multiply_add_rounds_once() -> None:
    a, b, c = (hard_floats() for _ in range(3))
    c[:4000] = -(a[:4000] * b[:4000])  # what a second rounding would lose
    got = elementwise("fma.rn.f32 {d}, {a}, {b}, {c};", [a, b, c], torch.empty(len(a)))
    exact = np.longdouble(a.numpy()) * np.longdouble(b.numpy()) + np.longdouble(c.numpy())
    assert_equal(got, torch.from_numpy(exact.astype(np.float32)))
    assert (got[:4000][c[:4000].isfinite()] != 0).float().mean() > 0.5


def flushed(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < 2.0**-126, x * 0, x)


def test_flushing_of_subnormals() -> None:
    a, b, c = (hard_floats() for _ in range(3))
    got = elementwise("fma.rn.ftz.f32 {d}, {a}, {b}, {c};", [a, b, c], torch.empty(len(a)))
    a, b, c = map(flushed, (a, b, c))
    exact = np.longdouble(a.numpy()) * np.longdouble(b.numpy()) + np.longdouble(c.numpy())
    assert_equal(got, flushed(torch.from_numpy(exact.astype(np.float32))))


BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add.f32": torch.add, "add.rn.f32": torch.add, "sub.f32": torch.sub, "mul.f32": torch.mul,
    "div.full.f32": torch.div, "max.f32": torch.fmax, "min.f32": torch.fmin,
    "max.NaN.f32": torch.maximum, "min.NaN.f32": torch.minimum,
}  # fmt: skip


@pytest.mark.parametrize("name", BINARY)
def test_arithmetic_of_floats(name: str) -> None:
    a, b = hard_floats(), hard_floats()
    got = elementwise(f"{name} {{d}}, {{a}}, {{b}};", [a, b], torch.empty(len(a)))
    want = BINARY[name](a, b)
    if name in ("max.f32", "min.f32"):  # the number, also beside a NaN that signals
        want = torch.where(a.isnan(), b, torch.where(b.isnan(), a, want))
    if name.startswith("m"):  # torch does not say which zero it takes
        got, want = got + 0.0, want + 0.0
    assert_equal(got, want)


def test_the_lesser_zero_is_the_negative_one() -> None:
    a, b = torch.tensor([0.0, -0.0] * 16), torch.tensor([-0.0, 0.0] * 16)
    for name, sign in (("min", True), ("max", False)):
        got = elementwise(f"{name}.f32 {{d}}, {{a}}, {{b}};", [a, b], torch.empty(32))
        assert (torch.signbit(got) == sign).all()


COMPARISONS = (
    "eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan",
)  # fmt: skip


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_of_floats(name: str) -> None:
    a, b = hard_floats(), hard_floats()
    b[::3] = a[::3]
    statement = f"setp.{name}.f32 %p1, {{a}}, {{b}};\nselp.b32 {{d}}, 1, 0, %p1;"
    got = elementwise(statement, [a, b], torch.empty(len(a), dtype=torch.int32))
    unordered = a.isnan() | b.isnan()
    plain = name.removesuffix("u")
    if name in ("num", "nan"):
        want = unordered if name == "nan" else ~unordered
    elif plain == "ne":  # of which "neu" is the unordered form, and torch's own
        want = torch.ne(a, b) if name == "neu" else torch.ne(a, b) & ~unordered
    else:
        want = getattr(torch, plain)(a, b) | (unordered if name.endswith("u") else False)
    assert_equal(got, want.int())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_comparisons_of_pairs_of_halves(dtype: torch.dtype) -> None:
    a = EVERY_HALF.view(dtype)
    a = a[bits(a) != 0x7FA5][: 2**16 - 64]
    b = torch.where(torch.rand(len(a)) < 0.5, a, a.roll(7))
    name = {torch.float16: "f16x2", torch.bfloat16: "bf16x2"}[dtype]
    statement = f"""setp.eq.{name} %p1|%p2, {{a}}, {{b}};
    selp.b32 {{d}}, 1, 0, %p1;
    @%p2 add.s32 {{d}}, {{d}}, 2;"""
    pairs = [one.view(torch.int32) for one in (a, b)]
    got = elementwise(statement, pairs, torch.empty(len(a) // 2, dtype=torch.int32))
    assert_equal(got, ((a == b).view(-1, 2).int() * torch.tensor([1, 2])).sum(1, dtype=torch.int32))


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("ex2.approx.f32", np.exp2), ("ex2.approx.ftz.f32", np.exp2),
        ("sqrt.approx.ftz.f32", np.sqrt),
        ("rsqrt.approx.ftz.f32", lambda x: 1 / np.sqrt(x)), ("lg2.approx.f32", np.log2),
        ("rcp.approx.ftz.f32", lambda x: 1 / x),
    ],
)  # fmt: skip
def test_approximate_functions_are_rounded_once(name: str, exact: Any) -> None:
    x = torch.cat([torch.randn(4096) * 20, torch.arange(-160, 160).float(), hard_floats(4096)])
    got = elementwise(f"{name} {{d}}, {{a}};", [x], torch.empty(len(x)))
    flush = flushed if "ftz" in name else lambda t: t
    want = flush(torch.from_numpy(exact(np.longdouble(flush(x).numpy())).astype(np.float32)))
    same = (bits(got) == bits(want)) | (got.isnan() & want.isnan())
    assert same.float().mean() > 0.999
    torch.testing.assert_close(got, want, rtol=2.0**-23, atol=0, equal_nan=True)


def hard_integers(dtype: torch.dtype, count: int = 4096) -> torch.Tensor:
    info = torch.iinfo(dtype)
    edges = torch.tensor(
        [0, 1, -1, 2, -2, 31, 32, 33, info.min, info.max, info.min + 1], dtype=dtype
    )
    some = torch.randint(-(2**62), 2**62, (count,), dtype=torch.int64).to(dtype)
    some[: count // 2] = torch.randint(-100, 100, (count // 2,), dtype=dtype)
    some[:1100] = edges.repeat(100)
    return some[torch.randperm(count)].contiguous()


def wrapped(value: Any, size: int) -> int:
    value = int(value) & ((1 << size) - 1)
    return value - (1 << size) if value >> (size - 1) else value


def quotient(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER: dict[str, Callable[[int, int], int]] = {
    "add.s{n}": lambda a, b: a + b, "sub.s{n}": lambda a, b: a - b,
    "mul.lo.s{n}": lambda a, b: a * b, "mul.hi.s{n}": lambda a, b: a * b >> 64,
    "min.s{n}": min, "max.s{n}": max, "and.b{n}": lambda a, b: a & b, "or.b{n}": lambda a, b: a | b,
    "xor.b{n}": lambda a, b: a ^ b, "div.s{n}": quotient,
    "rem.s{n}": lambda a, b: a if b == 0 else a - quotient(a, b) * b,
}  # fmt: skip


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("name", INTEGER)
def test_arithmetic_of_integers(name: str, dtype: torch.dtype) -> None:
    size = torch.iinfo(dtype).bits
    a, b = hard_integers(dtype), hard_integers(dtype)
    statement = f"{name.format(n=size)} {{d}}, {{a}}, {{b}};"
    got = elementwise(statement, [a, b], torch.empty(len(a), dtype=dtype))
    function = (lambda x, y: x * y >> size) if "hi" in name else INTEGER[name]
    want = [wrapped(function(x, y), size) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert got.tolist() == want


UNSIGNED: dict[str, Callable[[int, int], int]] = {
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "div.u32": lambda a, b: a // b if b else -1,
    "rem.u32": lambda a, b: a % b if b else a,
    "shr.u32": lambda a, b: a >> min(b, 32),
    "shl.b32": lambda a, b: a << min(b, 32),
    "max.u32": max,
}


@pytest.mark.parametrize("name", UNSIGNED)
def test_arithmetic_of_unsigned_integers(name: str) -> None:
    a, b = hard_integers(torch.int32), hard_integers(torch.int32)
    got = elementwise(f"{name} {{d}}, {{a}}, {{b}};", [a, b], torch.empty_like(a))
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    assert got.tolist() == [wrapped(UNSIGNED[name](x % 2**32, y % 2**32), 32) for x, y in pairs]


def extracted(value: int, first: int, length: int, signed: bool) -> int:
    """PTX's definition of bfe, bit by bit."""
    value, first, length = value % 2**32, first % 256, length % 256
    sign = (value >> min(first + length - 1, 31) & 1) if signed and length else 0
    found = [
        (value >> (first + i) & 1) if i < length and first + i <= 31 else sign for i in range(32)
    ]
    return sum(bit << i for i, bit in enumerate(found))


@pytest.mark.parametrize("signed", [False, True])
def test_bit_fields(signed: bool) -> None:
    a = hard_integers(torch.int32)
    first, length = (torch.randint(0, 70, (len(a),), dtype=torch.int32) for _ in range(2))
    statement = f"bfe.{'s' if signed else 'u'}32 {{d}}, {{a}}, {{b}}, {{c}};"
    got = elementwise(statement, [a, first, length], torch.empty_like(a))
    cases = zip(a.tolist(), first.tolist(), length.tolist(), strict=True)
    assert got.tolist() == [wrapped(extracted(*case, signed), 32) for case in cases]


def test_bytes_permuted() -> None:
    a, b = hard_integers(torch.int32), hard_integers(torch.int32)
    choice = torch.randint(0, 2**16, (len(a),), dtype=torch.int32)
    got = elementwise("prmt.b32 {d}, {a}, {b}, {c};", [a, b, choice], torch.empty_like(a))

    def permuted(x: int, y: int, chosen: int) -> int:
        eight = (x % 2**32).to_bytes(4, "little") + (y % 2**32).to_bytes(4, "little")
        four = []
        for n in range(4):
            each = chosen >> 4 * n & 15
            byte = eight[each & 7]
            four.append((255 if byte & 128 else 0) if each & 8 else byte)
        return int.from_bytes(bytes(four), "little", signed=True)

    cases = zip(a.tolist(), b.tolist(), choice.tolist(), strict=True)
    assert got.tolist() == [permuted(*case) for case in cases]


def test_conversions_of_integers() -> None:
    a = hard_integers(torch.int32)
    for statement, dtype, want in (
        ("cvt.s64.s32 {d}, {a};", torch.int64, a.long()),
        ("cvt.u64.u32 {d}, {a};", torch.int64, a.long() % 2**32),
        ("cvt.rn.f32.s32 {d}, {a};", torch.float32, a.float()),
        ("cvt.rn.f32.u32 {d}, {a};", torch.float32, (a.long() % 2**32).float()),
        ("cvt.u16.u32 {d}, {a};", torch.int16, a.short()),
    ):
        assert_equal(elementwise(statement, [a], torch.empty(len(a), dtype=dtype)), want)
    wide = a.long() + (1 << 40)  # of a wider register the lower half
    got = elementwise("cvt.s64.s32 {d}, {a};", [wide], torch.empty_like(wide))
    assert_equal(got, a.long())
    got = elementwise("popc.b32 {d}, {a};", [a], torch.empty_like(a))
    assert got.tolist() == [(x % 2**32).bit_count() for x in a.tolist()]
    halves = a.short()
    got = elementwise("mad.wide.u16 {d}, {a}, {b}, {c};", [halves, halves, a], torch.empty_like(a))
    assert_equal(got, ((halves.long() % 2**16) ** 2 + a).int())
    got = elementwise("mul.wide.u16 {d}, {a}, {b};", [halves, halves], torch.empty_like(a))
    assert_equal(got, ((halves.long() % 2**16) ** 2).int())
    x = hard_floats()
    got = elementwise("cvt.rzi.u32.f32 {d}, {a};", [x], torch.empty(len(x), dtype=torch.int32))
    want = x.double().nan_to_num(0).trunc().clamp(0, 2**32 - 1).long()
    assert_equal(got, want.int())
    got = elementwise("cvt.rzi.s32.f32 {d}, {a};", [x], torch.empty(len(x), dtype=torch.int32))
    assert_equal(got, x.double().nan_to_num(0).trunc().clamp(-(2**31), 2**31 - 1).int())


@pytest.mark.parametrize(
    ("statement", "want"),
    [
        ("shfl.sync.bfly.b32 {d}, {a}, 5, 31, -1;", [lane ^ 5 for lane in range(32)]),
        ("shfl.sync.idx.b32 {d}, {a}, 9, 31, -1;", [9] * 32),
        ("shfl.sync.up.b32 {d}, {a}, 3, 0, -1;", [0, 1, 2, *range(29)]),
        ("shfl.sync.down.b32 {d}, {a}, 3, 31, -1;", [*range(3, 32), 29, 30, 31]),
        ("redux.sync.add.s32 {d}, {a}, -1;", [sum(range(32))] * 32),
        ("redux.sync.max.u32 {d}, {a}, -1;", [31] * 32),
    ],
)  # fmt: skip
def test_what_lanes_tell_each_other(statement: str, want: list[int]) -> None:
    lanes = torch.arange(32, dtype=torch.int32)
    got = elementwise(statement, [lanes], torch.empty(32, dtype=torch.int32))
    assert got.tolist() == want


def test_lanes_part_by_an_index_and_meet() -> None:
    body = """
    bra L0;
    TABLE:
    .branchtargets L1, L2,
    L1;
    L0:
    rem.u32 %r50, {a}, 3;
    brx.idx %r50, TABLE;
    L1:
    add.s32 {d}, {a}, 100;
    bra L3;
    L2:
    add.s32 {d}, {a}, 200;
    L3:
    shfl.sync.bfly.b32 {d}, {d}, 1, 31, -1;
    """.strip()
    lanes = torch.arange(32, dtype=torch.int32)
    got = elementwise(body, [lanes], torch.empty(32, dtype=torch.int32))
    assert got.tolist() == [n + (200 if n % 3 == 1 else 100) for n in (lanes ^ 1).tolist()]
    with pytest.raises(RuntimeError, match=r"brx\.idx with index 2 of 2"):
        elementwise(body.replace(",\n    L1;", ";"), [lanes], torch.empty(32, dtype=torch.int32))


def test_lanes_part_and_meet() -> None:
    body = """
    mov.b32 {d}, 0;
    L1:
    setp.ge.s32 %p1, {d}, {a};
    @%p1 bra L2;
    add.s32 {d}, {d}, 3;
    bra L1;
    L2:
    shfl.sync.bfly.b32 {d}, {d}, 1, 31, -1;
    """.strip()
    lanes = torch.arange(32, dtype=torch.int32)
    got = elementwise(body, [lanes], torch.empty(32, dtype=torch.int32))
    assert got.tolist() == [-(-(lane ^ 1) // 3) * 3 for lane in range(32)]
