#!/usr/bin/env bash
# Show that sdpa's gradients on the CPU are n times too large for a query whose n keys are all masked by
# a large finite number.
#
# Masks of -1e9 or the dtype's lowest number are the habit where -inf would give NaN; a row that is
# masked whole, as of a padded query, then attends to all keys evenly, and does so in the forward. The
# flash kernel for CPUs keeps the log-sum-exp of a row: -1e9 + log(n), which in float32 is -1e9. Its
# backward takes exp(score - log-sum-exp), which is 1 for each key and should be 1/n. The math kernel has
# the right gradients. Outputs agree, so that only training is wrong.
#
# Seen 2026-11-28, Python 3.11, x86_64, torch 2.13.0+cpu, 48 keys:
#   forward: flash and math agree to 1e-7
#   gradient of value: flash is 48.0 times math's
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/masked.py" <<'PYTHON'
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

keys = 48
torch.manual_seed(0)
q, k, v, dy = (torch.randn(1, 2, n, 16) for n in (1, keys, keys, 1))
mask = torch.full((1, 1, 1, keys), -1e9)


def attend(kernel):
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(kernel):
        y = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask)
    return y.detach(), torch.autograd.grad(y, inputs, dy)[2]


(y, dv), (y_math, dv_math) = attend(SDPBackend.FLASH_ATTENTION), attend(SDPBackend.MATH)
ratio = (dv.norm() / dv_math.norm()).item()
print(f"forward differs by {(y - y_math).abs().max().item():.1e}")
print(f"gradient of value: flash is {ratio:.1f} times math's")
same = torch.allclose(y, y_math, atol=1e-5)
sys.exit(0 if same and abs(ratio - keys) < 0.1 else "the gradients have changed")
PYTHON
"$folder/venv/bin/python" "$folder/masked.py"
