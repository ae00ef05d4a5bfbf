#!/usr/bin/env bash
# Show that ptxas takes a wgmma descriptor from registers that no instruction has written.
#
# A loop that is not pipelined multiplies by two tiles which lie at one address of shared memory, one
# after the other, with different swizzles: keys of 64 columns, then values of 16 or 32. In the machine
# code of sm_90 the second product's later steps add their offset to a uniform register that was never
# written; for values of 64 columns or more, and with the ptxas of Triton 3.9.0, they add it to the
# tile's address. On an H200 attention of the first kind was 40 to 100% off or ended in an illegal
# memory access. Nothing is run here: the kernels are compiled, which needs no GPU.
#
# Seen 2026-11-28, Python 3.11, x86_64:
#   triton 3.6.0 (ptxas 12.8.93): of values of 16 columns UIADD3 UR30, UP0, UR30, 0x20, URZ
#   triton 3.7.1 (12.8.93): the same; triton 3.9.0 (12.9.86): none
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
for version in 3.6.0 3.7.1 3.9.0; do
    "$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/$version" "triton==$version"
done

cat >"$folder/attend.py" <<'PYTHON'
import re
import subprocess
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def attend(q_ptr, k_ptr, v_ptr, o_ptr, n, stride, D: tl.constexpr, DV: tl.constexpr):
    rows, dims, wide = tl.arange(0, 128), tl.arange(0, D), tl.arange(0, DV)
    q = tl.load(q_ptr + rows[:, None] * stride + dims[None, :])
    acc = tl.zeros([128, DV], tl.float32)
    top = tl.full([128], float("-inf"), tl.float32)
    for start in tl.range(0, n, 64, num_stages=1):
        at = start + tl.arange(0, 64)
        k = tl.load(k_ptr + at[:, None] * stride + dims[None, :], mask=at[:, None] < n, other=0.0)
        s = tl.where(at[None, :] < n, tl.dot(q, tl.trans(k)), float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        v = tl.load(v_ptr + at[:, None] * stride + wide[None, :], mask=at[:, None] < n, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * tl.exp2(top - new_top)[:, None])
        top = new_top
    tl.store(o_ptr + rows[:, None] * stride + wide[None, :], acc)


def reads_of_unwritten(d, dv):
    """Additions of the machine code that read a uniform register nothing before them writes."""
    types = {name: "*bf16" for name in ("q_ptr", "k_ptr", "v_ptr")}
    types |= {"o_ptr": "*fp32", "n": "i32", "stride": "i32", "D": "constexpr", "DV": "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 5)}
    source = ASTSource(attend, types, {(6,): d, (7,): dv}, aligned)
    options = {"num_warps": 8, "num_stages": 1}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin = Path(sys.argv[1], "attend.cubin")
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    code = subprocess.run([tool, "-c", "-ndf", cubin], check=True, capture_output=True, text=True)
    written, found = set(), []
    for line in code.stdout.splitlines():
        parsed = re.match(r"\s+/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s+(.*?) ;", line)
        if not parsed:
            continue
        first, *others = re.split(r",\s*", parsed[2])
        reads = {r for each in others for r in re.findall(r"\bUR\d+\b", each)}
        if parsed[1].startswith("UIADD3") and reads - written:
            found.append(f"{parsed[1]} {parsed[2]}")
        if re.fullmatch(r"UR\d+", first):
            pair = re.search(r"\.64|WIDE", parsed[1])
            written |= {f"UR{int(first[2:]) + i}" for i in range(2 if pair else 1)}
    return found


found = {dv: reads_of_unwritten(64, dv) for dv in (16, 32, 64, 128)}
print("triton", triton.__version__, found)
narrow = triton.__version__ < "3.9"
assert [bool(each) for each in found.values()] == [narrow, narrow, False, False], "this has changed"
PYTHON

for version in 3.6.0 3.7.1 3.9.0; do
    TRITON_CACHE_DIR=$folder/cache TRITON_DEFAULT_FP_FUSION=1 PYTHONPATH=$folder/$version \
        "$folder/venv/bin/python" "$folder/attend.py" "$folder"
done
