"""Gated activations against their definition, forward and gradients."""

from typing import Any, Literal

import pytest
import torch
from tests.ops.judge import DTYPES, check, grad
from torch import Tensor

from fusedformer import functional as F
from fusedformer import reference
from fusedformer.functional import ACTIVATIONS, Activation
from fusedformer.testing import assert_function_parity

Half = Literal["first", "second"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activates", ["first", "second"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activations(
    activation: Activation, activates: Half, bias: bool, dtype: torch.dtype, device: str
) -> None:
    inputs: dict[str, Any] = {"input": grad(33, 140, device=device)}
    if bias:
        inputs["bias"] = grad(140, device=device)
    check("gated_activation", dtype, activation=activation, activates=activates, **inputs)


@pytest.mark.parametrize("shape", [(1, 2), (3, 1030), (2, 3, 62), (200, 34), (6,)], ids=str)
def test_gated_shapes(shape: tuple[int, ...], device: str) -> None:
    """One element, just above a tile, several leading dimensions, many rows, none."""
    inputs: dict[str, Any] = {
        "input": grad(*shape, device=device),
        "bias": grad(shape[-1], device=device),
    }
    check("gated_activation", torch.float32, activation="gelu", **inputs)


@pytest.mark.parametrize("layout", ["every other row", "transposed", "half of wider rows"])
def test_gated_layouts(layout: str, device: str) -> None:
    x = torch.randn(24, 24, device=device)
    x = {"every other row": x[::2], "transposed": x.T, "half of wider rows": x[:, :12]}[layout]
    check("gated_activation", torch.float32, activation="silu", input=x.requires_grad_())


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_gated_empty(shape: tuple[int, ...], device: str) -> None:
    x, bias = (torch.randn(s, device=device, requires_grad=True) for s in (shape, shape[-1:]))
    y = F.gated_activation(x, bias)
    assert y.shape == (shape[0], shape[1] // 2)
    gradient, bias_gradient = torch.autograd.grad(y, (x, bias), torch.randn_like(y))
    assert gradient.shape == shape
    assert (bias_gradient == 0).all()


@pytest.mark.parametrize("p", [0.1, 1.0])
@pytest.mark.parametrize("activates", ["first", "second"])
def test_gated_dropout_is_the_mask_of_the_seed(activates: Half, p: float, device: str) -> None:
    from fusedformer_kernels.rows.dropout import dropout_mask

    torch.manual_seed(5)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    keep = dropout_mask(seed, p, 1, 9, 600, False)[0]
    inputs: dict[str, Any] = {"input": grad(9, 1200, device=device)}
    inputs["bias"] = grad(1200, device=device)
    options: dict[str, Any] = {"activation": "silu", "activates": activates, "p": p}

    def candidate(**arguments: Any) -> Tensor:
        torch.manual_seed(5)
        return F.gated_activation(**options, **arguments)

    def truth(**arguments: Any) -> Tensor:
        return reference.gated_activation(**options, keep=keep, **arguments)

    assert_function_parity(candidate, truth, truth, inputs, dtype=torch.float32)


def test_gated_not_training_drops_nothing(device: str) -> None:
    x = torch.randn(4, 16, device=device)
    assert torch.equal(F.gated_activation(x, p=0.5, training=False), F.gated_activation(x))


def test_gated_backward_is_one_kernel_and_the_sum_of_its_partials(device: str) -> None:
    from fusedformer_kernels.runtime.launch import recorded_launches

    x, bias = grad(40, 128, device=device), grad(128, device=device)
    y = F.gated_activation(x, bias)
    with recorded_launches(run=True) as launches:
        y.backward(torch.randn_like(y))
    names = [launch.name for launch in launches]
    assert names == ["_gated_activation_backward", "_sum_partials"]


def test_a_factor_that_overflows_the_dtype_of_the_activation(device: str) -> None:
    """Products are formed in float32: only a result beyond float16 is infinite."""
    x = torch.tensor([300.0, 200.0, 300.0, 2.0], device=device, dtype=torch.float16)
    y = F.gated_activation(x, None, "relu")
    assert y[0] == torch.inf
    assert y[1] == 400
