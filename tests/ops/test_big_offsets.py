"""Offsets beyond 2**31 elements, on sparse files: only the pages that are read exist."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusedformer import functional as F

STRIDE = 2**31 + 64  # elements from one row to the next


def far_rows(path: Path, rows: int, columns: int, device: str) -> Tensor:
    """float16 ``[rows, columns]`` whose rows lie STRIDE elements apart."""
    if device != "cpu":
        memory = torch.empty((rows - 1) * STRIDE + columns, dtype=torch.float16, device=device)
    else:
        size = (rows - 1) * STRIDE + columns
        try:
            memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.float16)
        except RuntimeError as error:
            pytest.skip(f"no sparse file of {2 * size} bytes here: {error}")
    view = memory.as_strided((rows, columns), (STRIDE, 1))
    for row in view:
        row.copy_(torch.randn(columns))
    return view


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: F.softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, (x.shape[-1],)),
    "dropout_add": lambda x: F.dropout_add(x, x),
    "bias_activation": lambda x: F.bias_activation(x),
    "attention over sequences": lambda x: F.scaled_dot_product_attention(*3 * (x[:, None, None],)),
    "attention over keys": lambda x: F.scaled_dot_product_attention(*3 * (x[None, None],)),
}


@pytest.mark.parametrize("name", OPS)
def test_rows_far_apart(name: str, tmp_path: Path, device: str) -> None:
    """The same bits as from rows that lie together, forward and backward."""
    far = far_rows(tmp_path / "sparse", 3, 32, device)
    near = far.clone(memory_format=torch.contiguous_format)
    results = []
    for x in (far, near):
        leaf = x.detach().requires_grad_()
        y = OPS[name](leaf)
        torch.manual_seed(1)
        (gradient,) = torch.autograd.grad(y, leaf, torch.randn_like(y))
        results.append((y, gradient))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
