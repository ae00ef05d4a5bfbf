"""A gradient that is undefined (None): what comes before gets none, or zeros, and no error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.bad_arguments import good
from torch import Tensor

from fusedformer import backend, functional, nn


class Undefined(torch.autograd.Function):
    """The identity, whose backward says that there is no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def check(outputs: Any, leaves: list[Tensor], again: bool) -> None:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    ends: list[Tensor] = [Undefined.apply(each) for each in outputs]
    found = torch.autograd.grad(
        ends, leaves, [torch.randn_like(each) for each in ends], allow_unused=True,
        create_graph=again,
    )  # fmt: skip
    assert all(grad is None or not grad.any() for grad in found)


FORMS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in functional.__all__ if name not in ("pack", "unpack")),
    *((name, {"reduction": "none"}) for name in ("cross_entropy", "linear_cross_entropy")),
    ("dropout_add_layer_norm", {"return_sum": True}),
    ("scaled_dot_product_attention", {"return_lse": True}),
    ("scaled_dot_product_attention", {"return_weights": "averaged"}),
]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize(("function", "settings"), FORMS)
def test_of_functions(function: str, settings: dict[str, Any], name: Any, again: bool) -> None:
    arguments = good(function)
    leaves = [
        value.requires_grad_() for argument, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
        and not (argument == "weight" and "cross_entropy" in function)
        and argument not in ("cos", "sin")
    ]  # fmt: skip
    with backend(name):
        check(getattr(functional, function)(**arguments, **settings), leaves, again)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_of_layers(name: Any, device: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, device=device)
    x = torch.randn(2, 3, 8, device=device, requires_grad=True)
    with backend(name):
        check(layer(x), [x, *layer.parameters()], False)
