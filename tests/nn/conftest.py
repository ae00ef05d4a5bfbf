"""What all module tests share: seeds, torch's slow paths, and parity of a module with stock."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fusedformer.testing import assert_parity

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


class Called(torch.nn.Module):
    """A module and the way to call it."""

    def __init__(self, module: torch.nn.Module, call: Call) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, **inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.call(self.module, **inputs)

    def as_function(self) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        """A function of the inputs and, by their names, of the parameters."""

        def function(**tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
            parameters = {n: tensors.pop(n) for n, _ in self.named_parameters()}
            found: Tensor = torch.func.functional_call(self, parameters, kwargs=tensors)
            return found

        return function


@pytest.fixture
def assert_module_parity() -> Callable[..., None]:
    """Ours against a stock module of the same parameters, with stock in float64 as the truth.

    ``call(module, **inputs)`` runs a module. Outputs are compared, and with ``gradients`` those
    of all parameters and floating inputs.
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
        runs = [
            Called(module, call).as_function()
            for module in (ours, stock, copy.deepcopy(stock).double())
        ]
        tensors = inputs | {f"module.{n}": p.detach() for n, p in stock.named_parameters()}
        for tensor in tensors.values():
            tensor.requires_grad_(gradients and tensor.is_floating_point())
        assert_parity(*runs, tensors, dtype=dtype)

    return check
