"""Launch each of the kernels that Nsight Compute looks at: ``ncu ... python profiled.py``.

The sizes are those of earlier profiles, so that they can be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import harness  # noqa: F401 (finds the checkout's library)
from fusedformer import functional as F

# What ncu is told to look at: torch's kernels are none of these.
KERNELS = (
    "_attention_forward", "_attention_backward_keys", "_attention_backward_queries",
    "_norm_backward", "_bias_activation_forward", "_bias_activation_backward",
    "_long_softmax_forward", "_long_softmax_backward",
)  # fmt: skip


def calls(device: torch.device, shrink: int) -> Iterator[Tensor]:
    """Compute each output whose backward belongs to it, in sizes divided by ``shrink``."""
    half = torch.bfloat16 if device.type == "cuda" else torch.float32

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=half).requires_grad_()

    for dim in (64, 128):
        query, key, value = (leaf(8, 1024 // dim, 2048 // shrink, dim) for _ in range(3))
        yield F.scaled_dot_product_attention(query, key, value)
    rows = 16384 // shrink
    yield F.layer_norm(leaf(rows, 768), (768,), leaf(768), leaf(768))
    yield F.bias_activation(leaf(rows, 3072), leaf(3072), "gelu")
    yield F.softmax(leaf(256, 131072 // shrink), -1)


def main() -> int:
    """Run each forward and backward once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divide the sizes by this")
    given = parser.parse_args()
    for output in calls(torch.device(given.device), given.shrink):
        output.backward(torch.randn_like(output))
    if given.device == "cuda":
        torch.cuda.synchronize()
    print("launched")
    return 0


if __name__ == "__main__":
    sys.exit(main())
