"""Products of the torch backend: an activation in the same call, in both dtypes oneDNN takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fusedformer.ops.activation import activate_aten
from fusedformer.ops.product import product_activation, product_add


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
