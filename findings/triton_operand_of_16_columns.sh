#!/usr/bin/env bash
# Show that Triton before 3.8 lays an operand of 16 columns out for 32 on sm_80, and so miscompiles tl.dot.
#
# The four lanes that share a row of an operand of mma.sync hold kWidth neighbouring columns each. Triton
# takes kWidth from the narrowest load that the operand comes from. Where bits of a byte are unpacked by
# tl.join and mask the operand, it halves that byte once more: kWidth is 8, and four lanes have room for
# 32 columns. An operand of 16 then lies in them twice, and the product adds some columns twice and others
# not at all; nothing warns. Operands of 32 columns are right, and so is a mask of whole bytes (kWidth 4).
# Kernels that draw dropout's bits, or read packed masks or 4-bit weights, are made like this. No GPU is
# needed to see the layout; in an emulator of the machine code the sums of 3.7.1 were 0.14 of the truth,
# those of the other kernels right.
#
# Seen 2026-11-29, Python 3.11, x86_64:
#   3.4.0 4 * 8, 3.5.1 4 * 8, 3.6.0 4 * 8, 3.7.1 4 * 8, 3.8.0 4 * 4, 3.9.0 4 * 4  (lanes * columns, of 16)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"

cat >"$folder/operand.py" <<'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a, bits, b, out, k: tl.constexpr):
    rows, columns, half = tl.arange(0, 64), tl.arange(0, k), tl.arange(0, k // 2)
    x = tl.load(a + rows[:, None] * k + columns[None, :])
    pairs = tl.load(bits + rows[:, None] * (k // 2) + half[None, :])
    kept = tl.reshape(tl.join(pairs & 1, (pairs >> 1) & 1), [64, k])
    y = tl.load(b + columns[:, None] * 64 + rows[None, :])
    found = tl.dot(tl.where(kept != 0, x, 0.0), y)
    tl.store(out + rows[:, None] * 64 + rows[None, :], found)


kinds = {"a": "*fp16", "bits": "*u8", "b": "*fp16", "out": "*fp32", "k": "constexpr"}
made = triton.compile(ASTSource(product, kinds, {"k": 16}), target=GPUTarget("cuda", 80, 32))
(width,) = set(re.findall(r"kWidth = (\d+)", made.asm["ttgir"]))
print(f"4 * {width}")
PYTHON

export TRITON_CACHE_DIR="$folder/cache"
seen=""
for version in 3.4.0 3.5.1 3.6.0 3.7.1 3.8.0 3.9.0; do
    "$folder/venv/bin/pip" install --quiet "triton==$version"
    said=$("$folder/venv/bin/python" "$folder/operand.py" 2>/dev/null || echo failed)
    seen="$seen$version $said, "
done
seen=${seen%, }
echo "$seen"
expected="3.4.0 4 * 8, 3.5.1 4 * 8, 3.6.0 4 * 8, 3.7.1 4 * 8, 3.8.0 4 * 4, 3.9.0 4 * 4"
[ "$seen" = "$expected" ] || { echo "Triton lays the operand out otherwise now" >&2; exit 1; }
