"""A layer's products and what follows attention in C++: values, bits, what is left to others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer.ops import layer_compiled
from fusedformer.ops.layer_compiled import (
    Block,
    block_compiled,
    enough_rows,
    projections_compiled,
)
from fusedformer.testing import compare_tensors
from fusedformer_kernels.cpu import layer as kernel

pytestmark = pytest.mark.usefixtures("by_compiled_torch")

ACTIVATIONS: dict[str, Any] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.fixture(autouse=True)
def of_any_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel.computes(torch.float32):
        pytest.skip("others multiply faster here")
    monkeypatch.setattr(layer_compiled, "_WORTH", 0)


def given(
    rows: int, widths: tuple[int, int, int], dtype: torch.dtype, **settings: Any
) -> tuple[Tensor, Tensor, Block]:
    """What attention found, what it was asked, and parameters with or without biases and norms."""

    def product(source: int, out: int, has_bias: bool = True) -> Any:
        bias = torch.randn(out).to(dtype) if has_bias else None
        return (torch.randn(out, source) / source**0.5).to(dtype), bias

    def norm() -> Any:
        return tuple((torch.randn(width) + one).to(dtype) for one in (1, 0))

    heads, width, hidden = widths
    own: dict[str, Any] = {
        "activation": "gelu", "norms_first": False, "has_biases": True, **settings
    }  # fmt: skip
    biases, first = own["has_biases"], own["norms_first"]
    block = Block(
        product(heads, width, biases), norm() if biases else (None, None), 1e-5,
        product(width, hidden, biases), product(hidden, width, biases),
        (None, None) if first else norm(), 1e-12,
        own["activation"], first,
    )  # fmt: skip
    return torch.randn(rows, heads).to(dtype), torch.randn(rows, width).to(dtype), block


def stock(heads: Tensor, residual: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """The same by torch's own functions, in any dtype."""
    norm: Any = F.layer_norm

    def cast(pair: Any) -> Any:
        return [t if t is None else t.to(dtype) for t in pair]

    width = residual.shape[-1:]
    total = residual.to(dtype) + F.linear(heads.to(dtype), *cast(block.last))
    source = norm(total, width, *cast(block.middle), block.middle_eps)
    hidden = ACTIVATIONS[block.activation](F.linear(source, *cast(block.first)))
    inner = F.linear(hidden, *cast(block.second))
    if block.norms_first:
        return total + inner
    return norm(source + inner, width, *cast(block.end), block.end_eps)


