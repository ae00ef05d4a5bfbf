"""The norms, alone and fused with bias, dropout and residual, against their definitions."""

from typing import Any

import pytest
import torch
from tests.ops.judge import DTYPES, check, first, grad

from fusedformer import functional as F
from fusedformer import reference
from fusedformer.testing import assert_function_parity

WIDTHS = {
    3: "the least whose gradient does not vanish",
    7: "odd",
    64: "a power of two",
    65: "just above it",
    768: "BERT's, not a power of two",
    1000: "masked tail",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_widths(name: str, width: int, dtype: torch.dtype, device: str) -> None:
    parameters: dict[str, Any] = {"weight": grad(width, device=device)}
    if name == "layer_norm":
        parameters["bias"] = grad(width, device=device)
    x = grad(13, width, device=device)
    check(name, dtype, input=x, normalized_shape=(width,), **parameters)


LONG = {
    4097: "dropout's backward in two kernels",
    8192: "the longest row of the one-kernel backward",
    8193: "backward in two kernels",
    16385: "forward in chunks",
}


@pytest.mark.parametrize(
    ("name", "width", "dtype"),
    [
        ("dropout_add_layer_norm", 4097, torch.bfloat16),
        ("dropout_add_layer_norm", 8192, torch.float32),
        ("dropout_add_layer_norm", 8193, torch.bfloat16),
        ("dropout_add_rms_norm", 8193, torch.float32),
        ("dropout_add_layer_norm", 16385, torch.float32),
    ],
)
def test_long_rows(name: str, width: int, dtype: torch.dtype, device: str) -> None:
    """The widths at which kernels change: see LONG."""
    assert width in LONG
    inputs: dict[str, Any] = {key: grad(2, width, device=device) for key in ("input", "residual")}
    keys = ["weight", "input_bias"] + (["bias"] if name == "dropout_add_layer_norm" else [])
    inputs |= {key: grad(width, device=device) for key in keys}
    check(name, dtype, normalized_shape=(width,), return_sum=True, **inputs)


def test_width_one_has_no_gradient(device: str) -> None:
    x = grad(4, 1, device=device)
    y = F.layer_norm(x, (1,), torch.ones(1, device=device), torch.full((1,), 3.0, device=device))
    assert (y == 3.0).all()
    (gradient,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert (gradient == 0).all()


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5)])
def test_several_normalized_dimensions(shape: tuple[int, ...], device: str) -> None:
    x = grad(3, 3, 4, 5, device=device)
    check(
        "layer_norm", torch.float32, input=x, normalized_shape=shape,
        weight=grad(*shape, device=device), bias=grad(*shape, device=device),
    )  # fmt: skip


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("input_bias", [False, True])
@pytest.mark.parametrize("return_sum", [False, True])
def test_every_form(
    weight: bool, bias: bool, input_bias: bool, return_sum: bool, device: str
) -> None:
    """Each parameter there or not; the gradient of the sum joins that of the norm."""
    inputs: dict[str, Any] = {key: grad(9, 24, device=device) for key in ("input", "residual")}
    wanted = {"weight": weight, "bias": bias, "input_bias": input_bias}
    inputs |= {key: grad(24, device=device) for key, there in wanted.items() if there}
    check(
        "dropout_add_layer_norm", torch.float32, normalized_shape=(24,), return_sum=return_sum,
        only=(lambda outputs: outputs) if return_sum else first, **inputs,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_sum_alone(dtype: torch.dtype, bias: bool, device: str) -> None:
    inputs: dict[str, Any] = {key: grad(9, 24, device=device) for key in ("input", "residual")}
    if bias:
        inputs["input_bias"] = grad(24, device=device)
    check("dropout_add", dtype, **inputs)


@pytest.mark.parametrize(
    ("name", "width", "p"),
    [
        ("dropout_add_layer_norm", 24, 0.1),
        ("dropout_add_layer_norm", 24, 1.0),
        ("dropout_add_layer_norm", 4100, 0.5),
        ("dropout_add_rms_norm", 24, 0.5),
        ("dropout_add", 24, 0.1),
        ("dropout_add", 24, 1.0),
    ],
)
def test_dropout_is_the_mask_of_the_seed(name: str, width: int, p: float, device: str) -> None:
    """Forward and backward apply the mask that torch's generator gives."""
    from fusedformer_kernels.rows.dropout import dropout_mask

    torch.manual_seed(5)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    keep = dropout_mask(seed, p, 1, 6, width, False)[0]
    inputs: dict[str, Any] = {key: grad(6, width, device=device) for key in ("input", "residual")}
    inputs["input_bias"] = grad(width, device=device)
    if name != "dropout_add":
        inputs |= {"weight": grad(width, device=device), "normalized_shape": (width,)}

    def candidate(**arguments: Any) -> Any:
        torch.manual_seed(5)
        return getattr(F, name)(p=p, **arguments)

    def truth(**arguments: Any) -> Any:
        outputs = getattr(reference, name)(p=p, keep=keep, **arguments)
        return outputs if name == "dropout_add" else outputs[0]

    # Stock is the definition in float32: with a given mask ATen has nothing else to offer.
    assert_function_parity(candidate, truth, truth, inputs, dtype=torch.float32)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1),
    "every other row": lambda x: x[::2],
    "strided columns": lambda x: x.transpose(1, 2)[:, :, :16],
    "one row for all": lambda x: x[:1].expand(6, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, device: str) -> None:
    x = LAYOUTS[layout](torch.randn(6, 16, 16, device=device)).requires_grad_()
    weight = grad(16, device=device)
    check("layer_norm", torch.float32, input=x, normalized_shape=(16,), weight=weight)


