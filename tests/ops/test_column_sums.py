"""Backwards whose programs walk over many rows and sum up columns: several passes of each."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from tests.ops.judge import check, grad

from fusedformer import functional as F
from fusedformer_kernels.rows import configs
from fusedformer_kernels.runtime import targets
from fusedformer_kernels.runtime.launch import recorded_launches

ROWS = 33  # three passes of some programs, and one row of four in the last tile
SMALL = targets.Target("cuda", 89, 32, 100, 99 * 1024)


@pytest.mark.parametrize(("width", "dtype"), [(768, torch.bfloat16), (776, torch.float32)], ids=str)
def test_norm_over_many_rows(width: int, dtype: torch.dtype, device: str) -> None:
    """Three parts of a row, and four, the last of which has few columns."""
    given: dict[str, Any] = {
        name: grad(ROWS, width, device=device) for name in ("input", "residual")
    }
    given |= {name: grad(width, device=device) for name in ("weight", "bias", "input_bias")}
    check("dropout_add_layer_norm", dtype, normalized_shape=(width,), return_sum=True, **given)


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


def calls_with_column_sums(device: str) -> tuple[torch.Tensor, ...]:
    x, w, ids = grad(9, 32, device=device), grad(32, device=device), torch.arange(9, device=device)
    return (
        F.layer_norm(x, (32,), w, w),
        F.layer_norm(grad(2, 8200, device=device), (8200,), grad(8200, device=device)),
        F.bias_activation(x, w),
        F.gated_activation(x, w),
        F.embedding_layer_norm(ids, x, w, w),
    )


@pytest.mark.parametrize("name", targets.TARGETS)
def test_sums_begin_while_the_launch_before_them_ends_where_a_gpu_can(
    name: str, device: str
) -> None:
    """Only if that launch lets them, and right behind it; not under the interpreter."""
    target = targets.TARGETS[name]
    can = name in ("sm_90", "sm_100")
    assert target.overlaps is can and not targets.INTERPRETED.overlaps
    for y in calls_with_column_sums(device):
        with targets.assume_target(target), recorded_launches(run=False) as launches:
            y.backward(torch.randn_like(y))
        first, sums = launches[-2:]
        assert sums.name == "_sum_partials"
        assert first.arguments["OVERLAPS"] is can and sums.arguments["OVERLAPS"] is can
        assert ("launch_pdl" in sums.config.options()) is can
        assert "launch_pdl" not in first.config.options()


@pytest.mark.parametrize("target", [*targets.TARGETS.values(), SMALL], ids=lambda t: str(t.arch))
def test_rows_that_are_loaded_ahead_fit_into_shared_memory(target: targets.Target) -> None:
    for columns, loaded in product((5, 768, 4096, 8192), (4, 8, 16)):
        tile = configs.persistent_tile("norm_backward", columns, 8192, False, loaded, target)
        stage = tile.block_m * tile.block_n * tile.parts * loaded
        assert (tile.num_stages - 1) * stage < target.shared_memory
        assert tile.num_stages > 1 or stage > 60_000