def assert_right(found: Tensor | None, own: tuple[Tensor, Tensor, Block]) -> None:
    assert found is not None and found.dtype is own[0].dtype and found.shape == own[1].shape
    judged = compare_tensors("output", found, stock(*own, found.dtype), stock(*own, torch.float64))
    assert judged.passed, judged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_of_a_block(activation: str, dtype: torch.dtype) -> None:
    """Widths that fill no vector, no panel; a product in several depths; norms at either place."""
    if not kernel.computes(dtype):
        pytest.skip("others multiply faster here")
    for norms_first in (False, True):
        settings: dict[str, Any] = {"activation": activation, "norms_first": norms_first}
        for rows, widths, has_biases in (
            (97, (64, 128, 450), True), (20, (34, 18, 70), False), (301, (6, 66, 802), True)
        ):  # fmt: skip
            own = given(rows, widths, dtype, has_biases=has_biases, **settings)
            assert_right(block_compiled(*own), own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_of_projections(dtype: torch.dtype) -> None:
    if not kernel.computes(dtype):
        pytest.skip("others multiply faster here")
    for rows, source, outs in ((1, 2, [1]), (203, 400, [64, 130, 7]), (200, 18, [256])):
        x = torch.randn(rows, source).to(dtype)
        products = [given(1, (source, out, 2), dtype)[2].last for out in outs]
        found = projections_compiled(x[None], products)
        assert found is not None
        for one, (weight, bias) in zip(found, products, strict=True):
            assert bias is not None
            truth = F.linear(x.double(), weight.double(), bias.double())
            judged = compare_tensors("output", one[0], F.linear(x, weight, bias), truth)
            assert judged.passed, judged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_bits_that_it_has_alone(dtype: torch.dtype) -> None:
    """In another place, from other memory, and by other numbers of threads."""
    if not kernel.computes(dtype):
        pytest.skip("others multiply faster here")
    heads, residual, block = given(200, (64, 64, 300), dtype)
    together = block_compiled(heads, residual, block)
    projected = projections_compiled(heads, [block.last, block.last])
    assert together is not None and projected is not None
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        turned = heads.t().contiguous().t(), residual.t().contiguous().t()
        for found in (block_compiled(*turned, block), block_compiled(heads, residual, block)):
            assert found is not None and torch.equal(found, together)
    finally:
        torch.set_num_threads(threads)
    some = block_compiled(heads[101:170], residual[101:170], block)
    parts = projections_compiled(heads[101:170], [block.last])
    assert some is not None and torch.equal(some, together[101:170])
    assert parts is not None and torch.equal(parts[0], projected[1][101:170])


@pytest.mark.parametrize("norms_first", [False, True])
def test_nan_and_infinity_stay_in_their_rows(norms_first: bool) -> None:
    own = given(64, (32, 64, 128), torch.float32, norms_first=norms_first)
    clean = block_compiled(*own)
    own[0][7, 31], own[1][50, 63] = torch.nan, torch.inf
    found = block_compiled(*own)
    assert found is not None and clean is not None
    assert found[7].isnan().all() and found[50].isnan().any()
    others = [row for row in range(64) if row not in (7, 50)]
    assert torch.equal(found[others], clean[others])


def test_activations_far_from_zero() -> None:
    """As torch's are: nothing overflows on the way."""
    x = torch.tensor([-1e6, -200.0, -20.0, -1.0, -0.0, 1e-30, 1.0, 20.0, 200.0, 1e30])
    zero, nothing = torch.zeros(10, 10), torch.zeros(10)
    for name, function in ACTIVATIONS.items():
        block = Block(
            (zero, None), (nothing, nothing), 1.0, (zero, x), (torch.eye(10), None), (None, None),
            0.0, name, True,
        )  # fmt: skip
        found = block_compiled(torch.zeros(8, 10), torch.zeros(8, 10), block)
        assert found is not None
        torch.testing.assert_close(found, function(x).expand(8, 10), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y, block: (x.double(), y, block),
        lambda x, y, block: (x[:0], y[:0], block),
        lambda x, y, block: (x, y.double(), block),
        lambda x, y, block: (x, y, block._replace(activation="mish")),
        lambda x, y, block: (x, y, block._replace(end=(None, y[0].double()))),
        lambda x, y, block: (x, y, block._replace(first=(block.first[0].t(), None))),
        lambda x, y, block: (x, y[:-1], block),
        lambda x, y, block: (x, y, block._replace(last=(torch.ones(80, 64), None))),
        lambda x, y, block: (x, y, block._replace(first=(torch.ones(64, 60), None))),
        lambda x, y, block: (x, y, block._replace(first=(block.first[0], torch.ones(60)))),
        lambda x, y, block: (x, y, block._replace(second=(torch.ones(64, 60), None))),
        lambda x, y, block: (x, y, block._replace(middle=(torch.ones(60), None))),
    ],
    ids=[
        "float64",
        "empty",
        "residual",
        "activation",
        "norm",
        "strides",
        "rows",
        "wide last",
        "narrow first",
        "short bias",
        "narrow second",
        "short norm",
    ],
)
def test_what_is_left_to_others(change: Any) -> None:
    assert block_compiled(*change(*given(64, (64, 64, 64), torch.float32))) is None


def test_few_rows_are_left_to_others() -> None:
    assert enough_rows(torch.zeros(1, 32, 64)) and not enough_rows(torch.zeros(1, 31, 64))
    assert not enough_rows(torch.zeros(64, 64, dtype=torch.float64))


@pytest.mark.parametrize("pair", [(torch.ones(64, 60), None), (torch.ones(64, 64), torch.ones(60))])
def test_projections_that_do_not_fit_are_left_to_others(pair: Any) -> None:
    assert projections_compiled(torch.zeros(64, 64), [pair]) is None
