#!/usr/bin/env bash
# Show how much of the gradient of LayerNorm's bias PyTorch keeps in half precision on a CPU.
#
# The CPU kernel adds up the rows' gradients in the dtype of the rows, one row after another in each
# thread. A bfloat16 sum stops growing when it is some hundred times its addends: of 32,768 tokens the
# bias keeps an eighth, on one thread less than a tenth, so it depends on the number of threads. It is
# the same with weight and bias in float32 (the mixed call that ATen allows): gradients come back as
# float32 tensors with these values. float16 keeps three quarters, on one thread half. The output and
# the input's gradient are right, and so are the bias of F.linear and the weight of F.rms_norm, which
# sum in float32.
#
# Seen 2026-11-28, Python 3.11, x86_64, torch 2.13.0+cpu: the sum over the columns of the gradient
# beside the same in float64, 32,768 rows of 256 columns, gradients of mean 0.5 and deviation 1:
#   1 thread: layer_norm bfloat16 0.066, float32 parameters 0.066, float16 0.501; linear 1.000
#   2 threads: layer_norm bfloat16 0.128, float32 parameters 0.128, float16 0.742; linear 1.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0

cat >"$folder/sums.py" <<'PYTHON'
import sys

import torch
import torch.nn.functional as F

torch.manual_seed(0)
ROWS, COLUMNS = 32768, 256
rows, output_grad = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS) + 0.5
eye = torch.eye(COLUMNS)


def kept(dtype, parameter_dtype, call):
    """The part of the bias's gradient that is there, of what float64 says."""
    grad = output_grad.to(dtype)
    bias = torch.zeros(COLUMNS, dtype=parameter_dtype, requires_grad=True)
    (found,) = torch.autograd.grad(call(rows.to(dtype), bias), bias, grad)
    return (found.double().sum() / grad.double().sum()).item()


def norm(x, bias):
    return F.layer_norm(x, (COLUMNS,), torch.ones_like(bias), bias)


def linear(x, bias):
    return F.linear(x, eye.to(x.dtype), bias)


right = True
for threads in (1, 2):
    torch.set_num_threads(threads)
    brain = kept(torch.bfloat16, torch.bfloat16, norm)
    mixed = kept(torch.bfloat16, torch.float32, norm)
    half = kept(torch.float16, torch.float16, norm)
    product = kept(torch.bfloat16, torch.bfloat16, linear)
    print(
        f"{threads} thread(s): layer_norm bfloat16 {brain:.3f}, float32 parameters {mixed:.3f}, "
        f"float16 {half:.3f}; linear {product:.3f}"
    )
    right &= brain < 0.3 and mixed < 0.3 and half < 0.97 and 0.99 < product < 1.01
sys.exit(0 if right else "LayerNorm's gradients are summed in another way now")
PYTHON
"$folder/venv/bin/python" "$folder/sums.py"
