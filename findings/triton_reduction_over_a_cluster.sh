#!/usr/bin/env bash
# Show which versions of Triton compile a sum with `num_ctas=2` (a cluster of two programs) for sm_90.
#
# Clusters are an option of every launch, and tl.sum is the first thing that one would share in them.
# Triton 3.4 compiles it; 3.5, 3.6 and 3.7 raise in TritonGPUPlanCTAPass (no kernel, no fallback to one
# program); 3.8 and 3.9 compile it again. No GPU is needed to see it.
#
# Seen 2026-11-28, Python 3.11, x86_64:
#   3.4.0 compiles, 3.5.1 RuntimeError, 3.6.0 RuntimeError, 3.7.1 RuntimeError, 3.8.0 compiles, 3.9.0 compiles
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"

cat >"$folder/total.py" <<'PYTHON'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def total(x, out, n: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, n)), 0))


source = ASTSource(total, {"x": "*fp32", "out": "*fp32", "n": "constexpr"}, {"n": 8192})
try:
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_ctas": 2})
    print("compiles")
except RuntimeError as error:
    print(type(error).__name__)
PYTHON

export TRITON_CACHE_DIR="$folder/cache"
seen=""
for version in 3.4.0 3.5.1 3.6.0 3.7.1 3.8.0 3.9.0; do
    "$folder/venv/bin/pip" install --quiet "triton==$version"
    said=$("$folder/venv/bin/python" "$folder/total.py" 2>/dev/null)
    seen="$seen$version $said, "
done
seen=${seen%, }
echo "$seen"
expected="3.4.0 compiles, 3.5.1 RuntimeError, 3.6.0 RuntimeError, 3.7.1 RuntimeError, 3.8.0 compiles, 3.9.0 compiles"
[ "$seen" = "$expected" ] || { echo "Triton compiles clusters in other versions now" >&2; exit 1; }
