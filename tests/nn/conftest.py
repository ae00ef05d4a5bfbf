"""What all module tests share: seeds, torch's slow paths, and parity of a module with stock."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fusedformer.testing import assert_parity
from torch import Tensor

Call = Callable[..., Tensor | tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20240817)


@pytest.fixture(autouse=True)
def _stock_takes_its_plain_path() -> Iterator[None]:
    """Torch's inference path has defects of its own; the composition is what we compare with."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def outputs_and_gradients(
    module: torch.nn.Module, call: Call, inputs: dict[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Every output, and the gradient of every parameter and floating input, by name."""
    dtype = next((p.dtype for p in module.parameters()), torch.float64)
    leaves = {
        name: t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t
        for name, t in inputs.items()
    }
    outputs = call(module, **leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    grads = [
        torch.randn(o.shape, generator=generator).to(o.device).to(torch.bfloat16).to(o.dtype)
        for o in outputs
    ]
    torch.autograd.backward(outputs, grads)
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    for name, tensor in [*leaves.items(), *module.named_parameters()]:
        if tensor.requires_grad:
            found[f"gradient of {name}"] = (
                torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            )
    return found


@pytest.fixture
def assert_module_parity() -> Callable[..., None]:
    """Ours against a stock module of the same parameters, with stock in float64 as the truth.

    ``call(module, **inputs)`` runs a module; floating inputs need gradients.
    """

    def check(
        ours: torch.nn.Module,
        stock: torch.nn.Module,
        call: Call,
        inputs: dict[str, Tensor],
        dtype: torch.dtype,
        *,
        gradients: bool = True,
    ) -> None:
        with torch.no_grad():  # zero biases and unit gains would hide that they are not applied
            for parameter in stock.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        stock, ours = stock.to(dtype), ours.to(dtype)
        ours.load_state_dict(stock.state_dict())
        truth = copy.deepcopy(stock).double()
        rounded = {
            name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()
        }
        runs: list[Any] = [
            outputs_and_gradients(module, call, rounded, seed=7)
            for module in (ours, stock, truth)
        ]
        assert runs[0].keys() == runs[1].keys() == runs[2].keys()
        for name in runs[2]:
            if name.startswith("gradient") and not gradients:
                continue
            assert_parity(*(run[name] for run in runs), name=name)

    return check
