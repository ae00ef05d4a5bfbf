"""Products of the torch backend: an activation in the same call, in both dtypes oneDNN takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fusedformer.ops.activation import activate_aten
from fusedformer.ops.product import product, product_activation, product_add, weight_gradient


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activation_within_the_product(activation: str, dtype: torch.dtype) -> None:
    """Nearly as near to float64 as two calls, in one; and so is a sum with what is there."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    x, weight, bias, addend = (
        torch.randn(shape).to(dtype) for shape in ((300, 384), (640, 384), (640,), (300, 384))
    )
    truth = activate_aten(F.linear(x.double(), weight.double(), bias.double()), activation)
    with Names() as names:
        ours = product_activation(x, weight, bias, activation)
    called = [name for name in names.found if "supported" not in name]
    assert called == ["mkldnn::_linear_pointwise"]
    stock = activate_aten(F.linear(x, weight, bias), activation)
    mine, theirs = ((y.double() - truth).pow(2).mean().sqrt() for y in (ours, stock))
    assert mine <= 2 * theirs
    wanted = addend.double() + ours.double() @ weight.double()
    mine, theirs = (
        (y.double() - wanted).pow(2).mean().sqrt()
        for y in (product_add(ours, weight, addend.clone()), torch.addmm(addend, ours, weight))
    )
    assert mine <= 2 * theirs


@pytest.mark.parametrize("sizes", [(4097, 128, 136), (4200, 136, 128), (700, 384, 384)], ids=str)
def test_gradient_of_a_weight(sizes: tuple[int, int, int]) -> None:
    """Sums over many rows are taken in parts, each added by the call that computes it."""
    rows, columns, inner = sizes
    grad, x = torch.randn(2, rows // 2, columns), torch.randn(2, rows // 2, inner)
    with Names() as names, torch.no_grad():
        found = weight_gradient(grad, x)
    products = [n for n in names.found if n.startswith("mkldnn::_linear_pointwise")]
    assert len(products) == -(-2 * (rows // 2) // 1024)
    flat, wide = (t.flatten(0, 1).double() for t in (grad, x))
    truth = flat.t() @ wide
    stock = grad.flatten(0, 1).t() @ x.flatten(0, 1)
    mine, theirs = ((y.double() - truth).pow(2).mean().sqrt() for y in (found, stock))
    assert found.is_contiguous()
    assert mine <= 2 * theirs


def test_products_of_a_short_text_are_by_onednn() -> None:
    """One of 11 tokens has the products of a long one; what is less than their setup has not."""
    called = []
    for rows, width in ((11, 384), (11, 32)):
        x, weight, bias = torch.randn(rows, width), torch.randn(width, width), torch.randn(width)
        with Names() as names, torch.no_grad():
            found = product(x, weight, bias)
        called.append([name for name in names.found if name != "aten::t"])
        wanted = F.linear(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    assert called == [["mkldnn::_linear_pointwise"], ["aten::addmm"]]
