"""bias + activation + dropout against its definition, forward and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.ops.judge import DTYPES, check, grad
from torch import Tensor

from fusedformer import functional as F
from fusedformer import reference
from fusedformer.functional import ACTIVATIONS, Activation
from fusedformer.testing import assert_function_parity


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: Activation, bias: bool, dtype: torch.dtype, device: str) -> None:
    inputs: dict[str, Any] = {"input": grad(33, 70, device=device)}
    if bias:
        inputs["bias"] = grad(70, device=device)
    check("bias_activation", dtype, activation=activation, **inputs)


@pytest.mark.parametrize("shape", [(1, 1), (3, 513), (2, 3, 31), (200, 17), (5,)], ids=str)
def test_shapes(shape: tuple[int, ...], device: str) -> None:
    """One element, just above a tile, several leading dimensions, many rows, none."""
    inputs: dict[str, Any] = {
        "input": grad(*shape, device=device),
        "bias": grad(shape[-1], device=device),
    }
    check("bias_activation", torch.float32, activation="gelu", **inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero(activation: Activation, device: str) -> None:
    """No overflow turns into NaN where the function is flat or linear."""
    x = torch.tensor([-1e4, -90.0, -30.0, -5.0, 0.0, 5.0, 30.0, 90.0, 1e4], device=device)
    check("bias_activation", torch.float32, activation=activation, input=x.requires_grad_())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_pass_through_as_in_torch(activation: Activation, device: str) -> None:
    y = F.bias_activation(torch.tensor([torch.nan, torch.inf], device=device), None, activation)
    assert y[0].isnan()
    assert y[1] == torch.inf


@pytest.mark.parametrize("p", [0.1, 1.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dropout_is_the_mask_of_the_seed(activation: Activation, p: float, device: str) -> None:
    from fusedformer_kernels.rows.dropout import dropout_mask

    torch.manual_seed(5)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    keep = dropout_mask(seed, p, 1, 9, 600, False)[0]
    inputs: dict[str, Any] = {"input": grad(9, 600, device=device)}
    inputs["bias"] = grad(600, device=device)

    def candidate(**arguments: Any) -> Tensor:
        torch.manual_seed(5)
        return F.bias_activation(activation=activation, p=p, **arguments)

    def truth(**arguments: Any) -> Tensor:
        return reference.bias_activation(activation=activation, p=p, keep=keep, **arguments)

    assert_function_parity(candidate, truth, truth, inputs, dtype=torch.float32)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every other row": lambda x: x[::2],
    "transposed": lambda x: x.T,
    "one row for all": lambda x: x[:1].expand(8, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, device: str) -> None:
    x = LAYOUTS[layout](torch.randn(24, 24, device=device)).requires_grad_()
    check("bias_activation", torch.float32, activation="silu", input=x)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(shape: tuple[int, ...], device: str) -> None:
    x, bias = (torch.randn(s, device=device, requires_grad=True) for s in (shape, shape[-1:]))
    y = F.bias_activation(x, bias)
    gradient, bias_gradient = torch.autograd.grad(y, (x, bias), torch.randn_like(y))
    assert gradient.shape == shape
    assert (bias_gradient == 0).all()


def test_not_training_drops_nothing(device: str) -> None:
    x = torch.randn(4, 16, device=device)
    assert torch.equal(F.bias_activation(x, p=0.5, training=False), F.bias_activation(x))


def test_backward_is_one_kernel_and_the_sum_of_its_partials(device: str) -> None:
    from fusedformer_kernels.runtime.launch import recorded_launches

    x, bias = grad(40, 64, device=device), grad(64, device=device)
    y = F.bias_activation(x, bias)
    with recorded_launches(run=True) as launches:
        y.backward(torch.randn_like(y))
    names = [launch.name for launch in launches]
    assert names == ["_bias_activation_backward", "_sum_partials"]


def test_biases_that_are_not_contiguous(device: str) -> None:
    for bias in (torch.randn(32, device=device)[::2], torch.randn(1, device=device).expand(16)):
        given: dict[str, Any] = {"input": grad(5, 16, device=device), "bias": bias.requires_grad_()}
        check("bias_activation", torch.float32, activation="relu", **given)
