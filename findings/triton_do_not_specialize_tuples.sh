#!/usr/bin/env bash
# Show that Triton specializes integers in a tuple which do_not_specialize names.
#
# A parameter in do_not_specialize is meant to have one compiled kernel for all its values. Given as a
# number it has. Given as a tuple of numbers, each element is specialized all the same: 1 is compiled
# in as a constant, and multiples of 16 make another kernel than other numbers. Who keeps compiled
# kernels for himself by what do_not_specialize promises launches one that was made for other values.
# Nothing is run or compiled here: the kinds are those that Triton's own launcher asks for.
#
# Seen 2026-11-28, Python 3.11, x86_64, triton 3.6.0, 3.7.1 and 3.9.0 alike:
#   1 as a number i32, in a tuple constexpr; 16 in a tuple i32 divisible by 16; 17 in a tuple i32
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
for version in 3.6.0 3.7.1 3.9.0; do
    "$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/$version" "triton==$version"
done

cat >"$folder/kinds.py" <<'PYTHON'
import importlib.metadata

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature


@triton.jit(do_not_specialize=["n", "sizes"])
def kernel(out, n, sizes):
    tl.store(out, n + sizes[0])


backend = make_backend(GPUTarget("cuda", 90, 32))
bind = create_function_from_signature(kernel.signature, kernel.params, backend)
found = []
for value in (1, 16, 17):
    _, kinds, _ = bind(0, value, (value,), debug=False)
    found.append((kinds[1], kinds[2]))
    print("triton", importlib.metadata.version("triton"), value, *found[-1])
number = ("i32", None)
wanted = [
    (number, (("constexpr",), (1,))),
    (number, (("i32",), ("D",))),
    (number, (("i32",), ("",))),
]
assert found == wanted, found
PYTHON

for version in 3.6.0 3.7.1 3.9.0; do
    PYTHONPATH="$folder/$version" "$folder/venv/bin/python" "$folder/kinds.py"
done
echo "as seen"
