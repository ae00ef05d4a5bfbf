"""Backwards whose programs walk over many rows and sum up columns: several passes of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.ops.judge import check, grad

from fusedformer import functional as F

ROWS = 33  # three passes of some programs, and one row of four in the last tile


@pytest.mark.parametrize(("width", "dtype"), [(768, torch.bfloat16), (776, torch.float32)], ids=str)
def test_norm_over_many_rows(width: int, dtype: torch.dtype, device: str) -> None:
    """Three parts of a row, and four, the last of which has few columns."""
    rows = {name: grad(ROWS, width, device=device) for name in ("input", "residual")}
    parameters = {name: grad(width, device=device) for name in ("weight", "bias", "input_bias")}
    check(
        "dropout_add_layer_norm", dtype, normalized_shape=(width,), return_sum=True, **rows,
        **parameters,
    )  # fmt: skip


def test_activation_over_many_rows(device: str) -> None:
    given: dict[str, Any] = {"input": grad(ROWS, 520, device=device)}
    check(
        "bias_activation", torch.float16, activation="gelu", bias=grad(520, device=device), **given
    )


def test_rows_get_the_bits_that_they_get_alone(device: str) -> None:
    """The gradient of a row depends on no neighbour, and runs differ in no bit."""
    x, weight, bias = (grad(*shape, device=device) for shape in ((ROWS, 768), (768,), (768,)))
    dy = torch.randn(ROWS, 768, device=device)

    def gradients(rows: slice) -> tuple[torch.Tensor, ...]:
        y = F.layer_norm(x[rows], (768,), weight, bias)
        return torch.autograd.grad(y, (x, weight, bias), dy[rows])

    together = gradients(slice(None))
    assert all(map(torch.equal, together, gradients(slice(None))))
    for row in (0, 30):
        assert torch.equal(gradients(slice(row, row + 1))[0][row], together[0][row])
    # Of one row the sums are its own products.
    dweight, dbias = gradients(slice(30, 31))[1:]
    assert torch.equal(dbias, dy[30])
    normed = torch.nn.functional.layer_norm(x[30].double(), (768,))
    torch.testing.assert_close(dweight.double(), dy[30] * normed, rtol=1e-5, atol=1e-5)