def test_half_input_with_float32_parameters(device: str) -> None:
    x = torch.randn(5, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = grad(32, device=device), grad(32, device=device)
    y = F.layer_norm(x, (32,), weight, bias)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y, (x, weight, bias), torch.randn_like(y))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty_batch(shape: tuple[int, ...], device: str) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    weight = grad(8, device=device)
    y = F.layer_norm(x, (8,), weight)
    gradient, weight_gradient = torch.autograd.grad(y, (x, weight), torch.randn_like(y))
    assert gradient.shape == shape
    assert (weight_gradient == 0).all()


def test_frozen_parameters_cost_no_kernel(device: str) -> None:
    """No partial sums are added up for a weight without requires_grad."""
    from fusedformer_kernels.runtime.launch import recorded_launches

    names = {}
    for frozen in (True, False):
        x = grad(6, 32, device=device)
        weight = torch.randn(32, device=device, requires_grad=not frozen)
        y = F.layer_norm(x, (32,), weight)
        with recorded_launches(run=True) as launches:
            y.backward(torch.randn_like(y))
        names[frozen] = [launch.name for launch in launches]
    assert names[True] == ["_norm_backward"]
    assert names[False] == ["_norm_backward", "_sum_partials"]


def test_one_kernel_forward(device: str) -> None:
    from fusedformer_kernels.runtime.launch import recorded_launches

    x, residual = torch.randn(2, 6, 32, device=device)
    with recorded_launches(run=True) as launches:
        F.dropout_add_layer_norm(x, residual, (32,), input_bias=residual[0], p=0.1)
    assert [launch.name for launch in launches] == ["_norm_forward"]


def test_large_mean_does_not_cancel(device: str) -> None:
    x = (100 * torch.randn(2, 16400, device=device) + 3000.0).requires_grad_()
    check("layer_norm", torch.float32, input=x, normalized_shape=(16400,), eps=1e-5)


@pytest.mark.parametrize(
    ("width", "value"),
    [(100, 1234.567), (768, 1e6), (768, 0.1), (1000, -3e10), (16385, 1234.567), (16385, 1e20)],
)
def test_rows_of_one_value(width: int, value: float, device: str) -> None:
    """Their mean is that value to the bit: the norm is its bias, as large as the value is."""
    x = torch.full((2, width), value, device=device, requires_grad=True)
    bias = torch.randn(width, device=device)
    zeros = torch.zeros_like(x), torch.zeros_like(bias)
    y = F.layer_norm(x, (width,), bias=bias)
    fused = F.dropout_add_layer_norm(x, zeros[0], (width,), bias=bias, input_bias=zeros[1])
    for output in (y, fused):
        assert torch.equal(output, bias.expand_as(x))
        dy = torch.randn_like(output)
        (gradient,) = torch.autograd.grad(output, x, dy)
        truth = (dy.double() - dy.double().mean(1, keepdim=True)) / 1e-5**0.5
        torch.testing.assert_close(gradient.double(), truth, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("width", [64, 16400])
def test_rows_of_one_value_whose_sum_is_rounded(width: int, device: str) -> None:
    """The backward's mean is that of the bfloat16 sum which it reads."""
    x = torch.full((2, width), 1000.0, device=device, dtype=torch.bfloat16, requires_grad=True)
    residual, weight = torch.full_like(x, 0.3), grad(width, device=device)
    y = F.dropout_add_layer_norm(x, residual, (width,), weight)
    assert not y.any()
    dy = torch.randn_like(y)
    gradient, weight_gradient = torch.autograd.grad(y, (x, weight), dy)
    weighted = (dy * weight).double()
    truth = (weighted - weighted.mean(1, keepdim=True)) / 1e-5**0.5
    torch.testing.assert_close(gradient.double(), truth, rtol=0.01, atol=0.01)
    assert not weight_gradient.any()


def test_result_does_not_depend_on_the_batch(device: str) -> None:
    x, weight = torch.randn(37, 300, device=device), torch.randn(300, device=device)
    together = F.layer_norm(x, (300,), weight)
    for row in (0, 17, 36):
        assert torch.equal(F.layer_norm(x[row], (300,), weight), together[row])


def test_determinism(device: str) -> None:
    x, weight = grad(300, 64, device=device), grad(64, device=device)
    y = F.layer_norm(x, (64,), weight)
    dy = torch.randn_like(y)
    runs = [torch.autograd.grad(y, (x, weight), dy, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


PARAMETERS = {
    "every other": lambda: torch.randn(32)[::2],
    "expanded": lambda: torch.randn(1).expand(16),
}


@pytest.mark.parametrize("layout", PARAMETERS)
@pytest.mark.parametrize("name", ["dropout_add_layer_norm", "dropout_add_rms_norm"])
def test_parameters_that_are_not_contiguous(name: str, layout: str, device: str) -> None:
    names = ["weight", "input_bias", *(["bias"] if "layer" in name else [])]
    parameters = {n: PARAMETERS[layout]().to(device).requires_grad_() for n in names}
    x, residual = grad(5, 16, device=device), grad(5, 16, device=device)
    check(
        name,
        torch.float32,
        input=x,
        residual=residual,
        normalized_shape=(16,),
        only=first,
        **parameters,
    )


def test_gradients_of_parameters_are_tensors_of_their_own(device: str) -> None:
    """One may be changed in place or freed, whatever holds the other."""
    x, weight, bias = grad(6, 32, device=device), grad(32, device=device), grad(32, device=device)
    y = F.layer_norm(x, (32,), weight, bias)
    _, first, second = torch.autograd.grad(y, (x, weight, bias), torch.randn_like(y))
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    scale = torch.ones(32, device=device, requires_grad=True)
    kept = (second * scale).sum()
    first.add_(1.0)
    kept.backward()
    assert scale.grad is not None and torch.equal(scale.grad, second)
