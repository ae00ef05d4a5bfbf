#!/usr/bin/env bash
# Show that a hook on saved tensors that gives them back with other strides makes gradients of torch's
# own layer_norm, group_norm and sdpa silently wrong on the CPU.
#
# torch.autograd.graph.saved_tensors_hooks, by which activations are compressed or moved to disk, asks
# its second function for a tensor of the same value, size, dtype and device; strides are not among
# what it names. A file or a codec gives back a tensor row by row, or by columns, as it likes. Statistics
# and outputs that a forward keeps are read by their address in some backward kernels, and no check
# stands before them. rms_norm, softmax and batch_norm read by strides, and are right.
#
# Seen 2026-11-28, Python 3.11, x86_64, torch 2.13.0+cpu; largest difference of a gradient:
#   layer_norm of 3 x 4 x 6 wrong, group_norm wrong, scaled_dot_product_attention wrong
#   rms_norm, softmax and batch_norm right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/strides.py" <<'PYTHON'
import sys

import torch
import torch.nn.functional as F

torch.manual_seed(0)


def by_columns(kept):
    return kept if kept.dim() < 2 else kept.transpose(0, -1).contiguous().transpose(0, -1)


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


x, image, weight, channels = leaf(3, 4, 6), leaf(2, 4, 5, 5), leaf(6), leaf(4)
q, k, v = leaf(2, 4, 7, 8), leaf(2, 4, 7, 8), leaf(2, 4, 7, 8)
calls = {
    "layer_norm": (lambda: F.layer_norm(x, (6,), weight), [x, weight]),
    "group_norm": (lambda: F.group_norm(image, 2, channels), [image, channels]),
    "scaled_dot_product_attention": (lambda: F.scaled_dot_product_attention(q, k, v), [q, k, v]),
    "rms_norm": (lambda: F.rms_norm(x, (6,), weight), [x, weight]),
    "softmax": (lambda: F.softmax(x, -1), [x]),
    "batch_norm": (lambda: F.batch_norm(image, None, None, channels, None, True), [image, channels]),
}
wrong = set()
for name, (call, leaves) in calls.items():
    found = []
    for unpack in (lambda kept: kept, by_columns):
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, unpack):
            y = call()
        torch.manual_seed(1)
        found.append(torch.autograd.grad(y, leaves, torch.randn_like(y)))
    apart = max((a - b).abs().max().item() for a, b in zip(*found))
    size = max(a.abs().max().item() for a in found[0])
    print(f"{name}: gradients differ by {apart / size:.1e} of the largest")
    if apart > 1e-3 * size:
        wrong.add(name)
expected = {"layer_norm", "group_norm", "scaled_dot_product_attention"}
sys.exit(0 if wrong == expected else f"wrong are now {sorted(wrong)}")
PYTHON
"$folder/venv/bin/python" "$folder/strides.py"
