"""LayerScale and stochastic depth in the residual step, against their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.ops.judge import DTYPES, check, grad
from torch import Tensor

import fusedformer
from fusedformer import functional as F
from fusedformer import reference
from fusedformer.testing import assert_function_parity

SHAPES = {
    (3, 5, 24): "odd rows, a masked tail of columns",
    (2, 1): "one column",
    (2, 3, 2, 65): "just above a tile of columns, more dimensions",
    (7, 600): "one row a sample, several blocks of columns",
}


def given(shape: tuple[int, ...], device: str, *names: str) -> dict[str, Any]:
    """The input and the residual, and what is named besides."""
    sizes = {"scale": shape[-1:], "input_bias": shape[-1:], "sample_scale": shape[:1]}
    made: dict[str, Any] = {key: grad(*shape, device=device) for key in ("input", "residual")}
    made |= {name: grad(*sizes[name], device=device) for name in names}
    if "sample_scale" in names:
        made["sample_scale"] = made["sample_scale"].detach()
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_at_once(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    inputs = given(shape, device, "scale", "input_bias", "sample_scale")
    check("dropout_scale_add", dtype, **inputs)


@pytest.mark.parametrize(
    "names", [(), ("scale",), ("sample_scale",), ("input_bias", "sample_scale")], ids=str
)
def test_each_may_be_missing(names: tuple[str, ...], device: str) -> None:
    check("dropout_scale_add", torch.float32, **given((3, 5, 24), device, *names))


def test_strided_inputs_and_mixed_dtypes(device: str) -> None:
    """A slice of a wider product; the result has the widest dtype, gradients their own."""
    x = torch.randn(3, 5, 48, device=device).to(torch.bfloat16)[..., ::2].requires_grad_()
    scale = grad(24, device=device)
    for residual in (grad(3, 5, 24, device=device), x.detach().clone().requires_grad_()):
        found = F.dropout_scale_add(x, residual, scale)
        assert found.dtype == torch.float32
        wanted = reference.dropout_scale_add(x.double(), residual.double(), scale.double())
        dy = torch.randn_like(found)
        ours = torch.autograd.grad(found, (x, residual, scale), dy)
        truth = torch.autograd.grad(wanted, (x, residual, scale), dy.double())
        assert torch.allclose(found.double(), wanted, atol=1e-6)
        for one, true, leaf in zip(ours, truth, (x, residual, scale), strict=True):
            assert one.dtype == leaf.dtype
            assert torch.allclose(one, true, atol=1e-5, rtol=1e-2 * (one.dtype != torch.float32))


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_is_the_mask_of_the_seed(p: float, device: str) -> None:
    """Forward and backward apply the mask that torch's generator gives."""
    from fusedformer_kernels.rows.dropout import dropout_mask

    torch.manual_seed(5)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    keep = dropout_mask(seed, p, 1, 15, 24, False)[0].view(3, 5, 24)
    assert p == 1.0 or 0.4 < keep.float().mean() < 0.95
    inputs = given((3, 5, 24), device, "scale", "input_bias", "sample_scale")

    def ours(**arguments: Any) -> Tensor:
        torch.manual_seed(5)
        return F.dropout_scale_add(p=p, **arguments)

    def truth(**arguments: Any) -> Tensor:
        return reference.dropout_scale_add(p=p, keep=keep, **arguments)

    assert_function_parity(ours, truth, truth, inputs, dtype=torch.float32)


def test_frozen_scales_and_biases_keep_no_input(device: str) -> None:
    """The backward reads x only for the gradient of the scale."""
    x, residual = grad(3, 24, device=device), grad(3, 24, device=device)
    for learns in (True, False):
        scale = torch.randn(24, device=device, requires_grad=learns)
        kept: list[Tensor] = []

        def keep(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = F.dropout_scale_add(x, residual, scale)
        assert any(t.data_ptr() == x.data_ptr() for t in kept) == learns
        dy = torch.randn_like(found)
        (dx,) = torch.autograd.grad(found, x, dy)
        assert torch.allclose(dx, dy * scale, atol=1e-6)


def test_a_factor_of_samples_has_no_gradient_by_the_kernels(device: str) -> None:
    inputs = given((3, 5, 24), device, "sample_scale")
    inputs["sample_scale"].requires_grad_()
    with pytest.raises(ValueError, match=r"dropout_scale_add.*'sample_scale'.*detach"):
        F.dropout_scale_add(**inputs)
    with fusedformer.backend("torch"):
        found = F.dropout_scale_add(**inputs)
    (gradient,) = torch.autograd.grad(found, inputs["sample_scale"], torch.ones_like(found))
    assert torch.allclose(gradient, inputs["input"].sum((1, 2)), atol=1e-4)


def test_the_same_bits_again_and_nothing_of_no_rows(device: str) -> None:
    inputs = given((40, 24), device, "scale", "input_bias")
    dy = torch.randn(40, 24, device=device)
    leaves = list(inputs.values())
    first, again = (
        torch.autograd.grad(F.dropout_scale_add(**inputs), leaves, dy) for _ in range(2)
    )
    assert all(map(torch.equal, first, again))
    empty = given((0, 5, 24), device, "scale", "input_bias")
    found = F.dropout_scale_add(**empty)
    gradients = torch.autograd.grad(found, list(empty.values()), found)
    assert found.shape == (0, 5, 24) and not gradients[2].any() and not gradients[3].any()
